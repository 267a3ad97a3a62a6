"""ALBEF's rates and weight decay, against the original's rules written out again."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.training.optimizer import Optimizer, adamw, all_but_vectors, blockwise_warmup_cosine

RECIPES = {
    "pretraining": (1e-4, 1e-5, 1e-5, 30, 20),
    "assignment": (2e-5, 1e-5, 1e-5, 1, 1),
    "coco": (1e-5, 1e-5, 1e-6, 5, 1),
    "flickr30k": (1e-5, 1e-5, 1e-6, 10, 1),
    "vqa": (2e-5, 1e-5, 1e-6, 8, 4),
    "nlvr2": (2e-5, 1e-5, 1e-6, 10, 1),
    "snli_ve": (2e-5, 1e-5, 1e-6, 5, 1),
    "refcoco": (1e-5, 1e-5, 1e-6, 5, 1),
}
"""The highest rate, warmup_lr, min_lr, epochs, warmup_epochs of each run's configuration."""


def as_the_scripts_do(
    peak: float, start: float, end: float, epochs: int, warmup: int, steps_per_epoch: int
) -> np.ndarray:
    """The rate of every optimizer step: a scheduler that is called now and then, and a constant rate in between."""

    def at(time: int) -> float:
        if time < warmup:
            return start + time * (peak - start) / warmup
        time -= warmup
        return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * time / epochs)) if time < epochs else end

    rate, taken = start, []
    for epoch in range(epochs):
        if epoch > 0:
            rate = at(epoch + warmup)
        for i in range(steps_per_epoch):
            taken.append(rate)
            if epoch == 0 and i % 100 == 0 and i <= warmup * 100:
                rate = at(i // 100)
    return np.array(taken)


@pytest.mark.parametrize("steps_per_epoch", [7, 150, 2300])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_steps_rate_is_the_originals(recipe: str, steps_per_epoch: int):
    """Also where the first epoch is over before the warm-up is."""
    peak, start, end, epochs, warmup = RECIPES[recipe]
    expected = as_the_scripts_do(peak, start, end, epochs, warmup, steps_per_epoch)
    schedule = blockwise_warmup_cosine(peak, epochs, steps_per_epoch, warmup, start, end)
    actual = jax.jit(jax.vmap(schedule))(jnp.arange(len(expected)))
    np.testing.assert_allclose(actual, expected, rtol=2e-6)
    np.testing.assert_allclose(schedule(len(expected)), end, rtol=2e-6)


def test_stairs_by_hand():
    """Of pre-training: 4.5e-6 a stair; a late epoch; and the last one, which is above the least rate."""
    schedule = blockwise_warmup_cosine(1e-4, 30, 2300, 20, 1e-5, 1e-5)
    rates = [float(schedule(step)) for step in (0, 100, 101, 200, 201, 2000, 2001, 2299, 15 * 2300, 29 * 2300)]
    last = 1e-5 + 4.5e-5 * (1 - math.cos(math.pi / 30))
    expected = [1e-5, 1e-5, 1.45e-5, 1.45e-5, 1.9e-5, 9.55e-5, 1e-4, 1e-4, 5.5e-5, last]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert last > 1.02e-5


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"steps_per_epoch": 0}, {"warmup": -1}])
def test_numbers_that_make_no_schedule_are_refused(wrong: dict[str, int]):
    with pytest.raises(MmjaxError, match=next(iter(wrong))):
        blockwise_warmup_cosine(1e-4, **{"epochs": 3, "steps_per_epoch": 5, **wrong})


def test_all_but_vectors_decay():
    """Class token, positions, tables and temperature do, as in ALBEF; without a gradient a step is the decay alone."""
    shapes = {"cls": (1, 1, 3), "positions": (1, 5, 3), "words": (7, 3), "temperature": (), "bias": (3,), "scale": (3,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    optimizer = Optimizer(adamw(0.5, 0.02, mask=all_but_vectors))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params, {}, jnp.int32(0))
    moved = {name for name, update in updates.items() if np.allclose(update, -0.01, rtol=1e-5)}
    assert moved == {"cls", "positions", "words", "temperature"}
    assert not any(np.asarray(updates[name]).any() for name in shapes.keys() - moved)
