"""LanguageModel: continues texts, and chats."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.interface.generation import GeneratingModel
from mmjax.interface.inputs import TEXTS, Input
from mmjax.models.language.config import DecoderConfig, Learned
from mmjax.models.language.decode import DecoderSteps
from mmjax.models.language.network import Decoder
from mmjax.types import Array

Message = Mapping[str, Any]


class LanguageModel(GeneratingModel):
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

    @property
    def max_prompt_length(self) -> int | None:
        return self.config.context if isinstance(self.config.positions, Learned) else None

    def check_room(self, length: int, new_tokens: int) -> None:
        if isinstance(self.config.positions, Learned) and length + new_tokens > self.config.context:
            lengths = f"{length} ids of prompt" + (f" and {new_tokens} new ones" if new_tokens else "")
            raise MmjaxError(f"{lengths} are more than this model has positions for ({self.config.context})")

    # ---------------------------------------------------------------------------------------------------- conversations

    def chat(self, messages: str | Sequence[Message], **options: Any) -> str:
        """The assistant's next turn.

        messages: the user's message, or a conversation so far: [{"role": "user", "content": "..."}, ...].
        options: as of `generate`. Raises MmjaxError where the tokenizer has no chat template.
        """
        return self.generate(self._conversation(messages), add_special_tokens=False, **options)

    def stream_chat(self, messages: str | Sequence[Message], **options: Any) -> Iterator[str]:
        """The same, piece by piece; see `stream`."""
        return self.stream(self._conversation(messages), add_special_tokens=False, **options)

    def _conversation(self, messages: str | Sequence[Message]) -> str:
        if self.tokenizer is None:
            raise MmjaxError("a chat needs a tokenizer with a chat template")
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return self.tokenizer.chat(conversation)
