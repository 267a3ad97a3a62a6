"""T5Model: text to text, and forward on arrays."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.interface.generation import GeneratingModel
from mmjax.interface.inputs import Input
from mmjax.models.t5.decoding import T5Decodable
from mmjax.models.t5.network import T5, T5Config
from mmjax.text.batches import Side
from mmjax.types import Array


class T5Model(GeneratingModel):
    """A T5 or Flan-T5 with its weights, or an encoder alone."""

    system: ClassVar[str] = "t5"
    config_class: ClassVar[type] = T5Config
    int8_channels: ClassVar[Mapping[str, int]] = {"**/kernel": 1, "embedding": 0, "head": 0}

    padding_side: ClassVar[Side] = "right"

    @classmethod
    def build(cls, config: T5Config) -> nn.Module:
        return T5(config)

    @classmethod
    def inputs(cls, config: T5Config) -> Mapping[str, Input]:
        texts = {"input_ids": Input("b l"), "attention_mask": Input("b l"), "inputs_embeds": Input("b l d", "float")}
        return texts | ({"decoder_input_ids": Input("b t")} if config.decoder_depth else {})

    @classmethod
    def example(cls, config: T5Config) -> dict[str, jax.ShapeDtypeStruct]:
        names = ("input_ids", "decoder_input_ids") if config.decoder_depth else ("input_ids",)
        return {name: jax.ShapeDtypeStruct((1, 3), jnp.int32) for name in names}

    def decodable(self) -> T5Decodable:
        """The `Decodable` for generation. Raises MmjaxError for an encoder alone."""
        return T5Decodable(self.config)

    def prompt_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        start = jnp.full((len(inputs["input_ids"]), 1), self.config.start, jnp.int32)
        return {**inputs, "decoder_input_ids": start}

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """logits [b, l, v] of `decoder_input_ids`, which begin with the start token, and what leads there:
        decoder_hidden_states, encoder_hidden_states (depth + 1 arrays), encoder_last_hidden_state.

        Without decoder_input_ids the encoder's alone; of an encoder alone last_hidden_state and hidden_states.
        """
        names = ("input_ids", "decoder_input_ids", "attention_mask", "inputs_embeds")
        out: Any = self.module.apply(variables, *(inputs.get(name) for name in names))
        states = tuple(out["encoder"])
        if not self.config.decoder_depth:
            return {"last_hidden_state": states[-1], "hidden_states": states}
        result = {"encoder_last_hidden_state": states[-1], "encoder_hidden_states": states}
        if "logits" in out:
            result |= {"logits": out["logits"], "decoder_hidden_states": tuple(out["decoder"])}
        return result
