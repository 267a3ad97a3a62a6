"""Interpolation of position tables against torch and scipy, and fixed tables by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.nn.positions import interpolate, sincos_2d

OLD = (5, 7)
SIZES = [(3, 11), (13, 2), (10, 14), (1, 1), (6, 8)]
TORCH = {
    "bicubic": {"mode": "bicubic"},
    "bicubic_antialias": {"mode": "bicubic", "antialias": True},
    "bilinear": {"mode": "bilinear"},
    "dinov2": {"mode": "bicubic"},
}


@pytest.fixture
def table():
    return jnp.asarray(np.random.default_rng(59).normal(size=(1, 2 + 35, 3)), jnp.float32)


@pytest.mark.torch
@pytest.mark.parametrize("rule", TORCH)
@pytest.mark.parametrize("new", SIZES)
def test_torch_has_the_same_rules(table, rule, new):
    torch = pytest.importorskip("torch")
    grid = torch.tensor(np.array(table[:, 2:])).reshape(1, *OLD, 3).permute(0, 3, 1, 2)
    size = {"size": new}
    if rule == "dinov2":
        size = {"scale_factor": tuple((n + 0.1) / o for n, o in zip(new, OLD))}
    reference = torch.nn.functional.interpolate(grid, **size, **TORCH[rule]).permute(0, 2, 3, 1).reshape(1, -1, 3)
    actual = interpolate(table, OLD, new, rule, prefix=2)
    np.testing.assert_array_equal(actual[:, :2], table[:, :2])
    np.testing.assert_allclose(actual[:, 2:], reference.numpy(), atol=1e-5)


@pytest.mark.parametrize("new", [*SIZES, (5, 3)])
def test_scipy_zooms_the_same(table, new):
    ndimage = pytest.importorskip("scipy.ndimage")
    grid = np.array(table[0, 2:]).reshape(*OLD, 3)
    reference = ndimage.zoom(grid, (new[0] / OLD[0], new[1] / OLD[1], 1), order=1).reshape(-1, 3)
    actual = interpolate(table[0], OLD, new, "endpoints", prefix=2)
    np.testing.assert_allclose(actual[2:], reference, atol=1e-5)


@pytest.mark.parametrize("rule", ["bicubic", "bicubic_antialias", "bilinear", "endpoints", "dinov2"])
def test_one_grid_is_itself_a_constant_stays_and_jit_agrees(table, rule):
    assert interpolate(table, OLD, OLD, rule, prefix=2) is table
    flat = interpolate(jnp.full((35, 2), 3.0), OLD, (11, 4), rule)
    np.testing.assert_allclose(flat, np.full((44, 2), 3.0), rtol=1e-6)
    compiled = jax.jit(lambda x: interpolate(x, OLD, (4, 9), rule, prefix=2))(table)
    np.testing.assert_allclose(compiled, interpolate(table, OLD, (4, 9), rule, prefix=2), atol=1e-6)


def test_two_points_by_hand():
    line = jnp.array([[0.0], [4.0]])

    def values(rule, n):
        return interpolate(line, (1, 2), (1, n), rule)[:, 0]

    np.testing.assert_allclose(values("bilinear", 4), [0, 1, 3, 4], atol=1e-6)
    np.testing.assert_allclose(values("endpoints", 3), [0, 2, 4], atol=1e-6)
    np.testing.assert_allclose(values("bicubic", 1), [2], atol=1e-6)


def test_tables_that_do_not_fit_are_refused(table):
    with pytest.raises(MmjaxError, match="a table of 37 positions is not 1 and a grid of 5 x 7"):
        interpolate(table, OLD, (3, 3), "bicubic", prefix=1)
    with pytest.raises(MmjaxError, match="rule 'nearest'"):
        interpolate(table, OLD, (3, 3), "nearest", prefix=2)  # type: ignore[arg-type]
    with pytest.raises(MmjaxError, match="width 10"):
        sincos_2d((2, 3), 10, "moco_v3")


def test_fixed_tables_by_hand():
    v3, bv = sincos_2d((2, 3), 12, "moco_v3"), sincos_2d((2, 3), 12, "big_vision")
    assert v3.shape == bv.shape == (1, 6, 12)
    row, column, omega = 1, 2, np.array([1, 10000 ** (-1 / 3), 10000 ** (-2 / 3)])
    expected = [np.sin(row * omega), np.cos(row * omega), np.sin(column * omega), np.cos(column * omega)]
    np.testing.assert_allclose(v3[0, 5], np.concatenate(expected), atol=1e-6)
    omega = np.array([1, 0.01, 0.0001])
    expected = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
    np.testing.assert_allclose(bv[0, 5], np.concatenate(expected), atol=1e-6)
