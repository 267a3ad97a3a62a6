"""`mmjax capfilt` from shards to shards with BLIP-base, beside the sum of its parts: what the command adds to the work.

    python -m experiments.benchmarks.capfilt --images shared/data/stamps/stamps.tar --vocab MINILM/vocab.txt

Random weights of the published size at 384 px, batch 8, float32 on CPU; a caption by nucleus sampling has 20 tokens (a
random model does not end one earlier), and two texts an image are scored. The command is timed from its start to its
end, and behind its first shard, which waits for the weights and for the compiler. The parts are timed in a process of
their own, each by itself: reading, decoding and preprocessing; captioning; matching; writing the selected shard.

Two shards of 16 of Tux Paint's stamps on one core, shared with other work, with a cache of compiled programs:

    read and preprocess        0.021 s a batch of 8
    caption                   12.799 s a batch of 8
    match two texts           15.088 s a batch of 8
    write                      0.010 s a batch of 8
    sum of the parts            0.29 images/s
    behind the first shard      0.29 images/s: 1.01 of the parts'
    the whole command           0.26 images/s: 32 images in 122.4 s, of which
      9.8 s before the first batch (weights 4.1 s, and the compiler)
      2.3 s for the report

The command adds nothing to its models' work. On two cores by themselves that work is 0.83 images/s (`captioning`).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.image_text import seconds_of

THRESHOLD = 0.0
"""Every text passes: the largest output that selection can have."""


def save_models(folder: pathlib.Path, vocab: str, side: int, depth: int) -> None:
    """A captioner and a filter of BLIP's sizes with random weights, as folders of mmjax."""
    import dataclasses

    import jax

    import mmjax
    from mmjax.models.blip.network import BlipConfig
    from mmjax.models.blip.tasks import BlipModel
    from mmjax.text.wordpiece import WordPieceTokenizer

    path = pathlib.Path(vocab)
    load = WordPieceTokenizer.from_vocab if path.suffix == ".txt" else WordPieceTokenizer.from_file
    tokenizer = load(path).with_appended(("[DEC]", "[ENC]"))
    for name, config in (("captioner", BlipConfig.captioner(side)), ("filter", BlipConfig.itm(side))):
        parts = {part: getattr(config, part) for part in ("vision", "text", "decoder")}
        parts = {part: value and dataclasses.replace(value, depth=depth) for part, value in parts.items()}
        config = dataclasses.replace(config, **parts)
        arrays = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), tuple(BlipModel.example(config).values()))
        params = jax.jit(config.network().init)(jax.random.key(0), *arrays)["params"]
        preprocess = BlipModel.default_preprocess(config, "hf")
        model = BlipModel(config, config.stored_params(params), tokenizer=tokenizer, preprocess=preprocess)
        mmjax.save(model, folder / name)


def write_shards(images: str, folder: pathlib.Path, shards: int, each: int) -> None:
    """The first samples of a tar of images and texts as shards of `each`."""
    folder.mkdir()
    with tarfile.open(images) as source:
        members = [member for member in source if member.isfile()]
        keys = list(dict.fromkeys(member.name.partition(".")[0] for member in members))[: shards * each]
        for number in range(shards):
            chosen = set(keys[number * each : (number + 1) * each])
            with tarfile.open(folder / f"{number:05d}.tar", "w") as target:
                for member in members:
                    if member.name.partition(".")[0] in chosen:
                        target.addfile(member, source.extractfile(member))


def command(folder: pathlib.Path, batch: int) -> list[float]:
    """Seconds from the start of `mmjax capfilt` to the end of each shard, and to its own end."""
    models = ["--captioner", str(folder / "captioner"), "--filter", str(folder / "filter")]
    paths = ["--in", str(folder / "in"), "--out", str(folder / "out"), "--threshold", str(THRESHOLD)]
    program = [sys.executable, "-c", "from mmjax.cli import main; main()", "capfilt", *models, *paths]
    began = time.perf_counter()
    run = subprocess.Popen([*program, "--batch_size", str(batch)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    seconds = [time.perf_counter() - began for line in run.stdout if " images/s" in line]
    if run.wait():
        raise SystemExit(f"mmjax capfilt ended with {run.returncode}")
    return [*seconds, time.perf_counter() - began]


def parts(folder: pathlib.Path, batch: int, repeats: int) -> dict[str, float]:
    """In a process of its own: seconds of each part for a batch, and of loading the models."""
    from mmjax.data.webdataset import WebDataset, find_shards
    from mmjax.recipes.capfilt import Models, Sampling, Thresholds, prepared_batches, scores_file, select_shard

    began = time.perf_counter()
    models = Models.load(str(folder / "captioner"), str(folder / "filter"))
    loaded = time.perf_counter() - began
    sampling, shard = Sampling(batch_size=batch), find_shards(str(folder / "in"))[0]
    source = WebDataset(shard)
    records = next(iter(prepared_batches(source, models, batch)))
    pixels = np.stack([record["filter"] for record in records])
    columns: Sequence[Sequence[str]] = [[record["text"] for record in records]] * 2
    scale = batch / len(source)

    def select() -> Any:
        selected = folder / "selected"
        selected.mkdir(exist_ok=True)
        (selected / f"{shard.stem}.selected.json").unlink(missing_ok=True)
        return select_shard(shard, scores_file(shard, folder / "out"), selected, Thresholds(THRESHOLD))

    works = {
        "read and preprocess": (lambda: list(prepared_batches(source, models, batch)), scale),
        "caption": (lambda: models.sample(pixels, sampling, 1), 1.0),
        "match two texts": (lambda: models.match(pixels, columns), 1.0),
        "write": (select, scale),
    }
    seconds = {"load": loaded}
    for name, (work, share) in works.items():
        work()
        seconds[name] = share * sorted(seconds_of(work) for _ in range(repeats))[repeats // 2]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a tar in WebDataset's form")
    parser.add_argument("--vocab", help="vocab.txt or tokenizer.json of bert-base-uncased")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--each", type=int, default=16, help="images of a shard")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(parts(pathlib.Path(options.child), options.batch, options.repeats)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        save_models(folder, options.vocab, options.side, options.depth)
        write_shards(options.images, folder / "in", options.shards, options.each)
        seconds = command(folder, options.batch)
        arguments = ["--child", temporary, "--batch", str(options.batch), "--repeats", str(options.repeats)]
        program = [sys.executable, "-m", "experiments.benchmarks.capfilt", *arguments]
        result = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True)
    of_parts: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    loaded = of_parts.pop("load")
    for name, value in of_parts.items():
        print(f"{name:24} {value:7.3f} s a batch of {options.batch}")
    total, steady = options.shards * options.each, (options.shards - 1) * options.each
    rate, behind = options.batch / sum(of_parts.values()), steady / (seconds[-2] - seconds[0])
    print(f"{'sum of the parts':24} {rate:7.2f} images/s")
    print(f"{'behind the first shard':24} {behind:7.2f} images/s: {behind / rate:.2f} of the parts'")
    print(
        f"{'the whole command':24} {total / seconds[-1]:7.2f} images/s: {total} images in {seconds[-1]:.1f} s, of which"
    )
    before = seconds[0] - options.each / behind
    print(f"  {before:.1f} s before the first batch (weights {loaded:.1f} s, and the compiler)")
    print(f"  {seconds[-1] - seconds[-2]:.1f} s for the report")


if __name__ == "__main__":
    main()
