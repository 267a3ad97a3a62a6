"""Flamingo before the generation engine: the media's keys and values are computed once, in the prompt's pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.generation.decodable import DecodeState
from mmjax.models.flamingo.config import FlamingoConfig
from mmjax.models.flamingo.network import Flamingo, MediaCache
from mmjax.models.language.decode import PrefixCache, extended_prompt, last_states, new_slots
from mmjax.types import Array, Float, Int


class FlamingoCache(NamedTuple):
    """The tokens so far, and the media so far; leaves [b, ...]."""

    text: PrefixCache
    media: MediaCache


@dataclass(frozen=True)
class FlamingoSteps:
    """A `mmjax.generation.decodable.Decodable` over the parameters of a `Flamingo`.

    Its inputs: `input_ids` [b, l]; `attention_mask` [b, l]; `media` [b, t, q, e], from `Flamingo.encode_media`, absent
    where no prompt has any; `image_attention_mask` [b, l, t], of past and new media, where it is not determined by
    `<image>` alone; and `past`, a `FlamingoCache` of one item, which precedes every prompt.
    """

    config: FlamingoConfig

    def prefill(
        self, variables: Mapping[str, Any], inputs: Mapping[str, Any], rows: int, capacity: int
    ) -> tuple[Float[Array, "b v"], DecodeState]:
        module, c = Flamingo(self.config), self.config.decoder
        ids, media = inputs["input_ids"], inputs.get("media")
        past: FlamingoCache | None = inputs.get("past")
        past = None if past is None else _repeated(past, len(ids))  # one prefix for all prompts
        x: Any = module.apply(variables, ids, method="embed")
        prompt = extended_prompt(ids.shape, inputs.get("attention_mask"), past and past.text, capacity)
        arrays = (x, ids == self.config.image_token, media, prompt.mask, prompt.position_ids)
        caches = (None, None) if past is None else (past.text.caches, past.media)
        image_mask = inputs.get("image_attention_mask")
        outputs: Any = module.apply(variables, *arrays, *caches, prompt.total_length, image_mask, method="prefill")
        final = last_states(outputs[0], prompt.mask[:, -ids.shape[1] :])
        logits: Any = module.apply(variables, final, method="logits")
        text = PrefixCache(tuple(outputs[1]), prompt.mask, prompt.position_ids)
        slots = new_slots(c, len(ids), rows, capacity, x.dtype)
        return logits, DecodeState(FlamingoCache(text, outputs[2]), slots, jnp.int32(0))

    def step(
        self, variables: Mapping[str, Any], ids: Int[Array, "b r"], state: DecodeState
    ) -> tuple[Float[Array, "b r v"], DecodeState]:
        past: FlamingoCache = state.items
        arrays = (ids, past.media, *past.text, state.rows, state.index)
        outputs: Any = Flamingo(self.config).apply(variables, *arrays, method="step")
        logits, new = outputs
        return logits, state._replace(rows=tuple(new), index=state.index + 1)


def encode_prefix(config: FlamingoConfig, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> FlamingoCache:
    """The cache of one prompt, the input `past` of those that continue it."""
    return FlamingoSteps(config).prefill(variables, inputs, 1, 1)[1].items


def answer_scores(
    config: FlamingoConfig,
    variables: Mapping[str, Any],
    inputs: Mapping[str, Any],
    answer_ids: Int[Array, "n t"],
    answer_mask: Int[Array, "n t"],
    k: int,
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """(indices of answers, mean log-probability of their tokens), of the k with the most probable first token.

    inputs: of `FlamingoSteps.prefill`. Each prompt is processed once, then its answers over its cache, padded on the
    right. (open_flamingo's eval/evaluate.py ranks class names so, normalize_length=True.)
    """
    module = Flamingo(config)
    logits, state = FlamingoSteps(config).prefill(variables, inputs, 1, answer_ids.shape[1])
    first, indices = jax.lax.top_k(jax.nn.log_softmax(logits)[:, answer_ids[:, 0]], k)

    def score(arrays: tuple[FlamingoCache, Array, Array]) -> Float[Array, " k"]:
        cache, chosen, log_probs = arrays
        past = _repeated(jax.tree.map(lambda leaf: leaf[None], cache), k)
        ids, mask = answer_ids[chosen], answer_mask[chosen]
        x: Any = module.apply(variables, ids, method="embed")
        prompt = extended_prompt(ids.shape, mask, past.text, 1)
        texts = (prompt.mask, prompt.position_ids, past.text.caches, past.media, prompt.total_length)
        # Of a text that has ended, its answer attends to no image either.
        visible = None if config.end_of_text is None else jnp.repeat(past.media.visible[:, None], ids.shape[1], 1)
        states: Any = module.apply(variables, x, jnp.zeros(ids.shape, bool), None, *texts, visible, method="prefill")
        later: Any = module.apply(variables, states[0][:, :-1], method="logits")
        later = jnp.take_along_axis(jax.nn.log_softmax(later), ids[:, 1:, None], axis=-1)[..., 0]
        return (log_probs + (later * mask[:, 1:]).sum(1)) / mask.sum(1)

    return indices, jax.lax.map(score, (state.items, indices, first))


def _repeated(cache: FlamingoCache, size: int) -> FlamingoCache:
    """The cache of one item for `size` items."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape[1:])), cache)
