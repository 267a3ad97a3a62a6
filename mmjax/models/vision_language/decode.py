"""The language model of a `VisionLanguage` before the generation engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmjax.generation.decodable import Decodable, DecodeState
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.decode import DecoderSteps
from mmjax.models.language.network import Decoder
from mmjax.models.t5.decoding import T5Decodable
from mmjax.models.t5.network import T5Config
from mmjax.types import Array, Float, Int


@dataclass(frozen=True)
class LanguageSteps:
    """A `mmjax.generation.decodable.Decodable` over the part `language` of the parameters: `DecoderSteps`, or
    `T5Decodable`, which gets the prompts as its encoder's.

    Its inputs are those of `DecoderSteps`, of an encoder-decoder with decoder_input_ids; images are in `inputs_embeds`,
    so that no program depends on their number.
    """

    config: DecoderConfig | T5Config

    def prefill(
        self, variables: Mapping[str, Any], inputs: Mapping[str, Any], rows: int, capacity: int
    ) -> tuple[Float[Array, "b v"], DecodeState]:
        if isinstance(self.config, T5Config):  # which takes either ids or embeddings
            inputs = {name: value for name, value in inputs.items() if name != "input_ids"}
        return self._steps.prefill(_language(variables), inputs, rows, capacity)

    def step(
        self, variables: Mapping[str, Any], ids: Int[Array, "b r"], state: DecodeState
    ) -> tuple[Float[Array, "b r v"], DecodeState]:
        return self._steps.step(_language(variables), ids, state)

    @property
    def _steps(self) -> Decodable:
        return T5Decodable(self.config) if isinstance(self.config, T5Config) else DecoderSteps(Decoder(self.config))


def _language(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {"params": variables["params"]["language"]}
