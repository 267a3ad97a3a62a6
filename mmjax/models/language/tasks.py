"""The handle of the language models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.models.handle import Model
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.decode import DecoderSteps
from mmjax.models.language.network import Decoder, check_length
from mmjax.types import Array


@dataclass
class LanguageModel(Model):
    """A decoder-only language model with its weights."""

    system: ClassVar[str] = "language"
    config_class: ClassVar[type] = DecoderConfig

    @classmethod
    def build(cls, config: DecoderConfig) -> nn.Module:
        return Decoder(config)

    @classmethod
    def example(cls, config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
        return {"input_ids": jax.ShapeDtypeStruct((1, 8), jnp.int32)}

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """logits float32 [b, l, v]; last_hidden_state [b, l, d], after the last norm; hidden_states, depth + 1 of it."""
        if "input_ids" not in inputs:
            raise MmjaxError("a language model's forward needs input_ids")
        check_length(self.config, inputs["input_ids"].shape[1])
        told: Any = self.module.apply(variables, inputs["input_ids"], inputs.get("attention_mask"))
        states = tuple(told["states"])
        return {"logits": told["logits"], "last_hidden_state": states[-1], "hidden_states": states}

    def decodable(self) -> DecoderSteps:
        """What the generation engine runs."""
        return DecoderSteps(self.config)
