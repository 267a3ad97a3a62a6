"""Recipes over borrowed language models are planned at published sizes without files."""

import pathlib
from typing import Any

import jax
import pytest

from mmjax.errors import MmjaxError
from mmjax.training.experiment import load_experiment
from mmjax.training.state import create_state
from mmjax.tree import flatten

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"


def counts(config: Any) -> tuple[int, int]:
    """Parameters of the state of a recipe, and those that are trained; only shapes are computed."""
    method, optimizer = config.method(), config.optimizer()
    state: Any = jax.eval_shape(
        lambda rng, batch: create_state(method, optimizer, rng, batch), jax.random.key(0), config.example_batch()
    )
    trained, _ = optimizer.partition.split(state.params)
    total, active = (sum(leaf.size for leaf in flatten(params).values()) for params in (state.params, trained))
    return total, active


def test_llava_and_its_adapters():
    recipe: Any = load_experiment(EXPERIMENTS / "llava_finetune.py")
    total, trained = counts(recipe(size="7b"))
    assert (total, trained) == (7_062_902_784, 6_738_415_616 + 20_979_712)
    # Rank 128 on seven matrices of each of 32 blocks: 4096 x 4096 four times, 4096 x 11008 three times; 224 factors.
    adapters = 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11_008))
    total, trained = counts(recipe(size="7b", tune="lora"))
    assert (total, trained) == (7_062_902_784 + adapters + 224, adapters + 20_979_712)
    assert recipe(size="13b").example_batch()["image"].shape == (128, 1, 336, 336, 3)
    with pytest.raises(MmjaxError, match="size=7b is for plans without files"):
        recipe(size="7b", init_from="run")
    with pytest.raises(MmjaxError, match="--data FILE"):
        recipe(size="7b").train_data()


def test_flamingo():
    recipe: Any = load_experiment(EXPERIMENTS / "flamingo_pretrain.py")
    config = recipe(size="9b", batch_size=64)
    _, trained = counts(config)
    # Resampler and cross attention (tests/models/test_flamingo.py), and the three added ids.
    assert trained == 1_178_834_960 + 3 * 4096
    batch = config.example_batch()
    assert batch["documents_image"].shape == (64, 6, 224, 224, 3) and batch["pairs_input_ids"].shape == (128, 32)
    with pytest.raises(MmjaxError, match="size=9b is for plans without files"):
        config.train_data()
