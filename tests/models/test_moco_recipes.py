"""The published recipes of MoCo at full size, without data or devices: shapes, rates, frozen leaves."""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmjax import tree
from mmjax.data.image_folder import ImageFolder
from mmjax.data.pipeline import Pipeline
from mmjax.data.transforms import RandomResizedCrop
from mmjax.data.two_crops import TwoCrops
from mmjax.errors import MmjaxError
from mmjax.recipes.moco import on_device
from mmjax.training.augment import View
from mmjax.training.experiment import load_experiment
from mmjax.training.state import create_state
from mmjax.training.step import train_step

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
NAMES = ("moco_v1_resnet50", "moco_v2_resnet50", "moco_v3_resnet50", "moco_v3_vit_s16")


def recipe(name: str, **fields: Any) -> Any:
    return load_experiment(EXPERIMENTS / f"{name}.py")(**fields)


def moved(config: Any, step: int, leaf: float, gradient: float, ndim: int) -> float:
    """The change of one parameter at a step, as the optimizer's first update without earlier momentum."""
    optimizer = config.optimizer()
    shape = (1,) * ndim
    params = {
        "backbone": {
            "patch": {"projection": {"w": jnp.ones(shape)}},
            "positions": jnp.ones(shape),
            "x": jnp.full(shape, leaf),
        }
    }
    state = optimizer.init(params)
    state = jax.tree_util.tree_map_with_path(
        lambda path, value: jnp.int32(step) if value.dtype == jnp.int32 and path[-1].name == "count" else value, state
    )
    trainable, _ = optimizer.partition.split(params)
    grads = jax.tree.map(jnp.zeros_like, trainable)
    grads["backbone"]["x"] = jnp.full(shape, gradient)
    updates, _ = optimizer.update(grads, state, trainable, {}, jnp.int32(step))
    return float(updates["backbone"]["x"].reshape(()))


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_step_traces_at_full_size(name: str):
    config = recipe(name)
    method, optimizer, batch = config.method(), config.optimizer(), config.example_batch()

    def run(batch: Any) -> Any:
        state = create_state(method, optimizer, jax.random.key(0), batch)
        return state, *train_step(method, optimizer, state, batch)

    before, after, metrics = jax.eval_shape(run, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert metrics.keys() >= {"loss", "contrastive_accuracy", "feature_std"}
    moving = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(optimizer.partition.split(before.params)[0]))
    expected = {"moco_v1_resnet50": 23_770_304, "moco_v2_resnet50": 27_966_656}
    expected |= {"moco_v3_resnet50": 35_058_752, "moco_v3_vit_s16": 42_815_104}
    assert moving == expected[name]
    if "v3" not in name:
        assert before.queues["keys"].keys.shape == (65_536, 128)


@pytest.mark.parametrize(
    ("name", "epoch", "rate"),
    [
        ("moco_v1_resnet50", 0, 0.03),
        ("moco_v1_resnet50", 119.9, 0.03),
        ("moco_v1_resnet50", 120, 0.003),
        ("moco_v1_resnet50", 160, 0.0003),
        ("moco_v2_resnet50", 0.9, 0.03),
        ("moco_v2_resnet50", 50.5, 0.03 * 0.5 * (1 + math.sqrt(0.5))),
        ("moco_v2_resnet50", 100, 0.015),
    ],
)
@pytest.mark.parametrize("ndim", [1, 2])
def test_sgd_at_an_epoch(name: str, epoch: float, rate: float, ndim: int):
    """Decay reaches vectors too."""
    assert recipe(name).epoch == 5_004
    step = round(epoch * 5_004)
    np.testing.assert_allclose(moved(recipe(name), step, 2.0, 0.5, ndim), -rate * (0.5 + 1e-4 * 2), rtol=1e-5)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.0), (5, 4.8), (10, 9.6), (55, 4.8), (32.5, 4.8 * (1 + 0.5**0.5))])
def test_lars_at_an_epoch(epoch: float, rate: float):
    config = recipe("moco_v3_resnet50")
    assert (config.epoch, config.epochs) == (312, 100)
    step = round(epoch * 312)
    np.testing.assert_allclose(moved(config, step, 2.0, 0.5, 1), -rate * 0.5, rtol=1e-5)
    np.testing.assert_allclose(moved(config, step, 2.0, 0.5, 2), -rate * 0.001 * 2, rtol=1e-5)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.0), (20, 1.2e-3), (40, 2.4e-3), (170, 1.2e-3)])
def test_adamw_at_an_epoch(epoch: int, rate: float):
    config = recipe("moco_v3_vit_s16")
    assert (config.epoch, config.epochs) == (312, 300)
    # Moments of zero, corrected for `step` updates before.
    step, g = epoch * 312, 0.5
    mean, square = 0.1 * g / (1 - 0.9 ** (step + 1)), 0.001 * g * g / (1 - 0.999 ** (step + 1))
    expected = -rate * (mean / (math.sqrt(square) + 1e-8) + 0.1 * 2.0)
    np.testing.assert_allclose([moved(config, step, 2.0, g, n) for n in (1, 2)], [expected] * 2, rtol=1e-4)


def test_constants():
    assert [recipe(name).network.temperature for name in NAMES] == [0.07, 0.2, 1.0, 0.2]
    assert [recipe(name).network.momentum for name in NAMES] == [0.999, 0.999, 0.99, 0.99]
    assert [recipe(name).method().method.bn_groups for name in NAMES] == [8, 8, 1, 1]
    assert [recipe(name).method().method.cosine_steps for name in NAMES] == [0, 0, 31_200, 93_600]
    assert [recipe(name).crop_min for name in NAMES] == [0.2, 0.2, 0.2, 0.08]
    assert recipe("moco_v3_vit_s16").network.backbone.heads == 12
    assert recipe("moco_v2_resnet50", steps=4_003_200).epochs == 800


def pictures(folder: pathlib.Path, count: int = 5) -> pathlib.Path:
    rng = np.random.default_rng(0)
    (folder / "n01").mkdir(parents=True)
    for i in range(count):
        pixels = np.kron(rng.integers(0, 256, (5, 7, 3)), np.ones((7, 7, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "n01" / f"{i}.png")
    return folder


def test_two_crops_are_two_draws_of_one_image(tmp_path: pathlib.Path):
    source = ImageFolder(pictures(tmp_path))
    crops = TwoCrops(RandomResizedCrop(11, (0.2, 1.0)))
    rng, again = np.random.default_rng(7), np.random.default_rng(7)
    outputs = crops.random_map(source[0], rng)
    assert outputs.keys() == {"view_1", "view_2", "label", "text"}
    one = RandomResizedCrop(11, (0.2, 1.0))
    for name in ("view_1", "view_2"):
        np.testing.assert_array_equal(outputs[name], one.random_map(source[0], again)["image"])
    assert (outputs["view_1"] != outputs["view_2"]).any()
    batch = next(iter(Pipeline(source, 3, transforms=(crops,))))
    assert batch["view_1"].shape == batch["view_2"].shape == (3, 11, 11, 3) and batch["view_1"].dtype == np.uint8


def test_data_is_checked(tmp_path: pathlib.Path):
    with pytest.raises(MmjaxError, match="--data"):
        recipe("moco_v2_resnet50").train_data()
    folder = str(pictures(tmp_path / "train"))
    with pytest.raises(MmjaxError, match=r"holds 5 images.*--images 5"):
        recipe("moco_v2_resnet50", data=folder).train_data()
    config = recipe("moco_v3_vit_s16", data=folder, images=5, batch_size=2, size=13, workers=0)
    assert config.train_data().steps_per_epoch == config.epoch == 2
    assert next(iter(config.train_data()))["view_2"].shape == (2, 13, 13, 3)


def test_the_device_leaves_crops_where_they_are():
    """Without colour, blur and flip a view is the normalised crop."""
    views = {
        name: np.random.default_rng(i).integers(0, 256, (2, 11, 11, 3), np.uint8)
        for i, name in enumerate(("view_1", "view_2"))
    }
    plain, flipped = View(11, flip_p=0.0), View(11, flip_p=1.0)
    outputs = on_device(plain, flipped)(jax.random.split(jax.random.key(0), 2), jax.tree.map(jnp.asarray, views))
    mean, std = np.asarray(plain.mean), np.asarray(plain.std)
    np.testing.assert_allclose(outputs["view_1"], (views["view_1"] / 255 - mean) / std, atol=1e-5)
    np.testing.assert_allclose(outputs["view_2"], (views["view_2"][:, :, ::-1] / 255 - mean) / std, atol=1e-5)
    same = {"view_1": views["view_1"], "view_2": views["view_1"]}
    random = on_device(View.moco_v2(11), View.moco_v2(11))(jax.random.split(jax.random.key(1), 2), same)
    assert tree.flatten(random).keys() == same.keys() and np.abs(random["view_1"] - random["view_2"]).max() > 0.1
