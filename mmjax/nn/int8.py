"""Matrices of a frozen model, as floats or as int8 with a float32 scale for each channel (weight-only quantization).

W[i, j] is about values[i, j] * scale[j], where j is the channel: the scale is the channel's largest magnitude / 127.5,
and rounding moves a weight by half a scale at most. Storage alone is narrow; products are of floats, and the scale is
applied to their float32 result. qwix (github.com/google/qwix, extra int8) rounds, and holds both arrays as its QArray.

Its own products make the whole float matrix first. XLA's CPU backend lifts that out of the loop that decodes, and the
program then holds four bytes a weight beside the one: so there a matrix becomes floats by blocks that fit the cache.
Other backends fuse the change of type into the product, and a barrier forbids them to lift it.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from mmjax.errors import MmjaxError
from mmjax.types import Array, Float, Int

Matrix: TypeAlias = Any
"""A float array of two axes, or a `qwix.QArray` of int8."""

VALUES, SCALE = "qvalue", "scale"
"""The two arrays of an int8 matrix, as the paths of leaves call them."""

BLOCK = 2**16
"""Weights that the CPU holds as floats at a time."""


def quantize(matrix: Float[Array, "i j"], channels: int) -> Matrix:
    """Rounds to int8; channels: the axis whose entries have a scale each, which no product sums over.

    Raises MmjaxError where qwix is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise MmjaxError("int8 weights need the extra int8: pip install 'mmjax[int8]'") from error
    return qwix.quantize(matrix.astype(jnp.float32), jnp.int8, channelwise_axes=(channels,))


def from_arrays(values: Any, scale: Any) -> Matrix:
    """The matrix that `quantize` made, from its two arrays (or their shapes). Raises MmjaxError without qwix."""
    try:
        import qwix
    except ImportError as error:
        raise MmjaxError("int8 weights need the extra int8: pip install 'mmjax[int8]'") from error
    return qwix.QArray(values, scale)


def dequantize(leaf: Any) -> Any:
    """The float32 matrix that an int8 one means; other leaves as they are."""
    return leaf.qvalue.astype(jnp.float32) * leaf.scale if is_int8(leaf) else leaf


def is_int8(leaf: Any) -> bool:
    """Whether it is a `qwix.QArray`, without importing qwix."""
    return hasattr(leaf, "qvalue")


def holds_int8(params: Any) -> bool:
    """Whether a tree of parameters has a matrix in int8."""
    return any(is_int8(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_int8))


def product(x: Float[Array, "n i"], kernel: Matrix) -> Float[Array, "n j"]:
    """x W, of x's dtype. kernel [i, j]: its channels are j."""
    if not is_int8(kernel):
        return x @ kernel.astype(x.dtype)
    y = lax.platform_dependent(x, kernel.qvalue, cpu=_product_by_blocks, default=_within_loop(_plain_product))
    return (y * kernel.scale).astype(x.dtype)


def scores(x: Float[Array, "*b i"], table: Matrix) -> Float[Array, "*b j"]:
    """x W^T in float32: the logits of a table that is also the embedding. table [j, i]: its channels are j."""
    if not is_int8(table):
        return jnp.einsum("...d,vd->...v", x, table.astype(x.dtype), preferred_element_type=jnp.float32)
    flat = x.reshape(-1, x.shape[-1])
    y = lax.platform_dependent(flat, table.qvalue, cpu=_scores_by_blocks, default=_within_loop(_plain_scores))
    return (y * table.scale[:, 0]).reshape(*x.shape[:-1], -1)


def rows(table: Matrix, ids: Int[Array, "*b"]) -> Float[Array, "*b i"]:
    """Rows of a table [j, i]; float32 if that is in int8."""
    return dequantize(jax.tree.map(lambda x: x[ids], table))


# ------------------------------------------------------------------------------------------- x [n, i] -> float32 [n, j]

Product: TypeAlias = Callable[[Array, Array], Array]


def _within_loop(run: Product) -> Product:
    """The same, where XLA cannot take the matrix's change of type out of a loop: it seems to need what varies there."""

    def tied(x: Array, values: Array) -> Array:
        return run(*lax.optimization_barrier((x, values)))

    return tied


def _plain_product(x: Array, values: Array) -> Array:
    return jnp.matmul(x, values.astype(x.dtype), preferred_element_type=jnp.float32)


def _plain_scores(x: Array, values: Array) -> Array:
    return jnp.einsum("ni,ji->nj", x, values.astype(x.dtype), preferred_element_type=jnp.float32)


def _product_by_blocks(x: Array, values: Array) -> Array:
    x = x.astype(jnp.float32)

    def add(start: Any, width: int, y: Array) -> Array:
        block = lax.dynamic_slice_in_dim(values, start, width, 0).astype(jnp.float32)
        return y + lax.dynamic_slice_in_dim(x, start, width, 1) @ block

    return _by_blocks(add, values.shape, jnp.zeros((x.shape[0], values.shape[1]), jnp.float32))


def _scores_by_blocks(x: Array, values: Array) -> Array:
    x = x.astype(jnp.float32)

    def write(start: Any, width: int, y: Array) -> Array:
        block = lax.dynamic_slice_in_dim(values, start, width, 0).astype(jnp.float32)
        return lax.dynamic_update_slice_in_dim(y, x @ block.T, start, 1)

    return _by_blocks(write, values.shape, jnp.zeros((x.shape[0], values.shape[0]), jnp.float32))


def _by_blocks(run: Callable[[Any, int, Array], Array], shape: tuple[int, ...], y: Array) -> Array:
    """run(start, width, y) over a matrix's rows, in even blocks of `BLOCK` weights or so; the last may be narrower."""
    length = shape[0]
    size = -(-length // -(-length * shape[1] // BLOCK))
    whole = length // size
    y = lax.fori_loop(0, whole, lambda k, y: run(k * size, size, y), y)
    return run(whole * size, length % size, y) if length % size else y
