"""The recipes of ImageNet classifiers: at full size without data, at small size with data."""

import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmjax.errors import MmjaxError
from mmjax.training.experiment import load_experiment, parse_overrides
from mmjax.training.method import Augmented
from mmjax.training.state import create_state
from mmjax.training.step import train_step

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
NEWER = (
    "--steps 750600 --batch_size 1024 --size 176 --resize 232 --learning_rate 0.5 --schedule cosine --warmup_epochs 5 "
    "--weight_decay 2e-5 --no-decay_norms --label_smoothing 0.1 --mixup 0.2 --cutmix 1.0 --trivial_augment "
    "--random_erasing 0.1 --weight_ema 0.99997"
)


def recipe(name: str, **fields: Any) -> Any:
    return load_experiment(EXPERIMENTS / f"{name}_imagenet.py")(**fields)


def newer() -> Any:
    return parse_overrides(load_experiment(EXPERIMENTS / "resnet_50_imagenet.py"), NEWER.split())


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(recipe("resnet_50"), 25_557_032), (newer(), 25_557_032), (recipe("vit_augreg"), 86_567_656 + 768 * 769)],
    ids=["resnet50", "resnet50 newer", "vit"],
)
def test_the_whole_step_traces_at_full_size(config: Any, parameters: int):
    method, optimizer, batch = config.method(), config.optimizer(), config.example_batch()

    def run(batch: Any) -> Any:
        state = create_state(method, optimizer, jax.random.key(0), batch)
        return state, *train_step(method, optimizer, state, batch)

    before, after, metrics = jax.eval_shape(run, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(before.params)) == parameters
    assert metrics.keys() >= {"loss", "accuracy"}
    assert bool(before.ema) == (config.batch_size == 1024)


def test_the_newer_recipe_is_its_command_line():
    """The command line is in the experiment's docstring."""
    docstring = (EXPERIMENTS / "resnet_50_imagenet.py").read_text().split('"""')[1]
    assert NEWER.split() == docstring[docstring.index("--steps") : docstring.index("Batch norm")].split()
    config = newer()
    method = config.method()
    assert isinstance(method, Augmented) and method.augment.p == 0.1  # type: ignore[attr-defined]
    assert config.classification.mixing.hparams.keys() == {"mixup", "cutmix"}
    assert [type(one).__name__ for one in config.host_transforms()] == ["TrivialAugmentWide", "RandomFlip"]
    assert (config.preprocess.resize, config.preprocess.crop) == (232, (224, 224))
    assert (config.epoch, config.epochs) == (1_251, 600)


@pytest.mark.parametrize(
    ("config", "epoch", "rate"),
    [
        (recipe("resnet_50"), 0, 0.1),
        (recipe("resnet_50"), 29.9, 0.1),
        (recipe("resnet_50"), 30, 0.01),
        (recipe("resnet_50"), 89, 0.001),
        (newer(), 0.9, 0.005),
        (newer(), 1, 0.5 * (0.01 + 0.99 / 5)),
        (newer(), 5.5, 0.5),
        (newer(), 5 + 595 / 5, 0.25 * (1 + math.cos(math.pi / 5))),
    ],
)
def test_resnet_rates_at_an_epoch(config: Any, epoch: float, rate: float):
    np.testing.assert_allclose(config.rate()(round(epoch * config.epoch)), rate, rtol=1e-5)


def first_update(config: Any, params: Any, gradient: float) -> Any:
    optimizer = config.optimizer()
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), params)
    return optimizer.update(grads, optimizer.init(params), params, {}, jnp.int32(0))[0]


def test_what_decays():
    params = {
        "stem_bn": {"scale": jnp.full(1, 2.0)},
        "head": {"bias": jnp.full(1, 2.0), "kernel": jnp.full((1, 1), 2.0)},
    }
    classic = first_update(recipe("resnet_50"), params, 0.5)
    np.testing.assert_allclose(jax.tree.leaves(jax.tree.map(jnp.squeeze, classic)), -0.1 * (0.5 + 1e-4 * 2), rtol=1e-5)
    late = first_update(newer(), params, 0.5)
    np.testing.assert_allclose(late["stem_bn"]["scale"], -0.005 * 0.5, rtol=1e-6)
    for leaf in late["head"].values():
        np.testing.assert_allclose(leaf.squeeze(), -0.005 * (0.5 + 2e-5 * 2), rtol=1e-6)


def test_vit_decay_follows_the_schedule_and_reaches_kernels_alone():
    """big_vision's decay of 1e-4 times the schedule, at its peak: the rate does not multiply it."""
    config = recipe("vit_augreg", warmup=0, steps=10**9)
    params = {name: jnp.full((1, 1), 2.0) for name in ("cls", "positions")} | {
        "head": {"kernel": jnp.full((1, 1), 2.0)}
    }
    moved = first_update(config, params, 1e-3)
    np.testing.assert_allclose(moved["cls"], [[-1e-3]], rtol=1e-3)
    np.testing.assert_allclose(moved["positions"], [[-1e-3]], rtol=1e-3)
    np.testing.assert_allclose(moved["head"]["kernel"], [[-1e-3 - 1e-4 * 2]], rtol=1e-3)


def test_vit_constants():
    config = recipe("vit_augreg")
    assert (config.epoch, config.steps, config.optimizer().clip_norm) == (312, 93_600, 1.0)
    assert (config.network.pool, config.network.representation, config.network.act) == ("token", 768, "gelu_tanh")
    assert config.classification.mixing.mixup == 0.5 and config.classification.mixing.keep_larger
    assert config.host_transforms()[0].magnitude == 15
    assert (config.preprocess.resize, config.preprocess.crop) == (256, (224, 224))
    small = recipe("vit_augreg", variant="S/16", augment="none", objective="sigmoid", drop_path=0.1)
    assert (small.network.width, small.network.head_bias, small.network.drop_path) == (384, -6.9, 0.1)
    assert len(small.host_transforms()) == 1 and not small.classification.mixing


def pictures(root: pathlib.Path) -> str:
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for name in ("n01", "n02"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.kron(rng.integers(0, 256, (5, 7, 3)), np.ones((7, 7, 1))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(root)


def test_data_is_checked(tmp_path: pathlib.Path):
    with pytest.raises(MmjaxError, match="--data"):
        recipe("resnet_50").train_data()
    folder = pictures(tmp_path / "data")
    with pytest.raises(MmjaxError, match=r"holds 10 images.*--images 10"):
        recipe("resnet_50", data=folder).train_data()
    with pytest.raises(MmjaxError, match=r"holds 2 classes.*--classes 2"):
        recipe("vit_augreg", data=folder, images=10).evaluations()


def test_batches_and_evaluation_come_from_a_folder(tmp_path: pathlib.Path):
    """Crops and RandAugment on the host; all of `val`, resized and cropped, is evaluated."""
    fields: Any = {"data": pictures(tmp_path / "data"), "images": 10, "classes": 2, "size": 28, "workers": 0}
    config = recipe("vit_augreg", batch_size=5, **fields)
    train_data = config.train_data()
    batch = next(iter(train_data))
    assert (
        batch["image"].shape == (5, 28, 28, 3) and batch["image"].dtype == np.uint8 and train_data.steps_per_epoch == 2
    )
    (evaluation,) = config.evaluations()
    evaluated = next(iter(evaluation.images))
    np.testing.assert_array_equal(evaluated["label"], [0, 0, 1, 1])
    picture = tmp_path / "data" / "val" / "n02" / "1.png"
    np.testing.assert_array_equal(evaluated["image"][3], config.preprocess.to_uint8(Image.open(picture)))
    assert config.save_assets(tmp_path)["preprocess"]["resize"] == 32
    assert json.loads((tmp_path / "labels.json").read_text()) == ["n01", "n02"]
