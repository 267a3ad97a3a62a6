"""The decoder before the generation engine: its prompt once, then a token at a time."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from mmjax.generation.decodable import DecodeState
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.network import Decoder, token_positions
from mmjax.nn import kv_cache
from mmjax.nn.kv_cache import KeyValues
from mmjax.nn.stack import LayerCache
from mmjax.types import Array, Bool, Float, Int


class PrefixCache(NamedTuple):
    """The tokens so far: each layer's keys and values, which of them are tokens, and their positions."""

    caches: tuple[LayerCache, ...]
    mask: Bool[Array, "b s"]
    position_ids: Int[Array, "b s"]


@dataclass(frozen=True)
class DecoderSteps:
    """A `mmjax.generation.decodable.Decodable` over the parameters of a `Decoder`.

    Its inputs: `input_ids` [b, l] or `inputs_embeds` [b, l, d] (a prefix that is no text, and whatever text is around
    it, embedded by the caller), `attention_mask` [b, l], and `past`, from `remember` after an earlier generation.
    """

    module: Decoder

    def prefill(
        self, variables: Mapping[str, Any], inputs: Mapping[str, Any], rows: int, capacity: int
    ) -> tuple[Float[Array, "b v"], DecodeState]:
        module, c = self.module, self.module.config
        x = inputs.get("inputs_embeds")
        if x is None:
            x = module.apply(variables, inputs["input_ids"], method="embed")
        x = jnp.asarray(x, c.dtype)
        past: PrefixCache | None = inputs.get("past")
        prompt = extended_prompt(x.shape[:2], inputs.get("attention_mask"), past, capacity)
        arrays = (x, prompt.mask, prompt.position_ids, None if past is None else past.caches, prompt.total_length)
        outputs: Any = module.apply(variables, *arrays, method="prefill")
        final = last_states(outputs[0], prompt.mask[:, -x.shape[1] :])
        logits: Any = module.apply(variables, final, method="logits")
        items = PrefixCache(tuple(outputs[1]), prompt.mask, prompt.position_ids)
        return logits, DecodeState(items, new_slots(c, x.shape[0], rows, capacity, x.dtype), jnp.int32(0))

    def step(
        self, variables: Mapping[str, Any], ids: Int[Array, "b r"], state: DecodeState
    ) -> tuple[Float[Array, "b r v"], DecodeState]:
        past: PrefixCache = state.items
        outputs: Any = self.module.apply(variables, ids, *past, state.rows, state.index, method="step")
        logits, new = outputs
        return logits, state._replace(rows=tuple(new), index=state.index + 1)


class ExtendedPrompt(NamedTuple):
    """A prompt with the tokens before it: see `Decoder.prefill`, whose arguments these are."""

    mask: Bool[Array, "b s"]
    position_ids: Int[Array, "b s"]
    total_length: Int[Array, ""]


def extended_prompt(
    shape: tuple[int, ...], mask: Int[Array, "b l"] | None, past: PrefixCache | None, capacity: int
) -> ExtendedPrompt:
    """shape: (b, l) of the new tokens. capacity: the number of tokens to be generated."""
    new = jnp.ones(shape, bool) if mask is None else mask.astype(bool)
    joined = new if past is None else jnp.concatenate([past.mask, new], -1)
    length = joined.sum(-1, dtype=jnp.int32).max() + capacity - 1  # no step processes the last new token
    return ExtendedPrompt(joined, token_positions(joined), length)


def last_states(x: Float[Array, "b l d"], mask: Bool[Array, "b l"]) -> Float[Array, "b d"]:
    """The state of each row's last token."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=-1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def new_slots(config: DecoderConfig, b: int, rows: int, capacity: int, dtype: Any) -> tuple[KeyValues, ...]:
    """Each layer's slots for generated tokens."""
    return (kv_cache.empty(b, rows, config.kv_heads, capacity, config.head_width, dtype),) * config.depth


def remember(state: DecodeState, row: int = 0, size: int | None = None) -> PrefixCache:
    """The prompt and the new tokens of one row of a generation, as the `past` of the next prompt.

    size: slots of the result, tokens first; at least as many as there are tokens. None: as many as there were slots.
    The last token that was chosen is not in it: no step has read it.
    """
    past: PrefixCache = state.items
    written = jnp.arange(state.rows[0].k.shape[1]) < state.index
    mask = jnp.concatenate([past.mask, jnp.broadcast_to(written, (past.mask.shape[0], written.shape[0]))], -1)
    order = jnp.argsort(~mask, axis=-1, stable=True)[:, :size]
    extra = 0 if size is None else max(size - mask.shape[1], 0)

    def gather(prompt: Array, new: Array) -> Array:
        new = rearrange(new, "(b r g) t k -> b r g t k", b=prompt.shape[0], g=prompt.shape[1])[:, row]
        joined = jnp.concatenate([prompt, new], axis=2)
        tokens_first = jnp.take_along_axis(joined, order[:, None, :, None], axis=2)
        return jnp.pad(tokens_first, ((0, 0), (0, 0), (0, extra), (0, 0)))

    caches = tuple(
        LayerCache(KeyValues(*(gather(*pair) for pair in zip(cache.prompt, new))))
        for cache, new in zip(past.caches, state.rows)
    )
    mask = jnp.pad(jnp.take_along_axis(mask, order, -1), ((0, 0), (0, extra)))
    return PrefixCache(caches, mask, token_positions(mask))


def empty_prefix(config: DecoderConfig, size: int) -> PrefixCache:
    """A past of one item with no token in it, so that a first turn runs the program of the later ones."""
    zeros = jnp.zeros((1, config.kv_heads, size, config.head_width), config.dtype)
    mask = jnp.zeros((1, size), bool)
    return PrefixCache((LayerCache(KeyValues(zeros, zeros)),) * config.depth, mask, token_positions(mask))


compiled_remember = functools.partial(jax.jit, static_argnums=1)(lambda state, size: remember(state, 0, size))
"""`remember` for the first row of a generation, compiled for each size."""
