"""The published recipes of ALBEF, BLIP and BLIP-2: their constants, and one step of each on tiny annotation files."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from mmjax.errors import MmjaxError
from mmjax.interface.config import config_from_json
from mmjax.text.wordpiece import SPECIAL
from mmjax.training.experiment import load_experiment
from mmjax.training.optimizer import warmup_epoch_decay
from mmjax.training.state import create_state
from mmjax.training.step import train_step

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
WORDS = ["a", "picture", "of", "red", "hen", "boat", "left", "right", "is", "what", "yes", "no"]
COUNT = 5

CAPTIONS = [{"image": f"{i}.png", "caption": f"A {word} hen!", "image_id": f"x_{i // 2}"} for i, word in
            enumerate(["red", "left", "a", "boat", "right"])]  # fmt: skip
QUESTIONS = [
    {"dataset": ("vqa", "vg")[i % 2], "image": f"{i}.png", "question": "What is red?", "question_id": i,
     "answer": "hen" if i % 2 else ["yes", "no", "yes"]}
    for i in range(COUNT)
]  # fmt: skip
PAIRS = [
    {"images": [f"{i}.png", f"{4 - i}.png"], "sentence": "a hen is left", "label": ("True", "False")[i % 2]}
    for i in range(COUNT)
]
ENTAILED = [
    {"image": i, "sentence": "a hen", "label": ("entailment", "neutral", "contradiction")[i % 3]} for i in range(COUNT)
]
ENTRIES: dict[str, Any] = {
    "albef_pretrain": CAPTIONS,
    "albef_retrieval": CAPTIONS,
    "albef_vqa": QUESTIONS,
    "albef_nlvr_pretrain": CAPTIONS,
    "albef_nlvr": PAIRS,
    "albef_entailment": ENTAILED,
    "albef_grounding": [{"image": each["image"], "text": each["caption"]} for each in CAPTIONS],
    "blip_pretrain": CAPTIONS,
    "blip_caption": CAPTIONS,
    "blip_retrieval": CAPTIONS,
    "blip_vqa": QUESTIONS,
    "blip_nlvr": PAIRS,
    "blip2_stage1": CAPTIONS,
}
TINY: dict[str, Any] = {
    "steps": 1, "batch_size": 4, "examples": COUNT, "workers": 0, "lift": "jit", "size": 16, "length": 8, "groups": 1,
    "tensorboard": False,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Images and a vocabulary."""
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        for name in (f"{i}.png", f"{i}.jpg"):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(tmp_path / name)
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    return tmp_path


def small(network: Any, vocab_size: int) -> Any:
    """The network of a recipe at tiny sizes."""
    vision = dataclasses.replace(network.vision, width=8, depth=1, heads=1, hidden=9, patch=8)
    sizes = {"vocab_size": vocab_size, "width": 8, "heads": 1, "hidden": 9, "positions": 16}
    if hasattr(network, "qformer"):
        qformer = dataclasses.replace(network.qformer, **sizes, depth=2)
        ids = {"bos": vocab_size - 1, "sep": 3}
        return dataclasses.replace(network, vision=vision, qformer=qformer, queries=3, embed_dim=6, **ids)

    def text(config: Any) -> Any:
        if config is None:
            return None
        first = min(config.cross_from, 1)
        depth = 3 if getattr(network, "two_images", False) and first else first + 1
        merge = {"merge_from": 0} if config.merge_from is not None else {}
        return dataclasses.replace(config, **sizes, depth=depth, cross_from=first, **merge)

    ids = {"bos": vocab_size - 2, "enc": vocab_size - 1, "sep": 3} if hasattr(network, "bos") else {}
    fields = {"vision": vision, "text": text(network.text), "decoder": text(network.decoder)} | ids
    fields |= {"embed_dim": 6} if network.embed_dim else {}
    return dataclasses.replace(network, **fields)


@pytest.mark.parametrize("name", ENTRIES)
def test_each_steps_on_the_originals_annotation_files(name: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """The whole step is traced, not compiled: that takes a minute for all of them instead of ten. Its numbers are those
    of the methods' tests."""
    kind: Any = load_experiment(EXPERIMENTS / f"{name}.py")
    (folder / "train.json").write_text(json.dumps(ENTRIES[name]))
    fields = TINY | {"data": str(folder), "images": str(folder), "files": ("train.json",)}
    names = {field.name for field in dataclasses.fields(kind)}
    optional = {"queue": 8, "genome": str(folder), "slots": 2, "answer_length": 5, "warmup": 1, "negative_groups": 1}
    config = kind(**fields, **{key: value for key, value in optional.items() if key in names})
    published = kind.network.fget
    monkeypatch.setattr(kind, "network", property(lambda self: small(published(self), self.tokenizer.vocab_size)))
    batch = next(iter(config.train_data()))
    assert batch.keys() - {"index"} == config.example_batch().keys()
    for column, shape in config.example_batch().items():
        assert (batch[column].shape, batch[column].dtype) == (shape.shape, shape.dtype), column
    method, optimizer = config.method(), config.optimizer()
    state = jax.eval_shape(lambda rng: create_state(method, optimizer, rng, batch), jax.random.key(0))
    after, metrics = jax.eval_shape(functools.partial(train_step, method, optimizer), state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state) and "loss" in metrics
    assert config.save_assets(folder / "run").keys() == {"tokenizer", "preprocess"}
    system, network = config.model()
    assert (
        system == name.split("_")[0]
        and config_from_json(type(network), json.loads(json.dumps(dataclasses.asdict(network))), name) == network
    )


def test_another_number_of_entries_is_refused_with_the_flags(folder: pathlib.Path):
    kind: Any = load_experiment(EXPERIMENTS / "albef_retrieval.py")
    (folder / "train.json").write_text(json.dumps(CAPTIONS))
    config = kind(data=str(folder), images=str(folder), files=("train.json",), batch_size=2, steps=15, examples=7)
    with pytest.raises(MmjaxError, match=r"train.json: 5 entries, .* epochs of 7: --examples 5 --steps 10"):
        config.train_data()


def test_each_epoch_of_blips_pretraining_has_the_next_of_the_rotating_files(folder: pathlib.Path):
    """Three files of 2, 3 and 2 entries beside one of 5: an epoch has 7; also from the middle on."""
    kind: Any = load_experiment(EXPERIMENTS / "blip_pretrain.py")
    (folder / "train.json").write_text(json.dumps(CAPTIONS))
    for i, size in enumerate((2, 3, 2)):
        (folder / f"laion_{i}.json").write_text(json.dumps(CAPTIONS[i : i + size]))
    fields = TINY | {"data": str(folder), "images": str(folder), "files": ("train.json",), "batch_size": 7, "queue": 7}
    fields |= {"rotating": tuple(f"laion_{i}.json" for i in range(3)), "examples": 7}
    pipeline = kind(**fields).train_data()
    assert pipeline.steps_per_epoch == 1 and len(pipeline.source) == 7
    batches = iter(pipeline)
    epochs = [sorted(next(batches)["index"].tolist()) for _ in range(4)]
    assert epochs == [[*range(5), *part] for part in ([5, 6], [7, 8], [9, 10], [5, 6])]
    names = [pipeline.source.record_name(i) for i in (4, 6, 7, 10)]
    files = [("train", 4), ("laion_0", 1), ("laion_1", 0), ("laion_2", 1)]
    assert names == [f"{folder / file}.json[{i}]" for file, i in files]
    again = iter(pipeline)
    again.set_state(batches.get_state() | {"step": 2})
    assert sorted(next(again)["index"].tolist()) == epochs[2]
    with pytest.raises(MmjaxError, match="7 entries, schedules count epochs of 5: --examples 7 --steps 1"):
        kind(**fields | {"examples": 5}).train_data()


def rates(name: str, *steps: int) -> list[float]:
    """Learning rates of a recipe at steps: the updates of a parameter without decay, whose gradient is constant."""
    config: Any = load_experiment(EXPERIMENTS / f"{name}.py")()
    optimizer = config.optimizer()
    params = {"itm_head": {"bias": jax.numpy.ones(1)}}
    values = []
    for step in steps:
        updates, _ = optimizer.update(params, optimizer.init(params), params, {}, jax.numpy.int32(step))
        values.append(-float(updates["itm_head"]["bias"][0]))
    return values


def test_the_published_schedules():
    epoch = 29_699
    first = [1e-5, 1e-5, 1e-5 + 9e-5 / 20, 1e-4]
    cosine = [1e-5 + 0.5 * 9e-5 * (1 + np.cos(np.pi * e / 30)) for e in (1, 29)]
    actual = rates("albef_pretrain", 0, 100, 101, 2_001, epoch, 29 * epoch + 5)
    np.testing.assert_allclose(actual, [*first, *cosine], rtol=1e-4)
    np.testing.assert_allclose(
        rates("albef_retrieval", 5, 4 * 2_213), [1e-5, 1e-6 + 4.5e-6 * (1 + np.cos(np.pi * 0.8))], rtol=1e-4
    )
    schedule = warmup_epoch_decay(3e-4, 8_576, 3_000, 0.9, 1e-6, 1e-6)
    expected = [1e-6, (1e-6 + 3e-4) / 2, 3e-4, 2.7e-4, 3e-4 * 0.9**19, 1e-6]
    steps = (0, 1_500, 5_000, 8_576, 19 * 8_576, 99 * 8_576)
    np.testing.assert_allclose([float(schedule(step)) for step in steps], expected, rtol=1e-5)


def test_blip2s_schedule_decay_and_frozen_encoder():
    """A warmup that an epoch of 867 steps cuts off, then half a cosine; biases and norms do not decay."""
    cosine = [1e-5 + 0.5 * 9e-5 * (1 + np.cos(np.pi * e / 10)) for e in (1, 9)]
    config: Any = load_experiment(EXPERIMENTS / "blip2_stage1.py")()
    actual = [float(config.schedule()(step)) for step in (0, 866, 867, 2 * 867 - 1, 9 * 867)]
    np.testing.assert_allclose(actual, [1e-6, 1e-6 + 9.9e-5 * 866 / 5_000, cosine[0], *cosine], rtol=1e-4)
    optimizer, step = config.optimizer(), jax.numpy.int32(0)
    params = {"queries": np.ones((2, 3)), "temperature": np.ones(()), "bias": np.ones(3)}
    params = {**params, "vision": {"norm": {"scale": np.ones(3)}, "cls": np.ones(3)}}
    trainable, frozen = optimizer.partition.split(jax.tree.map(np.float32, params))
    assert frozen == {"vision": {"cls": frozen["vision"]["cls"]}}
    zeros = jax.tree.map(np.zeros_like, trainable)
    updates, _ = optimizer.update(zeros, optimizer.init(params), trainable, {}, step)
    decayed = jax.tree.map(lambda leaf: bool(np.any(np.asarray(leaf) != 0)), updates)
    assert decayed == {"queries": True, "temperature": True, "bias": False, "vision": {"norm": {"scale": False}}}


def test_the_published_batches_fit_queues_and_processes():
    for name in ENTRIES:
        config: Any = load_experiment(EXPERIMENTS / f"{name}.py")()
        assert config.batch_size % config.groups == 0 and getattr(config, "queue", 0) % config.batch_size == 0
        assert abs(config.steps / config.epoch - config.epochs) < 1e-9, name
