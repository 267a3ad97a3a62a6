"""JAX's splash attention kernel for TPU (jax.experimental.pallas.ops.tpu.splash_attention) in this library's terms."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from mmjax.types import Array, Bool, Float

LANES = 128
"""A head's width and both lengths are multiples of it."""
SHORTEST = 1024
"""The minimum length. For shorter sequences plain attention is as fast, and its weights fit in memory."""


def splash_takes(
    q: Float[Array, "b l h k"], k: Float[Array, "b s g k"], mask: Bool[Array, "#b #h #l s"] | None, causal: bool
) -> bool:
    """Whether the kernel serves these shapes, here: on a TPU, and not within a program that XLA cuts over a mesh.

    A Mosaic kernel cannot be cut automatically: with several devices it needs their axes to be mapped by hand.
    """
    long = q.shape[1] >= SHORTEST and all(n % LANES == 0 for n in (q.shape[1], k.shape[1], q.shape[3]))
    keys_alone = mask is None or mask.shape[1] == mask.shape[2] == 1
    fits = long and keys_alone and (not causal or q.shape[1] <= k.shape[1])
    if not fits or jax.default_backend() != "tpu":
        return False
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 or (bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names))


def splash_attention(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    mask: Bool[Array, "#b 1 1 s"] | None,
    causal: bool,
    scale: float | None,
    interpret: bool = False,
) -> Float[Array, "b l h k"]:
    """`mmjax.nn.attention.dot_product_attention`, forward and backward, without the attention weights in memory.

    mask: of keys. The result of a query without an allowed key, such as left padding in a causal pass, is arbitrary.
    interpret: run the kernel by XLA, on any backend. The kernel has no scale: q is scaled in float32 and rounded
    to its dtype, as the kernel's product requires.
    """
    from jax.experimental.pallas.ops.tpu import (
        splash_attention as splash,
    )  # takes a second, of which no CPU has any use

    length, size = q.shape[1], k.shape[1]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    shape, n, m = (length, size), _block(length), _block(size)
    visible = splash.CausalMask(shape, size - length) if causal else splash.FullMask(shape)
    kernel: Any = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([visible] * q.shape[2]),
        block_sizes=splash.BlockSizes(n, m, m, n, m, m, n, m),
        interpret=interpret,
    )
    segments = None
    if mask is not None:
        keys = jnp.broadcast_to(mask[:, 0, 0], (q.shape[0], size)).astype(jnp.int32)
        segments = splash.SegmentIds(jnp.ones((q.shape[0], length), jnp.int32), keys)
    q, k, v = (rearrange(x, "b l h k -> b h l k") for x in (q, k, v))
    mixed: Any = jax.vmap(kernel)(q, k, v, segments)
    return rearrange(mixed, "b h l k -> b l h k")


def _block(length: int) -> int:
    """The largest of the kernel's usual block sizes that divides the length."""
    return next(size for size in (512, 256, LANES) if length % size == 0)
