"""Attention: the one function that every system goes through; its masks are those of `mmjax.nn.masks`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from mmjax.nn.dropout import keep_mask
from mmjax.nn.masks import causal_mask
from mmjax.nn.splash import splash_attention, splash_takes
from mmjax.types import Array, Bool, Float, PRNGKeyArray

LONG, CHUNK = 1024, 256


def attention_weights(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b s g k"],
    mask: Bool[Array, "#b #h #l s"] | None = None,
    causal: bool = False,
    bias: Float[Array, "#b #h #l s"] | None = None,
    scale: float | None = None,
    zero_masked: bool = False,
) -> Float[Array, "b h l s"]:
    """softmax(scale q k^T + bias) over the keys, float32. A query without an allowed key attends evenly to all,
    or, with `zero_masked`, has weights of zero (text before the first image in OpenFlamingo).

    g: heads of the keys, a divisor of h; each serves h / g heads of queries in a row. scale: None: 1 / sqrt(k).
    """
    length, groups = q.shape[1], k.shape[2]
    # The queries of all heads in a group are rows of one product.
    q, k = rearrange(q, "b l (g m) k -> b g (m l) k", g=groups), rearrange(k, "b s g k -> b g s k")
    scores = jnp.einsum("bgqk,bgsk->bgqs", q, k, preferred_element_type=jnp.float32)
    # Scaled in float32: a scaled q would be rounded to its dtype.
    scores = scores * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = rearrange(scores, "b g (m l) s -> b (g m) l s", l=length)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    allowed = causal_mask(length, k.shape[2]) if causal else None
    if mask is not None:
        allowed = mask if allowed is None else allowed & mask
    if allowed is None:
        return jax.nn.softmax(scores, axis=-1)
    weights = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.where(jnp.any(allowed, axis=-1, keepdims=True), weights, 0) if zero_masked else weights


def dot_product_attention(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    mask: Bool[Array, "#b #h #l s"] | None = None,
    *,
    causal: bool = False,
    bias: Float[Array, "#b #h #l s"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: PRNGKeyArray | None = None,
    axis_name: str | None = None,
    zero_masked: bool = False,
    offset: Float[Array, "b h l s"] | None = None,
) -> Float[Array, "b l h k"]:
    """Attention in the dtype of its arguments, softmax in float32.

    mask: True = may attend, broadcastable to [b, h, l, s]. causal: `causal_mask`, besides `mask`.
    bias, scale, g, zero_masked: see `attention_weights`.
    offset: added to the weights, before dropout: zeros, by which a result is differentiated (Grad-CAM).
    dropout_rate: of the weights, with a dropout_rng. axis_name: the mapped axis that cuts the batch, for dropout.
    Which program runs: where there is neither dropout, bias nor offset, on a TPU the splash kernel for long sequences
    (`mmjax.nn.splash`), on a GPU in half precision cuDNN's fused kernel where it takes the shapes (it would round a
    bias, and has a bias's gradient for some shapes alone). Otherwise the sums written out with the heads before the
    tokens, which XLA's CPU backend runs 1.4-1.8 times as fast as `jax.nn.dot_product_attention` (8 x 197 tokens, 12
    heads), and of more than LONG queries CHUNK at a time, so that the weights take memory in proportion to s alone.
    All give the same numbers to rounding.
    """
    drop = dropout_rng is not None and dropout_rate > 0
    plain = not drop and bias is None and not zero_masked and offset is None
    if plain and splash_takes(q, k, mask, causal):
        return splash_attention(q, k, v, mask, causal, scale)
    if plain and _cudnn_takes(q, k, mask, causal):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, scale=scale, implementation="cudnn")
    if not drop and offset is None and q.shape[1] > LONG:
        return _by_chunks(q, k, v, mask, causal, bias, scale, zero_masked)
    weights = attention_weights(q, k, mask, causal, bias, scale, zero_masked)
    weights = weights if offset is None else weights + offset
    if dropout_rng is not None and dropout_rate > 0:
        keep = keep_mask(dropout_rng, dropout_rate, weights.shape, axis_name)
        weights = jnp.where(keep, weights / (1 - dropout_rate), 0)
    return _mix(weights, v)


def _mix(weights: Float[Array, "b h l s"], v: Float[Array, "b s g k"]) -> Float[Array, "b l h k"]:
    length, groups = weights.shape[2], v.shape[2]
    weights = rearrange(weights.astype(v.dtype), "b (g m) l s -> b g (m l) s", g=groups)
    mixed = jnp.einsum("bgqs,bgsk->bgqk", weights, rearrange(v, "b s g k -> b g s k"))
    return rearrange(mixed, "b g (m l) k -> b l (g m) k", l=length)


def _by_chunks(
    q: Array, k: Array, v: Array, mask: Any, causal: bool, bias: Any, scale: float | None, zero_masked: bool
) -> Array:
    """The same, CHUNK queries after CHUNK queries; in the backward pass their weights are computed again."""
    length, size = q.shape[1], k.shape[1]
    extra = -length % CHUNK

    def cut(x: Array | None, start: Array) -> Array | None:
        if x is None or x.shape[2] == 1:
            return x
        x = jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(x, start, CHUNK, axis=2)

    @jax.checkpoint
    def attend(start: Array, part: Array) -> Array:
        allowed = cut(mask, start)
        if causal:
            positions = start + jnp.arange(CHUNK)[:, None] + (size - length)
            visible = (jnp.arange(size) <= positions)[None, None]
            allowed = visible if allowed is None else allowed & visible
        return _mix(attention_weights(part, k, allowed, False, cut(bias, start), scale, zero_masked), v)

    parts = rearrange(jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0))), "b (n c) h k -> n b c h k", c=CHUNK)
    starts = CHUNK * jnp.arange(parts.shape[0])
    mixed = jax.lax.map(lambda chunk: attend(*chunk), (starts, parts))
    return rearrange(mixed, "n b c h k -> b (n c) h k")[:, :length]


def _cudnn_takes(q: Any, k: Any, mask: Any, causal: bool) -> bool:
    """cuDNN's flash attention: half precision, head widths to 128 in steps of 8, its own causal mask for l = s only.

    Short masked rows go the other way: a mask becomes a bias there, whose rows must be even in length.
    """
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and not (causal and q.shape[1] != k.shape[1])
    aligned = mask is None or (q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0)
    return half and fits and aligned and jax.default_backend() == "gpu"
