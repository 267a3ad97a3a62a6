"""LlavaModel: answers, and chats, about images."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import numpy as np
from flax import linen as nn

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.generation.decodable import DecodeState
from mmjax.interface.chat import ChatPrompt
from mmjax.interface.vision_language import VisionLanguageModel
from mmjax.models.language.decode import PrefixCache, compiled_remember, empty_prefix
from mmjax.models.llava.templates import adds_special_tokens, chat_messages, message_text, template_called
from mmjax.models.vision_language.any_resolution import split_pictures
from mmjax.models.vision_language.decode import LanguageSteps
from mmjax.models.vision_language.network import VisionLanguage, VisionLanguageConfig
from mmjax.text.chat_template import Message
from mmjax.types import Array


class LlavaModel(VisionLanguageModel):
    """LLaVA v1, 1.5 and 1.6 with its weights."""

    system: ClassVar[str] = "llava"
    config_class: ClassVar[type] = VisionLanguageConfig

    @classmethod
    def build(cls, config: VisionLanguageConfig) -> nn.Module:
        return VisionLanguage(config)

    @classmethod
    def default_preprocess(cls, config: VisionLanguageConfig, layout: str) -> ImagePreprocessing:
        side = config.vision.image_size[0]
        if config.grids:
            return dataclasses.replace(ImagePreprocessing.llava_tiles(side), grids=config.grids)
        return ImagePreprocessing.llava(side) if config.pad_images else ImagePreprocessing.clip(side)

    # ---------------------------------------------------------------------------------------------------------- images

    def pictures(self, inputs: Mapping[str, Array]) -> tuple[Array, list[np.ndarray]]:
        """Without tiles, the pictures of an image one after the other; with them its grid, see `config.merge`."""
        return split_pictures(self.config, inputs["pixel_values"], inputs.get("image_sizes"))

    # -------------------------------------------------------------------------------------------------- conversations

    def decodable(self) -> LanguageSteps:
        return LanguageSteps(self.config.decoder)

    def chat_prompt(self, messages: Sequence[Message]) -> ChatPrompt:
        """By `config.template`, else by the tokenizer's template.

        Raises MmjaxError if there is neither.
        """
        if self.tokenizer is None:
            raise MmjaxError("a chat needs a tokenizer")
        if not self.config.template:
            text = self.tokenizer.chat(chat_messages(self.tokenizer, messages))
            return ChatPrompt(text, adds_special_tokens(self.tokenizer, text))
        template = template_called(self.config.template)
        system = [message_text(message) for message in messages if message.get("role") == "system"]
        turns = [message_text(message) for message in messages if message.get("role") != "system"]
        if system:
            template = dataclasses.replace(template, system=system[0])
        text = template.prompt([*turns, None], examples=True)
        ends = {self.tokenizer.tokenizer.token_to_id(template.stop)} & set(self.eos)
        return ChatPrompt(text, True, () if ends else (template.stop,))

    def empty_past(self, size: int) -> PrefixCache:
        return empty_prefix(self.config.decoder, size)

    def remember(self, state: DecodeState, size: int) -> PrefixCache:
        return compiled_remember(state, size)

    @property
    def reuses(self) -> bool:
        return not self.config.language.keys_depend_on_length

    # ---------------------------------------------------------------------------------------------------------- layouts

    def for_layout(self, layout: str) -> Self:
        """Hugging Face's has an id of the vocabulary for an image."""
        return self.with_image_id() if layout == "hf" and self.config.image_token < 0 else self
