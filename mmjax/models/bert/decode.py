"""A causal BERT as the generation engine runs it: the answer and caption decoders of ALBEF and BLIP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.generation.decodable import DecodeState
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.nn import kv_cache
from mmjax.types import Array, Float, Int


@dataclass(frozen=True)
class BertDecodable:
    """A `mmjax.generation.decodable.Decodable` over the parameters of a `Bert`.

    Inputs: input_ids [b, l], the prompt; attention_mask [b, l] where it is padded; encoder_hidden_states [b, s, e], the
    context of cross attention, if there is one; encoder_attention_mask [b, s] where that is padded.
    """

    config: BertConfig

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network that cannot generate."""
        if not (self.config.causal and self.config.mlm):
            raise MmjaxError(f"bert: causal={self.config.causal}, mlm={self.config.mlm}: a decoder needs both")

    def prefill(
        self, variables: Mapping[str, Any], inputs: Mapping[str, Array], rows: int, capacity: int
    ) -> tuple[Float[Array, "b v"], DecodeState]:
        """Raises MmjaxError if the prompt and `capacity` tokens are more than there are positions."""
        c, ids = self.config, inputs["input_ids"]
        if ids.shape[1] + capacity > c.positions:
            raise MmjaxError(f"{ids.shape[1]} + {capacity} new tokens are more than positions={c.positions}")
        mask = inputs.get("attention_mask", jnp.ones_like(ids)).astype(bool)
        context, context_mask = inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask")
        context_mask = None if context_mask is None else context_mask.astype(bool)
        outputs: Any = Bert(c).apply(variables, ids, mask, context, context_mask, method="prefill")
        logits, caches = outputs
        new = kv_cache.empty(len(ids), rows, c.heads, capacity, c.width // c.heads, jnp.dtype(c.dtype))
        items = {"caches": caches, "mask": mask, "context_mask": context_mask}
        return logits, DecodeState(items, [new] * c.depth, jnp.int32(0))

    def step(
        self, variables: Mapping[str, Any], ids: Int[Array, "b r"], state: DecodeState
    ) -> tuple[Float[Array, "b r v"], DecodeState]:
        items, index = state.items, state.index
        masks = items["mask"], items["context_mask"]
        outputs: Any = Bert(self.config).apply(
            variables, ids, items["caches"], state.rows, index, *masks, method="step"
        )
        logits, new = outputs
        return logits, DecodeState(items, new, index + 1)
