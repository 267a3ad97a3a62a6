"""Convolution and pooling on [b, height, width, c], lowered as measured on each backend; padding as in torch.

Off the CPU this is `lax.conv_general_dilated` and its own derivatives. XLA's CPU convolution is fast in one form only:
NHWC by HWIO without groups. What `jax.grad` and `jax.vmap` make of it is another form, up to a hundred times slower
(experiments/benchmarks/convolution.py). On CPU therefore

    1x1                 is a matrix product;
    few rows            (pixels of all images, at most 4 a channel made) are a product of all windows, written out;
    narrow stems        at stride 2 see pairs of columns as one column of twice the channels;
    the others          are that one form, forward and in both derivatives, which are written out here as ordinary
                        convolutions: of dy with the turned kernel, and of x by dy with batch and channels exchanged;
    groups              are joined to blocks of 64 channels or more, with zeros outside the diagonal; blocks are mapped;
    vmap                joins the batch, or the output channels, or if both arguments are mapped runs one after another.

First derivatives in reverse mode only: `jax.jvp` of a convolution, or a gradient of its gradient, is an error.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import lax

from mmjax.errors import MmjaxError
from mmjax.types import Array, Float

Pair = tuple[int, int]
LAYOUT = ("NHWC", "HWIO", "NHWC")
BLOCK = 64
"""Channels that make a matrix product efficient."""
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""torch's kaiming_normal_(mode="fan_out"): std sqrt(2 / (kh kw out)), for kernels of any number of groups."""


def conv(
    x: Float[Array, "b height width c"],
    kernel: Float[Array, "kh kw c_per_group out"],
    *,
    strides: int | Pair = 1,
    padding: int | Pair = 0,
    groups: int = 1,
    dilation: int | Pair = 1,
) -> Float[Array, "b out_height out_width out"]:
    """Cross-correlation as torch's conv2d: zero padding on both sides, size floor((H + 2p - d(k-1) - 1) / s) + 1.

    The kernel is taken to x's dtype. Raises MmjaxError for channels that do not fit.
    """
    strides, padding, dilation = _pair(strides), _pair(padding), _pair(dilation)
    kh, kw, c, out = kernel.shape
    if x.ndim != 4 or x.shape[-1] != c * groups or out % groups:
        raise MmjaxError(f"kernel {list(kernel.shape)} with groups={groups} does not fit x {list(x.shape)}")
    sizes = [h + 2 * p - d * (k - 1) for h, p, d, k in zip(x.shape[1:3], padding, dilation, (kh, kw))]
    if min(sizes) < 1:
        raise MmjaxError(
            f"a kernel {kh} x {kw} with dilation={dilation} is larger than x {list(x.shape)} padded by {padding}"
        )
    kernel = kernel.astype(x.dtype)
    if (kh, kw, groups) == (1, 1, 1):
        return _pointwise(x, kernel, strides, padding)
    return _conv(strides, padding, groups, dilation)(x, kernel)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _pointwise(x: Array, kernel: Array, strides: Pair, padding: Pair) -> Array:
    if padding != (0, 0):
        x = jnp.pad(x, ((0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)))
    if strides != (1, 1):
        x = x[:, :: strides[0], :: strides[1]]
    b, height, width, _ = x.shape
    rows = rearrange(x, "b h w c -> (b h w) c") @ kernel[0, 0]
    return rearrange(rows, "(b h w) c -> b h w c", b=b, h=height, w=width)


@functools.cache
def _conv(strides: Pair, padding: Pair, groups: int, dilation: Pair) -> Callable[[Array, Array], Array]:
    """The convolution of one geometry, with its derivatives, chosen where the program is lowered."""

    def native(x: Array, kernel: Array) -> Array:
        pads = [(p, p) for p in padding]
        return lax.conv_general_dilated(
            x, kernel, strides, pads, rhs_dilation=dilation, dimension_numbers=LAYOUT, feature_group_count=groups
        )

    def on_cpu(x: Array, kernel: Array) -> Array:
        # No fast path for bfloat16 there.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return _cpu_conv(x.astype(wide), kernel.astype(wide), strides, padding, groups, dilation).astype(x.dtype)

    def backward_of(function: Callable[[Array, Array], Array]) -> Callable[..., tuple[Array, Array]]:
        return lambda x, kernel, dy: jax.vjp(function, x, kernel)[1](dy)

    @jax.custom_vjp
    def run(x: Array, kernel: Array) -> Array:
        return lax.platform_dependent(x, kernel, cpu=on_cpu, default=native)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return run(x, kernel), (x, kernel)

    def backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
        return lax.platform_dependent(*residuals, dy, cpu=backward_of(on_cpu), default=backward_of(native))

    run.defvjp(forward, backward)
    return run


# -------------------------------------------------------------------------------------------------------------- on CPU


def _cpu_conv(x: Array, kernel: Array, strides: Pair, padding: Pair, groups: int, dilation: Pair) -> Array:
    run = _dense(strides, padding, dilation)
    if groups == 1:
        return run(x, kernel)
    # Block diagonal: of the m groups in a block, output channels of group g read the channels of g alone.
    width = kernel.shape[2]
    m = next(m for m in range(1, groups + 1) if groups % m == 0 and (m * width >= BLOCK or m == groups))
    split = rearrange(kernel, "h w c (n g o) -> n h w c g o", g=m, n=groups // m)
    blocks = jnp.einsum("nhwcgo,gk->nhwkcgo", split, jnp.eye(m, dtype=kernel.dtype))
    blocks = rearrange(blocks, "n h w k c g o -> n h w (k c) (g o)")
    y = jax.vmap(run)(rearrange(x, "b h w (n c) -> n b h w c", n=groups // m), blocks)
    return rearrange(y, "n b h w o -> b h w (n o)")


@functools.cache
def _dense(strides: Pair, padding: Pair, dilation: Pair) -> Callable[[Array, Array], Array]:
    """Convolution without groups whose derivatives are convolutions of the fast form too."""

    @jax.custom_vjp
    def run(x: Array, kernel: Array) -> Array:
        if _few_rows(x, kernel, strides, padding, dilation):
            return _windows_product(x, kernel, strides, padding, dilation)
        if _pairs_are_faster(x, kernel, strides, padding, dilation):
            return _of_column_pairs(x, kernel, strides, padding)
        return _fast(strides, tuple((p, p) for p in padding), dilation)(x, kernel)

    def backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
        x, kernel = residuals
        if _few_rows(x, kernel, strides, padding, dilation):
            (dx,) = jax.vjp(lambda x: _windows_product(x, kernel, strides, padding, dilation), x)[1](dy)
        else:
            dx = _dx(dy, kernel, (x.shape[1], x.shape[2]), strides, padding, dilation)
        return dx, _dk(x, dy, kernel.shape[:2], strides, padding, dilation)

    run.defvjp(lambda x, kernel: (run(x, kernel), (x, kernel)), backward)
    return run


def _out_size(x: Array, kernel: Array, strides: Pair, padding: Pair, dilation: Pair) -> Pair:
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[1:3], kernel.shape, strides, padding, dilation)
    )
    return height, width


def _few_rows(x: Array, kernel: Array, strides: Pair, padding: Pair, dilation: Pair) -> bool:
    """Whether the windows are small beside the kernel. There XLA leaves its fast convolution, wholly or for dx: 256
    channels at 2 x 2 px, batch 256, take 167 ms, as a product 7."""
    height, width = _out_size(x, kernel, strides, padding, dilation)
    return x.shape[0] * height * width <= 4 * kernel.shape[3]


def _windows_product(x: Array, kernel: Array, strides: Pair, padding: Pair, dilation: Pair) -> Array:
    """im2col: every window a row, then one matrix product."""
    (kh, kw, _, out), b = kernel.shape, x.shape[0]
    height, width = _out_size(x, kernel, strides, padding, dilation)
    x = jnp.pad(x, ((0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)))
    ends = [(n - 1) * s + 1 for n, s in zip((height, width), strides)]
    parts = [
        x[:, top : top + ends[0] : strides[0], left : left + ends[1] : strides[1]]
        for top in range(0, kh * dilation[0], dilation[0])
        for left in range(0, kw * dilation[1], dilation[1])
    ]
    rows = rearrange(lax.optimization_barrier(jnp.concatenate(parts, -1)), "b h w c -> (b h w) c")
    return rearrange(rows @ kernel.reshape(-1, out), "(b h w) o -> b h w o", b=b, h=height, w=width)


def _pairs_are_faster(x: Array, kernel: Array, strides: Pair, padding: Pair, dilation: Pair) -> bool:
    """Stems of up to 32 channels at stride 2: XLA's takes 155 ms for 256 images of 64 px, in pairs 34. From 48 channels
    on the pairs win nothing."""
    even = (x.shape[2] + 2 * padding[1]) % 2 == 0
    return even and strides[1] == 2 and dilation == (1, 1) and kernel.shape[2] <= 4 and kernel.shape[3] <= 32


def _of_column_pairs(x: Array, kernel: Array, strides: Pair, padding: Pair) -> Array:
    """The same with two columns of x as one of twice the channels, and a stride of 1 along them."""
    x = jnp.pad(x, ((0, 0), (0, 0), (padding[1],) * 2, (0, 0)))
    kernel = jnp.pad(kernel, ((0, 0), (0, kernel.shape[1] % 2), (0, 0), (0, 0)))
    pairs = lax.optimization_barrier(rearrange(x, "b h (w two) c -> b h w (two c)", two=2))
    joined = rearrange(kernel, "h (w two) c o -> h w (two c) o", two=2)
    return _fast((strides[0], 1), ((padding[0],) * 2, (0, 0)), (1, 1))(pairs, joined)


def _dx(dy: Array, kernel: Array, size: Pair, strides: Pair, padding: Pair, dilation: Pair) -> Array:
    """The gradient of x: dy convolved with the kernel, turned by 180 degrees, input and output channels exchanged."""
    turned = rearrange(jnp.flip(kernel, (0, 1)), "h w c o -> h w o c")
    extents = [d * (k - 1) for d, k in zip(dilation, kernel.shape[:2])]
    low = [r - p for r, p in zip(extents, padding)]
    inner = [(n - 1) * s for n, s in zip(dy.shape[1:3], strides)]
    pads = tuple((a, h - 1 - i + r - a) for a, h, i, r in zip(low, size, inner, extents))
    return _fast((1, 1), pads, dilation, strides)(dy, turned)


def _dk(x: Array, dy: Array, size: tuple[int, ...], strides: Pair, padding: Pair, dilation: Pair) -> Array:
    """The gradient of the kernel: x convolved with dy over the images, batch instead of channels."""
    pads = []
    for axis, (k, n, s, p, d) in enumerate(zip(size, dy.shape[1:3], strides, padding, dilation), 1):
        high = d * (k - 1) + s * (n - 1) + 1 - x.shape[axis] - p
        x = lax.slice_in_dim(x, 0, x.shape[axis] + min(high, 0), axis=axis)  # rows that no window reaches
        pads.append((p, max(high, 0)))
    images, filters = rearrange(x, "b h w c -> c h w b"), rearrange(dy, "b h w o -> h w b o")
    # Without the barrier XLA takes the transposes into the convolution, which is then no longer of the fast form.
    images, filters = lax.optimization_barrier((images, filters))
    return rearrange(_fast(dilation, tuple(pads), strides)(images, filters), "c h w o -> h w c o")


@functools.cache
def _fast(
    strides: Pair, pads: tuple[Pair, ...], dilation: Pair, x_dilation: Pair = (1, 1)
) -> Callable[[Array, Array], Array]:
    """The form of convolution that XLA's CPU backend runs fast; `vmap` keeps to it."""

    @jax.custom_batching.custom_vmap
    def run(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, strides, pads, x_dilation, dilation, LAYOUT)

    @run.def_vmap
    def rule(size: int, mapped: list[bool], x: Array, kernel: Array) -> tuple[Array, bool]:
        if mapped == [True, False]:
            y = run(rearrange(x, "a b h w c -> (a b) h w c"), kernel)
            return rearrange(y, "(a b) h w o -> a b h w o", a=size), True
        if mapped == [False, True]:
            y = run(x, rearrange(kernel, "a h w c o -> h w c (a o)"))
            return rearrange(y, "b h w (a o) -> a b h w o", a=size), True
        return lax.map(lambda pair: run(*pair), (x, kernel)), True

    return run


# ------------------------------------------------------------------------------------------------------------- pooling


def max_pool(
    x: Float[Array, "b height width c"], size: int, strides: int | None = None, padding: int = 0
) -> Float[Array, "b out_height out_width c"]:
    """The largest of each window, padding never chosen; of equals the first gets the gradient, as in torch."""
    return _max_pool(size, strides or size, padding)(x)


@functools.cache
def _max_pool(size: int, stride: int, padding: int) -> Callable[[Array], Array]:
    """Maxima of shifted slices: XLA's own backward pass (select-and-scatter) is slow on CPU."""
    offsets = [(i, j) for i in range(size) for j in range(size)]

    def windows(x: Array) -> list[Array]:
        lowest = jnp.asarray(-jnp.inf, x.dtype)
        x = lax.pad(x, lowest, [(0, 0, 0), (padding, padding, 0), (padding, padding, 0), (0, 0, 0)])
        return [_window(x, offset, size, stride) for offset in offsets]

    @jax.custom_vjp
    def run(x: Array) -> Array:
        return functools.reduce(jnp.maximum, windows(x))

    def forward(x: Array) -> tuple[Array, tuple[Array, tuple[int, ...]]]:
        best, *others = windows(x)
        first = jnp.zeros(best.shape, jnp.uint8 if len(offsets) < 256 else jnp.int32)
        for number, other in enumerate(others, 1):
            first = jnp.where(other > best, jnp.asarray(number, first.dtype), first)
            best = jnp.maximum(best, other)
        return best, (first, x.shape)

    def backward(residuals: tuple[Array, tuple[int, ...]], dy: Array) -> tuple[Array]:
        first, (b, height, width, c) = residuals
        tiles = [-(-(length + 2 * padding) // stride) for length in (height, width)]
        rows = []
        for i in range(stride):
            columns = []
            for j in range(stride):
                total = jnp.zeros((b, *tiles, c), dy.dtype)
                for number, (u, v) in enumerate(offsets):
                    if u % stride == i and v % stride == j:
                        lows = (u // stride, v // stride)
                        pads = [(low, t - n - low, 0) for low, t, n in zip(lows, tiles, dy.shape[1:3])]
                        part = jnp.where(first == number, dy, 0)
                        total += lax.pad(part, jnp.zeros((), dy.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
                columns.append(total)
            rows.append(jnp.stack(columns, 3))
        phases = rearrange(jnp.stack(rows, 2), "b h i w j c -> b (h i) (w j) c")
        return (phases[:, padding : padding + height, padding : padding + width],)

    run.defvjp(forward, backward)
    return run


def _window(x: Array, offset: Pair, size: int, stride: int) -> Array:
    """The pixel at `offset` of every window of a padded image."""
    b, height, width, c = x.shape
    ends = [o + (length - size) // stride * stride + 1 for o, length in zip(offset, (height, width))]
    return lax.slice(x, (0, *offset, 0), (b, *ends, c), (1, stride, stride, 1))


def avg_pool(
    x: Float[Array, "b height width c"], size: int, strides: int | None = None, padding: int = 0
) -> Float[Array, "b out_height out_width c"]:
    """The mean of each window, zeros of the padding counted, as torch's AvgPool2d."""
    stride = strides or size
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = [_window(x, (i, j), size, stride) for i in range(size) for j in range(size)]
    return functools.reduce(jnp.add, windows) / (size * size)


class Conv(nn.Module):
    """2-D convolution with torch's padding; parameters kernel [kh, kw, in / groups, out] and bias [out], float32.

    Attributes:
        kernel_size, strides, padding, dilation: numbers, or (height, width).
        dtype: compute dtype; None computes in the input's.
    """

    features: int
    kernel_size: int | Pair
    strides: int | Pair = 1
    padding: int | Pair = 0
    groups: int = 1
    dilation: int | Pair = 1
    use_bias: bool = False
    dtype: Any = None
    kernel_init: Callable[..., Any] = kaiming_fan_out

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b out_height out_width out"]:
        c = x.shape[-1]
        if c % self.groups:
            raise MmjaxError(f"{self.name}: {c} channels cannot be divided in groups={self.groups}")
        shape = (*_pair(self.kernel_size), c // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        y = conv(
            x.astype(self.dtype or x.dtype),
            kernel,
            strides=self.strides,
            padding=self.padding,
            groups=self.groups,
            dilation=self.dilation,
        )
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
        return y
