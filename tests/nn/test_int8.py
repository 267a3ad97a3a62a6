"""Products with int8 matrices, against the dequantised matrices; and that a loop keeps them in int8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.nn import int8

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 53)).astype(np.float32)
KERNEL = RNG.normal(size=(53, 31)).astype(np.float32) * np.exp(RNG.normal(size=31)).astype(np.float32)


def meant(matrix) -> np.ndarray:
    return np.asarray(matrix.qvalue, np.float32) * np.asarray(matrix.scale)


def test_a_channel_is_rounded_to_steps_of_its_largest():
    for channels, axis in ((1, 0), (0, 1)):
        matrix = int8.quantize(jnp.asarray(KERNEL), channels)
        scale = np.abs(KERNEL).max(axis, keepdims=True) / np.float32(127.5)
        assert matrix.qvalue.dtype == jnp.int8 and matrix.scale.dtype == jnp.float32
        np.testing.assert_allclose(matrix.scale, scale, rtol=1e-6)
        assert np.all(np.abs(meant(matrix) - KERNEL) <= scale * 0.5001)
        assert np.all(np.abs(np.float32(matrix.qvalue)).max(axis) >= 127)
    half = int8.quantize(jnp.asarray(KERNEL, jnp.bfloat16), 1)
    assert half.scale.dtype == jnp.float32  # bfloat16 would move whole channels


@pytest.mark.parametrize("block", [64, 200, 2**16])
def test_products_are_those_with_the_dequantised_matrix(monkeypatch, block):
    monkeypatch.setattr(int8, "BLOCK", block)
    kernel, table = int8.quantize(jnp.asarray(KERNEL), 1), int8.quantize(jnp.asarray(KERNEL.T), 0)
    expected = X @ meant(kernel)
    limit = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(int8.product(X, kernel), expected, atol=limit)
    np.testing.assert_allclose(int8.scores(X, table), X @ meant(table).T, atol=limit)
    np.testing.assert_allclose(int8.scores(X[:, None], table)[:, 0], X @ meant(table).T, atol=limit)
    np.testing.assert_allclose(jax.jit(int8.product)(X, kernel), expected, atol=limit)
    np.testing.assert_array_equal(int8.rows(table, jnp.asarray([[7, 0], [30, 7]])), meant(table)[[[7, 0], [30, 7]]])
    # Rounding moves each weight by half a step at most, so a product by no more than this.
    tolerance = np.abs(X).sum(1, keepdims=True) * np.asarray(kernel.scale) / 2
    assert np.all(np.abs(int8.product(X, kernel) - X @ KERNEL) <= tolerance + limit)


def test_other_backends_have_the_same_products():
    kernel, table = int8.quantize(jnp.asarray(KERNEL), 1), int8.quantize(jnp.asarray(KERNEL.T), 0)
    results = (
        int8._within_loop(int8._plain_product)(X, kernel.qvalue),
        int8._within_loop(int8._plain_scores)(X, table.qvalue),
    )
    for outputs, expected in zip(results, (X @ np.float32(kernel.qvalue), X @ np.float32(table.qvalue).T)):
        np.testing.assert_allclose(outputs, expected, atol=1e-6 * np.abs(expected).max())


def test_half_precision_multiplies_in_float32_and_rounds_the_result():
    kernel = int8.quantize(jnp.asarray(KERNEL), 1)
    x = jnp.asarray(X, jnp.bfloat16)
    outputs = int8.product(x, kernel)
    assert outputs.dtype == jnp.bfloat16
    expected = np.float32(x) @ meant(kernel)
    np.testing.assert_allclose(np.float32(outputs), expected, rtol=2**-8, atol=1e-6 * np.abs(expected).max())
    logits = int8.scores(x, int8.quantize(jnp.asarray(KERNEL.T), 0))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-6 * np.abs(expected).max())


def test_a_gradient_passes_through_a_frozen_matrix():
    kernel, table = int8.quantize(jnp.asarray(KERNEL), 1), int8.quantize(jnp.asarray(KERNEL.T), 0)
    weight = RNG.normal(size=(3, 31)).astype(np.float32)
    for run, matrix, expected in (
        (int8.product, kernel, weight @ meant(kernel).T),
        (int8.scores, table, weight @ meant(table)),
    ):
        grad = jax.jit(jax.grad(lambda x, run=run, matrix=matrix: jnp.sum(run(x, matrix) * weight)))(X)
        np.testing.assert_allclose(grad, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("run", [int8.product, int8.scores])
def test_a_loop_never_holds_the_float_matrix(run):
    matrix = int8.quantize(jnp.ones((512, 512)), 1 if run is int8.product else 0)

    @jax.jit
    def loop(x, matrix):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(run(x, matrix)), x)

    memory = loop.lower(jnp.ones((1, 512)), matrix).compile().memory_analysis()
    assert memory.argument_size_in_bytes < 512 * 512 + 4 * 1024 + 64
    assert memory.temp_size_in_bytes < 2 * 4 * int8.BLOCK < 4 * 512 * 512


def test_without_its_library_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(MmjaxError, match=r"mmjax\[int8\]"):
        int8.quantize(jnp.ones((2, 3)), 1)
