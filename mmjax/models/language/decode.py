"""The decoder before the generation engine: its prompt once, then a token at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from einops import rearrange

from mmjax.generation.decodable import DecodeState
from mmjax.models.language.network import Decoder, DecoderConfig, token_places
from mmjax.nn import kv_cache
from mmjax.nn.kv_cache import KeyValues
from mmjax.types import Array, Bool, Float, Int


class Past(NamedTuple):
    """What has been read: a layer's keys and values, which of them are tokens, and their places."""

    layers: tuple[KeyValues, ...]
    mask: Bool[Array, "b s"]
    places: Int[Array, "b s"]


@dataclass(frozen=True)
class DecoderSteps:
    """A `mmjax.generation.decodable.Decodable`.

    Its inputs: `input_ids` [b, l] or `inputs_embeds` [b, l, d] (a prefix that is no text, and whatever text is around
    it, embedded by the caller), `attention_mask` [b, l], and `past`, what `remember` made of an earlier generation.
    """

    config: DecoderConfig

    def prefill(
        self, variables: Mapping[str, Any], inputs: Mapping[str, Any], rows: int, capacity: int
    ) -> tuple[Float[Array, "b v"], DecodeState]:
        module, c = Decoder(self.config), self.config
        x = inputs.get("inputs_embeds")
        if x is None:
            x = module.apply(variables, inputs["input_ids"], method="embed")
        x = jnp.asarray(x, c.dtype)
        own = inputs.get("attention_mask")
        own = jnp.ones(x.shape[:2], bool) if own is None else own.astype(bool)
        past: Past | None = inputs.get("past")
        mask = own if past is None else jnp.concatenate([past.mask, own], -1)
        places = token_places(mask)
        layers = None if past is None else past.layers
        reach = mask.sum(-1, dtype=jnp.int32).max() + capacity - 1  # the last new token is not read
        states, kept = module.apply(variables, x, mask, places, layers, reach, method="run")
        last = own.shape[1] - 1 - jnp.argmax(own[:, ::-1], axis=-1)
        final = jnp.take_along_axis(states[-1], last[:, None, None], axis=1)[:, 0]
        logits = module.apply(variables, final, method="logits")
        room = tuple(
            kv_cache.empty(x.shape[0], rows, c.kv_heads, capacity, c.head_width, x.dtype) for _ in range(c.depth)
        )
        return logits, DecodeState(Past(kept, mask, places), room, jnp.int32(0))  # type: ignore[return-value]

    def step(
        self, variables: Mapping[str, Any], ids: Int[Array, "b r"], state: DecodeState
    ) -> tuple[Float[Array, "b r v"], DecodeState]:
        past: Past = state.items
        logits, rows = Decoder(self.config).apply(
            variables, ids, past.layers, past.mask, past.places, state.rows, state.index, method="step"
        )
        return logits, state._replace(rows=rows, index=state.index + 1)


def remember(state: DecodeState, row: int = 0, size: int | None = None) -> Past:
    """What a generation has read and written in one of its rows, as the `past` of the next prompt.

    size: slots of the result, tokens first; at least as many as there are tokens. None: as many as there were slots.
    The last token that was chosen is not in it: it has not been read.
    """
    past: Past = state.items
    written = jnp.arange(state.rows[0].k.shape[1]) < state.index
    mask = jnp.concatenate([past.mask, jnp.broadcast_to(written, (past.mask.shape[0], written.shape[0]))], -1)
    order = jnp.argsort(~mask, axis=-1, stable=True)[:, :size]
    room = 0 if size is None else max(size - mask.shape[1], 0)

    def gather(prompt: Array, new: Array) -> Array:
        own = rearrange(new, "(b r g) t k -> b r g t k", b=prompt.shape[0], g=prompt.shape[1])[:, row]
        joined = jnp.concatenate([prompt, own], axis=2)
        kept = jnp.take_along_axis(joined, order[:, None, :, None], axis=2)
        return jnp.pad(kept, ((0, 0), (0, 0), (0, room), (0, 0)))

    layers = tuple(
        KeyValues(gather(prompt.k, new.k), gather(prompt.v, new.v)) for prompt, new in zip(past.layers, state.rows)
    )
    mask = jnp.pad(jnp.take_along_axis(mask, order, -1), ((0, 0), (0, room)))
    return Past(layers, mask, token_places(mask))


def nothing(config: DecoderConfig, size: int) -> Past:
    """A past of one item with no token in it, so that a first turn runs the program of the later ones."""
    zeros = jnp.zeros((1, config.kv_heads, size, config.head_width), config.dtype)
    mask = jnp.zeros((1, size), bool)
    return Past(tuple(KeyValues(zeros, zeros) for _ in range(config.depth)), mask, token_places(mask))
