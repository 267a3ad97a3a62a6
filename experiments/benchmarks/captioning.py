"""BLIP-base writing captions and filtering them: ours against transformers' BLIP, the same weights and the same ids.

    python -m experiments.benchmarks.captioning --rounds 3

Random weights of the published size at 384 px, batch 8, float32 on a CPU with as many threads on each side as the
process may use. A caption has exactly 16 new tokens after "a picture of", by greedy search and by 3 beams; `capfilt` is
one caption by nucleus sampling and the ITM head on two texts an image, in images a second. Every measurement is a
process of its own; processes alternate; the ratio is the median over rounds (transformers' seconds by ours: above 1 is
faster). Each process also times one large matrix product and a copy of memory.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from experiments.benchmarks.image_text import seconds_of

PROMPT, NEW, SIDE = [30522, 1037, 3861, 1997], 16, 384
CASES = {"greedy": 1, "beam 3": 3}


def save_models(folder: pathlib.Path, depth: int, side: int) -> None:
    """A captioner and an ITM model in Hugging Face's layout."""
    import dataclasses

    import jax

    import mmjax
    from mmjax.models.blip.network import BlipConfig
    from mmjax.models.blip.tasks import BlipModel

    for name, config in (("captioner", BlipConfig.captioner(side)), ("itm", BlipConfig.itm(side))):
        parts = {part: getattr(config, part) for part in ("vision", "text", "decoder")}
        parts = {part: value and dataclasses.replace(value, depth=depth) for part, value in parts.items()}
        config = dataclasses.replace(config, **parts)
        inputs = tuple(BlipModel.example(config).values())
        arrays = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), inputs)
        params = jax.jit(config.network().init)(jax.random.key(0), *arrays)["params"]
        mmjax.export(BlipModel(config, config.stored_params(params)), folder / name, layout="hf")


def data(batch: int, side: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    texts = rng.integers(1000, 30_000, (2, batch, 20))
    texts[..., 0], texts[..., -1] = 101, 102
    images = rng.normal(size=(batch, side, side, 3)).astype(np.float32)
    return {"images": images, "texts": texts.astype(np.int32), "prompts": np.tile(np.int32(PROMPT), (batch, 1))}


def ours(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is timed, by name."""
    import jax
    import jax.numpy as jnp

    import mmjax

    captioner: Any = mmjax.load(folder / "captioner")
    filter: Any = mmjax.load(folder / "itm")
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}

    def caption(**options: Any) -> Any:
        return np.asarray(captioner.generate(arrays["prompts"], pixel_values=arrays["images"], **length, **options))

    def match(variables: Any, pixels: Any, texts: Any) -> Any:
        images = filter.apply(variables, "encode_image", pixels)
        mask = jnp.ones_like(texts[0])
        states = [filter.apply(variables, "encode_pair", ids, mask, None, images) for ids in texts]
        return jnp.stack([filter.apply(variables, "itm_logits", state) for state in states])

    compiled = jax.jit(match)

    def capfilt() -> Any:
        caption(temperature=1.0, top_k=50, top_p=0.9, seed=1)
        return jax.block_until_ready(compiled(filter.variables, arrays["images"], arrays["texts"]))

    cases = {name: lambda beams=beams: caption(num_beams=beams) for name, beams in CASES.items()}
    return cases | {"capfilt": capfilt}


def theirs(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    captioner = transformers.BlipForConditionalGeneration.from_pretrained(folder / "captioner").eval()
    filter = transformers.BlipForImageTextRetrieval.from_pretrained(folder / "itm").eval()
    pixels = torch.tensor(arrays["images"]).permute(0, 3, 1, 2).contiguous()
    # transformers drops the last id of the prompt, which is [SEP] for its tokenizer.
    prompts = torch.tensor(np.pad(arrays["prompts"], ((0, 0), (0, 1)), constant_values=102)).long()
    texts = torch.tensor(arrays["texts"]).long()
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}

    @torch.inference_mode()
    def caption(**options: Any) -> Any:
        ids = captioner.generate(
            pixels, input_ids=prompts, attention_mask=torch.ones_like(prompts), **length, **options
        )
        return ids[:, len(PROMPT) :].numpy()

    @torch.inference_mode()
    def capfilt() -> Any:
        caption(do_sample=True, top_k=50, top_p=0.9)
        # Its ITM class encodes the images with every text.
        return [filter(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)) for ids in texts]

    return {name: lambda beams=beams: caption(num_beams=beams) for name, beams in CASES.items()} | {"capfilt": capfilt}


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: the seconds of each case, and the ids of its captions."""
    arrays = data(options.batch, options.side)
    cases = (ours if side == "mmjax" else theirs)(pathlib.Path(options.folder), arrays)
    seconds: dict[str, Any] = {}
    ids: dict[str, Any] = {}
    for name, run in cases.items():
        output = run()
        if name in CASES:
            ids[name] = np.asarray(output).tolist()
        seconds[name] = statistics.median(seconds_of(run) for _ in range(options.repeats))
    x, y = np.random.default_rng(0).random((1024, 1024), np.float32), np.zeros(64 << 20, np.float32)
    product, copy = (min(seconds_of(run) for _ in range(5)) for run in (lambda: x @ x, y.copy))
    return {"seconds": seconds, "ids": ids, "product": product, "copy": copy}


def child(side: str, options: argparse.Namespace) -> dict[str, Any]:
    arguments = [sys.executable, "-m", "experiments.benchmarks.captioning", "--child", side]
    for field in ("batch", "side", "folder", "repeats"):
        arguments += [f"--{field}", str(getattr(options, field))]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed calls of each case in a process, after one that is not"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--folder", help="of exported models; default: a temporary one")
    parser.add_argument("--child", choices=("mmjax", "transformers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        if options.folder is None:
            options.folder = temporary
            save_models(pathlib.Path(temporary), options.depth, options.side)
        rounds = [{side: child(side, options) for side in ("mmjax", "transformers")} for _ in range(options.rounds)]
    print("| case | mmjax s | transformers s | ratio | images/s | ids equal |\n|---|---|---|---|---|---|")
    for name in rounds[0]["mmjax"]["seconds"]:
        print(row(name, rounds, options.batch))
    product, copy = (rounds[0]["mmjax"][name] for name in ("product", "copy"))
    print(f"\nproduct {2 * 1024**3 / product / 1e9:.0f} GFLOP/s, copy {0.5 * 2**30 / copy / 1e9:.1f} GB/s")


def row(name: str, rounds: list[dict[str, dict[str, Any]]], batch: int) -> str:
    mine, other = ([each[side]["seconds"][name] for each in rounds] for side in ("mmjax", "transformers"))
    ratios = [b / a for a, b in zip(mine, other)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    equal = all(each["mmjax"]["ids"].get(name) == each["transformers"]["ids"].get(name) for each in rounds)
    seconds = f"{statistics.median(mine):.2f} | {statistics.median(other):.2f}"
    return (
        f"| {name} | {seconds} | {spread} | {batch / statistics.median(mine):.2f} | {equal if name in CASES else '-'} |"
    )


if __name__ == "__main__":
    main()
