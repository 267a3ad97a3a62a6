"""Batch normalisation: torch's numbers, groups by hand, the same statistics however a batch is cut over devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.nn.batch_norm import BatchNorm, batch_normalise

CHILD = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from mmjax.nn.batch_norm import BatchNorm

rng = np.random.default_rng(1)
x = jnp.asarray(rng.normal(3, 2, (16, 3, 5, 7)), jnp.float32)
weight = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
params = {"scale": jnp.asarray(rng.normal(size=7), jnp.float32), "bias": jnp.asarray(rng.normal(size=7), jnp.float32)}
stats = {"mean": jnp.ones(7), "var": jnp.full(7, 2.0), "count": jnp.int32(4)}


def gradients(groups, axis_name, params, x, weight):
    def loss(params, x):
        module = BatchNorm(groups=groups, axis_name=axis_name)
        y, new = module.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.sum(y * weight), (y, new["batch_stats"])

    (_, aux), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    if axis_name is not None:
        grads = (jax.lax.psum(grads[0], axis_name), grads[1])
    return *aux, *grads


cut = lambda a: a.reshape(8, 2, *a.shape[1:])
for groups in (1, 2, 4, 8, 16):
    one = jax.jit(functools.partial(gradients, groups, None))(params, x, weight)
    mapped = jax.pmap(functools.partial(gradients, groups, "data"), "data", in_axes=(None, 0, 0))
    many = mapped(params, cut(x), cut(weight))
    y, new, d_params, dx = many
    for copy in range(8):
        mine = jax.tree.map(lambda a: a[copy], (new, d_params))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), mine, one[1:3])
    np.testing.assert_allclose(y.reshape(x.shape), one[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(dx.reshape(x.shape), one[3], rtol=2e-5, atol=2e-5)
print("same")
"""


def draw(*shape, seed=0, mean=0.0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, 2, shape), jnp.float32)


def run(module, x, stats=None, params=None):
    c = x.shape[-1]
    params = params or {"scale": draw(c, seed=1), "bias": draw(c, seed=2)}
    stats = stats or {"mean": jnp.zeros(c), "var": jnp.ones(c), "count": jnp.int32(0)}
    return module.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])


def test_values_by_hand():
    x = jnp.array([[1.0], [2.0], [6.0]])
    params = {"scale": jnp.array([2.0]), "bias": jnp.array([5.0])}
    y, new = run(BatchNorm(epsilon=1.0), x, params=params)
    var = (4 + 1 + 9) / 3
    np.testing.assert_allclose(y[:, 0], 5 + 2 * np.array([-2, -1, 3]) / np.sqrt(var + 1), rtol=1e-6)
    assert float(new["batch_stats"]["mean"][0]) == pytest.approx(0.3)
    assert float(new["batch_stats"]["var"][0]) == pytest.approx(0.9 + 0.1 * 7)
    assert int(new["batch_stats"]["count"]) == 1


def test_each_group_is_normalised_alone_and_the_running_statistics_are_their_mean():
    x = draw(6, 5, 3, 7, mean=1)
    y, new = run(BatchNorm(groups=3), x)
    parts = [run(BatchNorm(), part) for part in jnp.split(x, 3)]
    np.testing.assert_allclose(y, jnp.concatenate([part[0] for part in parts]), rtol=1e-5, atol=1e-6)
    for name in ("mean", "var"):
        means = np.mean([part[1]["batch_stats"][name] for part in parts], 0)
        np.testing.assert_allclose(new["batch_stats"][name], means, rtol=1e-5, atol=1e-6)
    assert int(new["batch_stats"]["count"]) == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_of_the_plain_formula(groups):
    x, scale, bias, weight = draw(4, 3, 5, seed=3), draw(5, seed=4), draw(5, seed=5), draw(4, 3, 5, seed=6)

    def plain(x, scale, bias):
        rows = x.reshape(groups, -1, 5)
        normal = (rows - rows.mean(1, keepdims=True)) / jnp.sqrt(rows.var(1, keepdims=True) + 1e-5)
        return jnp.sum((normal * scale + bias).reshape(x.shape) * weight)

    def fused(x, scale, bias):
        return jnp.sum(batch_normalise(x, scale, bias, groups=groups)[0] * weight)

    for one, other in zip(
        jax.jit(jax.grad(fused, (0, 1, 2)))(x, scale, bias), jax.grad(plain, (0, 1, 2))(x, scale, bias)
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_a_large_mean_does_not_cancel():
    x = draw(64, 3, mean=0) * 0.01 + 1000
    y, _ = run(BatchNorm(use_scale=False, use_bias=False), x, params={"unused": jnp.zeros(1)})
    np.testing.assert_allclose(y.std(0), jnp.ones(3), rtol=0.1)


def test_eval_uses_and_keeps_the_running_statistics():
    x = draw(2, 3, 5)
    stats = {"mean": draw(5, seed=7), "var": jnp.abs(draw(5, seed=8)) + 0.5, "count": jnp.int32(3)}
    params = {"scale": draw(5, seed=1), "bias": draw(5, seed=2)}
    y, new = run(BatchNorm(use_running_average=True), x, stats, params)
    expected = (x - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert all(np.array_equal(new["batch_stats"][name], stats[name]) for name in stats)


def test_initialising_does_not_touch_the_statistics():
    variables = BatchNorm().init(jax.random.key(0), draw(3, 5, mean=9))
    assert not variables["batch_stats"]["mean"].any() and int(variables["batch_stats"]["count"]) == 0
    assert (variables["batch_stats"]["var"] == 1).all()


def test_bfloat16_keeps_its_statistics_in_float32():
    x = draw(64, 5, mean=3).astype(jnp.bfloat16)
    y, new = run(BatchNorm(), x)
    wide, same = run(BatchNorm(), x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16 and new["batch_stats"]["var"].dtype == jnp.float32
    np.testing.assert_allclose(new["batch_stats"]["var"], same["batch_stats"]["var"], rtol=1e-6)
    np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=2**-7, atol=2**-7)


def test_groups_that_do_not_fit_are_refused():
    for groups in (0, 4):
        with pytest.raises(MmjaxError, match=f"groups={groups}"):
            run(BatchNorm(groups=groups), draw(6, 5))


def test_one_device_and_eight_have_the_same_statistics_and_gradients():
    """groups = 1, fewer than devices (several devices a group), as many, and more."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 and "same" in done.stdout, done.stderr[-3000:]


@pytest.mark.torch
def test_torch_has_the_same_outputs_statistics_and_gradients():
    torch = pytest.importorskip("torch")
    torch_norm = torch.nn.BatchNorm2d(5)
    params = {"scale": draw(5, seed=1), "bias": draw(5, seed=2)}
    with torch.no_grad():
        torch_norm.weight.copy_(torch.tensor(np.asarray(params["scale"])))
        torch_norm.bias.copy_(torch.tensor(np.asarray(params["bias"])))
    stats = None
    for step in range(3):
        x, weight = draw(3, 7, 11, 5, seed=10 + step, mean=2), draw(3, 7, 11, 5, seed=20 + step)

        def loss(params, x, stats=stats, weight=weight):
            y, new = run(BatchNorm(), x, stats, params)
            return jnp.sum(y * weight), (y, new["batch_stats"])

        (_, (y, stats)), (d_params, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        image = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).requires_grad_()
        out = torch_norm(image)
        torch_norm.zero_grad()
        (out * torch.tensor(np.asarray(weight)).permute(0, 3, 1, 2)).sum().backward()
        pairs = [
            (y, out.detach().permute(0, 2, 3, 1)),
            (dx, image.grad.permute(0, 2, 3, 1)),
            (d_params["scale"], torch_norm.weight.grad),
            (d_params["bias"], torch_norm.bias.grad),
            (stats["mean"], torch_norm.running_mean),
            (stats["var"], torch_norm.running_var),
        ]
        for actual, reference in pairs:
            reference = reference.numpy()
            np.testing.assert_allclose(actual, reference, rtol=0, atol=1e-5 * np.abs(reference).max())
        assert int(stats["count"]) == int(torch_norm.num_batches_tracked) == step + 1
