"""LanguageModel: continues texts, and chats."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.generation.decodable import DecodeState
from mmjax.interface.chat import ChatModel, ChatPrompt
from mmjax.interface.inputs import TEXTS, Input
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.decode import DecoderSteps, PrefixCache, compiled_remember, empty_prefix
from mmjax.models.language.network import Decoder
from mmjax.text.chat_template import Message
from mmjax.types import Array


class LanguageModel(ChatModel):
    """A decoder-only language model with its weights."""

    system: ClassVar[str] = "language"
    config_class: ClassVar[type] = DecoderConfig
    int8_channels: ClassVar[Mapping[str, int]] = {"**/kernel": 1, "token_embedding": 0}

    @classmethod
    def build(cls, config: DecoderConfig) -> nn.Module:
        return Decoder(config)

    @classmethod
    def inputs(cls, config: DecoderConfig) -> Mapping[str, Input]:
        return TEXTS

    @classmethod
    def example(cls, config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
        return {"input_ids": jax.ShapeDtypeStruct((1, 8), jnp.int32)}

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """logits float32 [b, l, v]; last_hidden_state [b, l, d], after the last norm; hidden_states: all depth + 1."""
        self.check_room(inputs["input_ids"].shape[1], 0)
        outputs: Any = self.module.apply(variables, inputs["input_ids"], inputs.get("attention_mask"))
        states = tuple(outputs["states"])
        return {"logits": outputs["logits"], "last_hidden_state": states[-1], "hidden_states": states}

    def decodable(self) -> DecoderSteps:
        return DecoderSteps(Decoder(self.config))

    def beginning(self) -> int:
        bos = self.config.bos if self.tokenizer is None or self.tokenizer.bos is None else self.tokenizer.bos
        if bos is None:
            raise MmjaxError("generate needs prompts: this model has no token that a text begins with (bos)")
        return bos

    # ---------------------------------------------------------------------------------------------------- conversations

    def chat_prompt(self, messages: Sequence[Message]) -> ChatPrompt:
        if self.tokenizer is None:
            raise MmjaxError("a chat needs a tokenizer with a chat template")
        return ChatPrompt(self.tokenizer.chat(messages))

    def empty_past(self, size: int) -> PrefixCache:
        return empty_prefix(self.config, size)

    def remember(self, state: DecodeState, size: int) -> PrefixCache:
        return compiled_remember(state, size)

    @property
    def reuses(self) -> bool:
        return not self.config.keys_depend_on_length
