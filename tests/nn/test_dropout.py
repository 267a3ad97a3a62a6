"""Masks: their share, their scale, and one mask for every way to cut the batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn.dropout import Dropout, DropPath, keep_mask
from mmjax.nn.stack import Stack, standard_block

RNG = jax.random.key(5)


def standard_stack(depth, fields, *args, **kwargs):
    return Stack(depth, functools.partial(standard_block, **fields), *args, **kwargs)


def test_share_and_scale():
    x = jnp.ones((7, 11, 503))
    out = np.asarray(Dropout(0.3).apply({}, x, True, rngs={"dropout": RNG}))
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.7], rtol=1e-6)
    n = out.size
    assert abs((out == 0).mean() - 0.3) < 5 * (0.3 * 0.7 / n) ** 0.5
    # Every example has its own mask, and no two are equal.
    assert (np.abs((out == 0).mean((1, 2)) - 0.3) < 5 * (0.3 * 0.7 / (n / 7)) ** 0.5).all()
    assert len({row.tobytes() for row in out}) == 7
    np.testing.assert_array_equal(Dropout(0.3).apply({}, x, False), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, True), x)


@pytest.mark.parametrize("devices", [2, 3, 6])
def test_a_cut_batch_loses_the_same(devices: int):
    whole = keep_mask(RNG, 0.4, (6, 5, 3))
    cut = jax.vmap(lambda _: keep_mask(RNG, 0.4, (6 // devices, 5, 3), "data"), axis_name="data")(jnp.arange(devices))
    np.testing.assert_array_equal(cut.reshape(6, 5, 3), whole)
    assert 0.3 < whole.mean() < 0.9


def test_a_cut_batch_goes_the_same_way_through_an_encoder():
    x = jax.random.normal(jax.random.key(0), (6, 5, 14))
    fields = {"width": 14, "heads": 2, "hidden": 13, "dropout": 0.3, "attention_dropout": 0.2}
    encoder: Any = standard_stack(2, fields, drop_path=0.4)
    variables = jax.jit(encoder.init)(jax.random.key(1), x)
    whole, plain = jax.jit(
        lambda x: (
            encoder.apply(variables, x, train=True, rngs={"dropout": RNG})[-1],
            encoder.apply(variables, x)[-1],
        )
    )(x)
    assert np.abs(whole - plain).max() > 0.1

    def share(x: jax.Array) -> jax.Array:
        mapped: Any = standard_stack(2, fields | {"axis_name": "data"}, drop_path=0.4)
        return mapped.apply(variables, x, train=True, rngs={"dropout": RNG})[-1]

    cut = jax.jit(jax.vmap(share, axis_name="data"))(x.reshape(3, 2, 5, 14))
    np.testing.assert_allclose(cut.reshape(x.shape), whole, atol=2e-6)


def test_dropped_branches_are_independent_of_their_numbers():
    branch = jax.random.normal(jax.random.key(2), (4001, 2, 1))
    out = np.asarray(DropPath(0.25).apply({}, branch, True, rngs={"dropout": RNG}))
    lost = (out == 0).all((1, 2))
    assert abs(lost.mean() - 0.25) < 5 * (0.25 * 0.75 / 4001) ** 0.5
    np.testing.assert_allclose(out[~lost], np.asarray(branch)[~lost] / 0.75, rtol=1e-6)
