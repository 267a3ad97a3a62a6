"""T5 as a `Decodable` for the generation engine."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.generation.decodable import DecodeState
from mmjax.models.t5.network import T5, T5Config
from mmjax.types import Array, Float, Int


@dataclass(frozen=True)
class T5Decodable:
    """A `mmjax.generation.decodable.Decodable`.

    Inputs: input_ids or inputs_embeds, attention_mask if any of them is padding, and decoder_input_ids where more than
    `start` is to be read first; they are unpadded and have the start token within.
    """

    config: T5Config

    def __post_init__(self) -> None:
        """Raises MmjaxError for an encoder alone."""
        if not self.config.decoder_depth:
            raise MmjaxError("this T5 is an encoder alone (decoder_depth=0): it generates nothing")

    @property
    def module(self) -> T5:
        return T5(dataclasses.replace(self.config, remat=False))

    def prefill(
        self, variables: Mapping[str, Any], inputs: Mapping[str, Array], rows: int, capacity: int
    ) -> tuple[Float[Array, "b v"], DecodeState]:
        result: Any = self.module.apply(variables, inputs, rows, capacity, method="prefill")
        return result

    def step(
        self, variables: Mapping[str, Any], ids: Int[Array, "b r"], state: DecodeState
    ) -> tuple[Float[Array, "b r v"], DecodeState]:
        result: Any = self.module.apply(variables, ids, state, method="step")
        return result
