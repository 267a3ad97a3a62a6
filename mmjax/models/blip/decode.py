"""BLIP's decoder as the generation engine runs it: captions of images, answers to questions about them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.generation.decodable import DecodeState
from mmjax.models.bert.decode import BertDecodable
from mmjax.models.blip.network import Blip, BlipConfig
from mmjax.types import Array, Float, Int


@dataclass(frozen=True)
class BlipDecodable:
    """A `mmjax.generation.decodable.Decodable`. An image is encoded once, whatever the number of beams.

    Inputs of captions: pixel_values; input_ids [b, l], the prompt with [DEC] first; attention_mask [b, l].
    Inputs of answers (`config.answers`): pixel_values; input_ids, attention_mask [b, l], the question with [ENC] first;
    decoder_input_ids [b, t], [DEC] first; encoder_attention_mask [b, l]: which states of the question the decoder
    attends to, without it to all, padding too.
    """

    config: BlipConfig

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without a decoder."""
        if self.config.decoder is None:
            raise MmjaxError("this blip has no decoder: pre-trained ones, captioners and those of VQA have one")

    @property
    def decoder(self) -> BertDecodable:
        c = self.config
        assert c.decoder is not None
        return BertDecodable(replace(c.decoder, dtype=c.dtype))

    def prefill(
        self, variables: Mapping[str, Any], inputs: Mapping[str, Array], rows: int, capacity: int
    ) -> tuple[Float[Array, "b v"], DecodeState]:
        """Raises MmjaxError if the prompt and `capacity` tokens are more than there are positions."""

        def apply(name: str, *arrays: Any) -> Any:
            return Blip(self.config).apply(variables, *arrays, method=name)

        context = apply("encode_image", inputs["pixel_values"])
        names = ["input_ids", "attention_mask"]
        decoder_inputs = {name: inputs[name] for name in names if name in inputs}
        if self.config.answers:
            context = apply("encode_multimodal", inputs["input_ids"], inputs.get("attention_mask"), context)
            decoder_inputs = {"input_ids": inputs["decoder_input_ids"]}
            if "encoder_attention_mask" in inputs:
                decoder_inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"]
        decoder_inputs["encoder_hidden_states"] = context
        return self.decoder.prefill(_decoder(variables), decoder_inputs, rows, capacity)

    def step(
        self, variables: Mapping[str, Any], ids: Int[Array, "b r"], state: DecodeState
    ) -> tuple[Float[Array, "b r v"], DecodeState]:
        return self.decoder.step(_decoder(variables), ids, state)


def _decoder(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {"params": variables["params"]["decoder"]}
