"""BLIP-2's Q-Former as the generation engine runs it: captions of images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.generation.decodable import DecodeState
from mmjax.models.blip2.network import Blip2, Blip2Config
from mmjax.nn import kv_cache
from mmjax.types import Array, Float, Int


@dataclass(frozen=True)
class Blip2Decodable:
    """A `mmjax.generation.decodable.Decodable`. An image is encoded, and its queries run, once for all beams.

    Inputs: pixel_values; input_ids [b, l], the prompt with [DEC] first; attention_mask [b, l] where it is padded.
    """

    config: Blip2Config

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without an LM head."""
        if not self.config.qformer.mlm:
            raise MmjaxError(
                "this blip2 has no LM head: LAVIS' files of the first stage have one, Hugging Face's do not"
            )

    def prefill(
        self, variables: Mapping[str, Any], inputs: Mapping[str, Array], rows: int, capacity: int
    ) -> tuple[Float[Array, "b v"], DecodeState]:
        """Raises MmjaxError if the prompt and `capacity` tokens are more than there are positions."""
        c, ids = self.config.qformer, inputs["input_ids"]
        if ids.shape[1] + capacity > c.positions:
            raise MmjaxError(f"{ids.shape[1]} + {capacity} new tokens are more than positions={c.positions}")
        mask = inputs.get("attention_mask", jnp.ones_like(ids))
        network = Blip2(self.config)
        tokens = network.apply(variables, inputs["pixel_values"], method="encode_image")
        outputs: Any = network.apply(variables, ids, mask, tokens, method="prefill")
        logits, caches = outputs
        new = kv_cache.empty(len(ids), rows, c.heads, capacity, c.width // c.heads, jnp.dtype(self.config.dtype))
        return logits, DecodeState({"caches": caches, "mask": mask}, [new] * c.depth, jnp.int32(0))

    def step(
        self, variables: Mapping[str, Any], ids: Int[Array, "b r"], state: DecodeState
    ) -> tuple[Float[Array, "b r v"], DecodeState]:
        items, index = state.items, state.index
        arrays = (ids, items["caches"], state.rows, index, items["mask"])
        outputs: Any = Blip2(self.config).apply(variables, *arrays, method="step")
        logits, new = outputs
        return logits, DecodeState(items, new, index + 1)
