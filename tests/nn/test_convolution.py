"""Convolution and pooling against XLA's own and torch's: values, gradients, vmap, loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mmjax.errors import MmjaxError
from mmjax.nn.convolution import Conv, avg_pool, conv, max_pool

CASES = {
    "3x3": ((2, 11, 13, 5), (3, 3, 5, 7), {"padding": 1}),
    "3x3 valid": ((2, 11, 13, 5), (3, 3, 5, 7), {}),
    "3x3 / 2": ((2, 11, 13, 5), (3, 3, 5, 7), {"padding": 1, "strides": 2}),
    "3x3 / 2 even": ((2, 12, 14, 5), (3, 3, 5, 7), {"padding": 1, "strides": 2}),
    "3x3 / 3, rows unused": ((2, 13, 11, 5), (2, 3, 5, 7), {"strides": 3}),
    "stem": ((2, 23, 22, 3), (7, 7, 3, 11), {"padding": 3, "strides": 2}),
    "stem on one channel": ((2, 17, 19, 1), (5, 3, 1, 7), {"padding": (2, 1), "strides": (2, 1)}),
    "1x1": ((3, 5, 7, 11), (1, 1, 11, 13), {}),
    "1x1 / 2": ((3, 5, 7, 11), (1, 1, 11, 13), {"strides": 2}),
    "1x1 padded": ((3, 5, 7, 11), (1, 1, 11, 13), {"padding": 1}),
    "groups": ((2, 11, 13, 15), (3, 3, 3, 10), {"padding": 1, "groups": 5}),
    "groups / 2": ((2, 11, 13, 15), (3, 3, 3, 10), {"padding": 1, "groups": 5, "strides": 2}),
    "depthwise": ((2, 7, 5, 11), (3, 3, 1, 11), {"padding": 1, "groups": 11}),
    "1x1 groups": ((2, 7, 5, 6), (1, 1, 3, 10), {"groups": 2}),
    "dilation": ((2, 11, 13, 5), (3, 3, 5, 7), {"padding": 2, "dilation": 2}),
    "dilation / 2": ((2, 17, 13, 5), (3, 3, 5, 7), {"padding": 3, "dilation": (3, 2), "strides": 2}),
    "wide padding": ((2, 5, 7, 3), (3, 2, 3, 5), {"padding": 3}),
    "stem, odd width": ((2, 23, 21, 3), (7, 7, 3, 11), {"padding": 3, "strides": 2}),
    "stem, even kernel": ((2, 22, 24, 3), (4, 6, 3, 11), {"padding": 1, "strides": (1, 2)}),
    "few rows": ((3, 4, 5, 7), (3, 3, 7, 31), {"padding": 1}),
    "few rows / 2": ((3, 5, 4, 7), (3, 3, 7, 31), {"padding": 1, "strides": 2}),
    "few rows, dilation": ((2, 5, 7, 5), (3, 2, 5, 31), {"padding": 2, "dilation": 2, "strides": (2, 1)}),
    "few rows, groups": ((2, 2, 2, 6), (3, 3, 2, 21), {"padding": 1, "groups": 3}),
    "window of the whole": ((2, 3, 5, 7), (3, 5, 7, 11), {}),
}


def reference(x, kernel, strides=1, padding=0, groups=1, dilation=1):
    pair = lambda value: (value, value) if isinstance(value, int) else value  # noqa: E731
    return lax.conv_general_dilated(
        x,
        kernel,
        pair(strides),
        [(p, p) for p in pair(padding)],
        rhs_dilation=pair(dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def close(actual, expected, limit=2e-6):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit * float(jnp.abs(expected).max()))


def with_gradients(function, options, x, kernel):
    """(y, dx, dkernel) of a loss with a different weight at each output."""
    y, pull = jax.vjp(lambda x, kernel: function(x, kernel, **options), x, kernel)
    return y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_xla(name):
    x_shape, kernel_shape, options = CASES[name]
    x, kernel = draw(1, x_shape, kernel_shape)
    actual = jax.jit(lambda x, kernel: with_gradients(conv, options, x, kernel))(x, kernel)
    for one, other in zip(actual, with_gradients(reference, options, x, kernel)):
        close(one, other)


@pytest.mark.parametrize("name", ["3x3 / 2", "stem", "1x1 / 2", "groups", "dilation", "few rows / 2"])
def test_arms_mapped_in_any_way_equal_arms_alone(name):
    x_shape, kernel_shape, options = CASES[name]
    xs, kernels = draw(2, (3, *x_shape), (3, *kernel_shape))
    alone = [with_gradients(conv, options, x, kernel) for x, kernel in zip(xs, kernels)]
    stacked = [jnp.stack(parts) for parts in zip(*alone)]

    def one(x, kernel):
        return with_gradients(conv, options, x, kernel)

    for mapped in (jax.vmap(one)(xs, kernels), lax.map(lambda pair: one(*pair), (xs, kernels))):
        for actual, expected in zip(mapped, stacked):
            close(actual, expected)
    shared = jax.vmap(one, (None, 0))(xs[0], kernels)
    for index in range(3):
        for actual, expected in zip(shared, one(xs[0], kernels[index])):
            close(actual[index], expected)
    images = jax.vmap(one, (0, None))(xs, kernels[0])
    for index in range(3):
        for actual, expected in zip(images, one(xs[index], kernels[0])):
            close(actual[index], expected)


def test_nothing_but_the_fast_form_is_lowered_under_vmap_and_grad():
    """No convolution with groups, nor one whose dimensions are exchanged: those are the slow ones."""
    xs, kernels = draw(3, (4, 2, 11, 13, 5), (4, 3, 3, 5, 7))
    loss = lambda x, kernel: jnp.sum(conv(x, kernel, strides=2, padding=1) ** 2)  # noqa: E731
    text = jax.jit(jax.vmap(jax.grad(loss, (0, 1)))).lower(xs, kernels).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(lines) >= 2
    assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line for line in lines)
    assert "feature_group_count = 3" not in text and "batch_group_count = 4" not in text


def test_bfloat16_is_computed_in_float32_and_rounded():
    x, kernel = draw(5, (2, 7, 5, 3), (3, 3, 3, 5))
    actual = conv(x.astype(jnp.bfloat16), kernel, padding=1)
    rounded = [array.astype(jnp.bfloat16).astype(jnp.float32) for array in (x, kernel)]
    assert actual.dtype == jnp.bfloat16
    close(actual.astype(jnp.float32), reference(*rounded, padding=1), 2**-8)


def test_unsupported_arguments_are_refused():
    x, kernel = draw(6, (2, 7, 5, 3), (3, 3, 3, 5))
    with pytest.raises(MmjaxError, match="groups=3 does not fit"):
        conv(x, kernel, groups=3)
    with pytest.raises(MmjaxError, match="larger than x"):
        conv(x, kernel, dilation=3)
    with pytest.raises(MmjaxError, match="groups=2"):
        Conv(4, 3, groups=2).init(jax.random.key(0), x)


def test_the_module_is_the_function_with_a_bias():
    (x,) = draw(7, (2, 11, 7, 6))
    module = Conv(10, (3, 1), strides=2, padding=(1, 0), groups=2, use_bias=True)
    params = module.init(jax.random.key(0), x)["params"]
    params["bias"] = jnp.arange(10.0)
    expected = reference(x, params["kernel"], 2, (1, 0), 2) + jnp.arange(10.0)
    close(module.apply({"params": params}, x), expected)
    wide = Conv(512, 3).init(jax.random.key(1), jnp.zeros((1, 3, 3, 16)))["params"]["kernel"]
    assert float(wide.std()) == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("shape", [(2, 11, 13, 3), (2, 8, 6, 3)])
@pytest.mark.parametrize("size, strides, padding", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 0)])
def test_max_pool_is_torch_s_ties_included(shape, size, strides, padding):
    x = jnp.round(draw(8, shape)[0] * 2)  # many ties
    init = -jnp.inf
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))

    def reference(x):
        return lax.reduce_window(x, init, lax.max, (1, size, size, 1), (1, strides, strides, 1), pads)

    y, pull = jax.vjp(reference, x)
    actual, actual_pull = jax.vjp(lambda x: max_pool(x, size, strides, padding), x)
    dy = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    np.testing.assert_array_equal(actual, y)
    np.testing.assert_array_equal(max_pool(x, size, strides, padding), y)
    np.testing.assert_allclose(actual_pull(dy)[0], pull(dy)[0], atol=1e-6)


def test_average_pool_by_hand_and_its_gradient():
    x = jnp.arange(2 * 3 * 5, dtype=jnp.float32).reshape(1, 3, 5, 2)
    np.testing.assert_allclose(avg_pool(x, 2)[0, 0, :, 0], [(0 + 2 + 10 + 12) / 4, (4 + 6 + 14 + 16) / 4])
    np.testing.assert_allclose(avg_pool(x, 3, 2, 1)[0, 0, 0, 1], (1 + 3 + 11 + 13) / 9)
    grad = jax.grad(lambda x: avg_pool(x, 2)[0, 0, 1, 0] * 8)(x)
    assert float(grad.sum()) == 8 and float(grad[0, 1, 3, 0]) == 2


@pytest.mark.torch
def test_conv_and_pools_against_torch():
    torch = pytest.importorskip("torch")
    x, kernel = draw(9, (2, 11, 13, 6), (3, 3, 3, 10))
    image = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
    weight = torch.tensor(np.asarray(kernel)).permute(3, 2, 0, 1)
    for actual, expected in (
        (
            conv(x, kernel, strides=2, padding=2, groups=2, dilation=2),
            torch.conv2d(image, weight, None, 2, 2, 2, 2),
        ),
        (max_pool(x, 3, 2, 1), torch.max_pool2d(image, 3, 2, 1)),
        (avg_pool(x, 3, 2, 1), torch.nn.functional.avg_pool2d(image, 3, 2, 1)),
    ):
        close(actual, jnp.asarray(expected.permute(0, 2, 3, 1).numpy()))
