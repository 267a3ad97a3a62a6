"""Groups by hand, and the same rows however the batch is cut over devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.nn.groups import cut, group_positions, group_rows, group_totals, take_in_group

CHILD = """
import functools
import jax, jax.numpy as jnp, numpy as np
from mmjax.nn.groups import group_positions, take_in_group

rng = np.random.default_rng(1)
x, weight = (jnp.asarray(rng.normal(size=(16, 3, 5)), jnp.float32) for _ in range(2))
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
for groups in (1, 2, 4, 8, 16):
    positions = jnp.asarray(rng.integers(0, 16 // groups, 16))

    def run(x, weight, positions, axis_name=None, groups=groups):
        value, pull = jax.vjp(lambda x: take_in_group(x, positions, groups, axis_name), x)
        return value, pull(weight)[0], group_positions(len(x), groups, axis_name)

    first = np.arange(16) // (16 // groups) * (16 // groups)
    slopes = np.zeros_like(x)
    np.add.at(slopes, first + np.asarray(positions), np.asarray(weight))
    expected = np.asarray(x)[first + np.asarray(positions)], slopes, np.arange(16) - first
    share = lambda a: a.reshape(8, 2, *a.shape[1:])
    mapped = jax.pmap(functools.partial(run, axis_name="data"), "data")(share(x), share(weight), share(positions))
    placed = jax.jit(run)(*(jax.device_put(a, rows) for a in (x, weight, positions)))
    for got in (jax.jit(run)(x, weight, positions), placed, mapped):
        for one, other in zip(got, expected):
            np.testing.assert_allclose(np.reshape(one, other.shape), other, rtol=1e-6)
print("same")
"""


def test_by_hand():
    x = jnp.arange(6) * 10
    np.testing.assert_array_equal(group_rows(x, 2), [[0, 10, 20], [30, 40, 50]])
    np.testing.assert_array_equal(group_positions(6, 2), [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(take_in_group(x, jnp.array([2, 0, 0, 1, 2, -1]), 2), [20, 0, 0, 40, 50, 50])
    np.testing.assert_array_equal(take_in_group(x, jnp.array([5, 0, 0, 1, 2, 3])), [50, 0, 0, 10, 20, 30])


def test_groups_that_do_not_fit_are_refused():
    for groups in (0, 4, 12):
        with pytest.raises(MmjaxError, match=f"groups={groups} does not cut a global batch of 6 on 1 devices"):
            cut(6, groups)
    with pytest.raises(MmjaxError, match="groups=2 does not cut a global batch of 6 on 3 devices"):
        jax.vmap(lambda x: group_rows(x, 2, "data"), axis_name="data")(jnp.zeros((3, 2)))


def test_one_device_and_eight_take_the_same_rows():
    """In value and gradient; groups = 1, fewer than devices, as many, and more."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "same" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_totals_of_groups_are_the_same_on_any_devices(groups):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 9, (16, 2)))
    expected = np.repeat(np.asarray(x).reshape(groups, -1, 2).sum(1), 16 // groups, 0)
    np.testing.assert_array_equal(group_totals(x, groups), expected)
    cut_up = jax.vmap(lambda part: group_totals(part, groups, "data"), axis_name="data")(x.reshape(4, 4, 2))
    np.testing.assert_array_equal(cut_up.reshape(16, 2), expected)
