"""The cache of keys and values between the steps of decoding, and attention of one new token over it.

Keys and values of a prompt are cached once an item, however many beams or samples continue it; those of new tokens
once a row. A beam search therefore moves the short part alone. All sizes are fixed when decoding begins;
slots that are not written yet are masked. Keys stand heads before tokens, as the products want them, before any
repetition of grouped heads, after rotary positions. Items, rows and heads share one axis: where one of them is an axis
of length one XLA copies the whole cache at every step, between writing a slot and reading them all.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from mmjax.types import Array, Bool, Float, Int


class KeyValues(NamedTuple):
    """The keys and values of one layer: [b, g, s, k] of prompts or an encoder, or [b r g, t, k] of generated tokens.

    r: sequences of a prompt.

    g: heads of keys and values, a divisor of the queries'.
    """

    k: Array
    v: Array


def from_tokens(k: Float[Array, "b s g k"], v: Float[Array, "b s g k"]) -> KeyValues:
    """The keys and values of a prompt, from the projections of attention."""
    return KeyValues(rearrange(k, "b s g k -> b g s k"), rearrange(v, "b s g k -> b g s k"))


def empty(b: int, rows: int, heads: int, capacity: int, width: int, dtype: jnp.dtype | type) -> KeyValues:
    """Slots for `capacity` generated tokens in each of `rows` rows of b items."""
    zeros = jnp.zeros((b * rows * heads, capacity, width), dtype)
    return KeyValues(zeros, zeros)


def write(new: KeyValues, k: Float[Array, "b r g k"], v: Float[Array, "b r g k"], index: Int[Array, ""]) -> KeyValues:
    """The next token's key and value, into slot `index`."""

    def put(slots: Array, token: Array) -> Array:
        token = rearrange(token, "b r g k -> (b r g) 1 k").astype(slots.dtype)
        return jax.lax.dynamic_update_slice(slots, token, (0, index, 0))

    return KeyValues(put(new.k, k), put(new.v, v))


def attend(
    q: Float[Array, "b r h k"],
    prompt: KeyValues | None,
    prompt_mask: Bool[Array, "b s"] | None,
    new: KeyValues | None,
    index: Int[Array, ""] | int,
    bias: Float[Array, "#b #r #h s_t"] | None = None,
    scale: float | None = None,
    zero_masked: bool = False,
) -> Float[Array, "b r h k"]:
    """Attention of one token a row over an item's prompt and the row's generated tokens (slots 0 to `index`).

    prompt, new: either may be None: cross attention has no generated keys. prompt_mask: True = a token.
    bias: added to the scores, over the prompt's keys and then the generated slots (ALiBi, T5).
    scale: of the scores; None: 1 / sqrt(k). T5 has 1.
    Softmax in float32; a row that may attend to nothing attends evenly to all, or with `zero_masked` gives zero.
    """
    b, r = q.shape[:2]
    groups = prompt.k.shape[1] if prompt is not None else new.k.shape[0] // (b * r)  # type: ignore[union-attr]
    q = rearrange(q, "b r (g m) k -> b g r m k", g=groups)
    parts: list[Array] = []
    masks: list[Array] = []
    if prompt is not None:
        parts.append(jnp.einsum("bgrmk,bgsk->bgrms", q, prompt.k, preferred_element_type=jnp.float32))
        mask = jnp.ones((1, prompt.k.shape[2]), bool) if prompt_mask is None else prompt_mask
        masks.append(jnp.broadcast_to(mask, (b, prompt.k.shape[2])))
    if new is not None:
        q_rows = rearrange(q, "b g r m k -> (b r g) m k")
        scores = jnp.einsum("nmk,ntk->nmt", q_rows, new.k, preferred_element_type=jnp.float32)
        parts.append(rearrange(scores, "(b r g) m t -> b g r m t", r=r, g=groups))
        masks.append(jnp.broadcast_to(jnp.arange(new.k.shape[1]) <= index, (b, new.k.shape[1])))
    scores = jnp.concatenate(parts, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if bias is not None:
        split = groups if bias.shape[-2] > 1 else 1
        scores = scores + rearrange(bias.astype(jnp.float32), "b r (g m) s -> b g r m s", g=split)
    allowed = jnp.concatenate(masks, -1)[:, None, None, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(jnp.float32).min), axis=-1)
    weights = jnp.where(jnp.any(allowed, axis=-1, keepdims=True), weights, 0) if zero_masked else weights
    mixed = jnp.zeros((), q.dtype)
    if prompt is not None:
        of_prompt, weights = jnp.split(weights, [prompt.k.shape[2]], axis=-1)
        mixed = mixed + jnp.einsum("bgrms,bgsk->bgrmk", of_prompt.astype(prompt.v.dtype), prompt.v)
    if new is not None:
        of_new = rearrange(weights, "b g r m t -> (b r g) m t").astype(new.v.dtype)
        of_rows = jnp.einsum("nmt,ntk->nmk", of_new, new.v)
        mixed = mixed + rearrange(of_rows, "(b r g) m k -> b g r m k", r=r, g=groups)
    return rearrange(mixed, "b g r m k -> b r (g m) k")
