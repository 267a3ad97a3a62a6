"""Attention: the one function that every system goes through. What it takes as a mask: see `mmjax.nn.masks`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from mmjax.nn.dropout import kept
from mmjax.nn.masks import causal_mask
from mmjax.types import Array, Bool, Float, PRNGKeyArray


def attention_weights(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b s h k"],
    mask: Bool[Array, "#b #h #l s"] | None = None,
    causal: bool = False,
    bias: Float[Array, "#b #h #l s"] | None = None,
    scale: float | None = None,
) -> Float[Array, "b h l s"]:
    """softmax(scale q k^T + bias) over the keys, float32. A query that may attend to nothing attends evenly to all.

    scale: None: 1 / sqrt(k).
    """
    q, k = rearrange(q, "b l h k -> b h l k"), rearrange(k, "b s h k -> b h s k")
    q = q / math.sqrt(q.shape[-1]) if scale is None else q * scale
    scores = jnp.einsum("bhlk,bhsk->bhls", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    allowed = causal_mask(q.shape[2], k.shape[2]) if causal else None
    if mask is not None:
        allowed = mask if allowed is None else allowed & mask
    if allowed is not None:
        scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def dot_product_attention(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b s h k"],
    v: Float[Array, "b s h k"],
    mask: Bool[Array, "#b #h #l s"] | None = None,
    *,
    causal: bool = False,
    dropout_rate: float = 0.0,
    dropout_rng: PRNGKeyArray | None = None,
    axis_name: str | None = None,
    bias: Float[Array, "#b #h #l s"] | None = None,
    scale: float | None = None,
) -> Float[Array, "b l h k"]:
    """Attention in the dtype of its arguments, softmax in float32.

    mask: True = may attend, broadcastable to [b, h, l, s]. causal: `causal_mask`, besides `mask`.
    bias: added to the scores (relative positions). scale: of the scores; None: 1 / sqrt(k). T5 has 1.
    dropout_rate: of the weights, where a key is given. axis_name: the mapped axis that cuts the batch, for dropout.
    Which program runs: cuDNN's fused kernel on a GPU in half precision, where it takes the shapes and there is no bias
    (it would be rounded to half precision, and its gradient is not to be had for every shape); otherwise the sums
    written out with the heads before the tokens, which XLA's CPU backend runs 1.4-1.8 times as fast as
    `jax.nn.dot_product_attention` (8 x 197 tokens, 12 heads). All give the same numbers to rounding.
    """
    if (dropout_rng is None or dropout_rate == 0) and bias is None and _cudnn_takes(q, k, mask, causal):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, scale=scale, implementation="cudnn")
    weights = attention_weights(q, k, mask, causal, bias, scale)
    if dropout_rng is not None and dropout_rate > 0:
        stay = kept(dropout_rng, dropout_rate, weights.shape, axis_name)
        weights = jnp.where(stay, weights / (1 - dropout_rate), 0)
    v = rearrange(v, "b s h k -> b h s k")
    mixed = jnp.einsum("bhls,bhsk->bhlk", weights.astype(v.dtype), v)
    return rearrange(mixed, "b h l k -> b l h k")


def _cudnn_takes(q: Any, k: Any, mask: Any, causal: bool) -> bool:
    """cuDNN's flash attention: half precision, head widths to 128 in steps of 8, its own causal mask for l = s only.

    Short masked rows go the other way: a mask becomes a bias there, whose rows must be even in length.
    """
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and not (causal and q.shape[1] != k.shape[1])
    aligned = mask is None or (q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0)
    return half and fits and aligned and jax.default_backend() == "gpu"
