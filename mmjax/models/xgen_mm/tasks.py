"""XGenMMModel: answers, and chats, about images."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import linen as nn

from mmjax.channels import HALF
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.generation.decodable import DecodeState
from mmjax.interface.chat import ChatPrompt
from mmjax.interface.vision_language import VisionLanguageModel
from mmjax.models.language.decode import PrefixCache, compiled_remember, empty_prefix
from mmjax.models.llava.templates import message_text
from mmjax.models.vision_language.any_resolution import as_sizes, split_pictures
from mmjax.models.vision_language.decode import LanguageSteps
from mmjax.models.vision_language.network import VisionLanguage, VisionLanguageConfig
from mmjax.models.xgen_mm.index import picture_tokens
from mmjax.models.xgen_mm.template import ADDED, PAD, Phi3Template
from mmjax.text.chat_template import Message
from mmjax.text.tokenizer import Tokenizer
from mmjax.types import Array


class XGenMMModel(VisionLanguageModel):
    """A loaded xGen-MM (BLIP-3), version 1.5.

        model = mmjax.load("Salesforce/xgen-mm-phi3-mini-instruct-singleimg-r-v1.5")
        model.answer([image], ["What is it?"])
        model.chat("What is it?", images=[image])

    An image is `<image>` in a string; in ids it is 128 ids `config.image_token` for the whole image and as many for
    each of its tiles. Ids, masks and logits are of this expanded sequence.
    """

    system: ClassVar[str] = "xgen_mm"
    config_class: ClassVar[type] = VisionLanguageConfig

    @classmethod
    def build(cls, config: VisionLanguageConfig) -> nn.Module:
        return VisionLanguage(config)

    @classmethod
    def default_preprocess(cls, config: VisionLanguageConfig, layout: str) -> ImagePreprocessing:
        """Tiles on black, bicubic, to [-1, 1]."""
        side = config.vision.image_size[0]
        return ImagePreprocessing(side, (side, side), "floor", mean=HALF, std=HALF, grids=config.grids)

    @classmethod
    def load_tokenizer(cls, file: pathlib.Path) -> Tokenizer | None:
        """Phi-3's, with `<pad>` if it has no padding of its own, and with the tokens of images, as the original adds
        them when it starts (factory.py:115-120)."""
        tokenizer: Any = super().load_tokenizer(file)
        return None if tokenizer is None else with_added_tokens(tokenizer)

    @property
    def eos(self) -> tuple[int, ...]:
        """The ids of the config, and `<|end|>`, which ends each answer."""
        end = None if self.tokenizer is None else self.tokenizer.tokenizer.token_to_id(self.template.stop)
        return tuple(dict.fromkeys((*super().eos, *([] if end is None else [end]))))

    @functools.cached_property
    def template(self) -> Phi3Template:
        return Phi3Template()

    # ---------------------------------------------------------------------------------------------------------- images

    def pictures(self, inputs: Mapping[str, Array]) -> tuple[Array, list[np.ndarray]]:
        """The whole image and its tiles, and the features of one after the other."""
        return split_pictures(self.config, inputs["pixel_values"], inputs.get("image_sizes"))

    def connector_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The resampler's tokens of each picture, and which of them show the image."""
        index, mask = picture_tokens(self.config, as_sizes(inputs["image_sizes"]))
        return {"token_index": jnp.asarray(index), "token_mask": jnp.asarray(mask)}

    # -------------------------------------------------------------------------------------------------- conversations

    def decodable(self) -> LanguageSteps:
        return LanguageSteps(self.config.decoder)

    def chat_prompt(self, messages: Sequence[Message]) -> ChatPrompt:
        """Phi-3's form; a first message of the system replaces the default text. Raises MmjaxError without a
        tokenizer."""
        if self.tokenizer is None:
            raise MmjaxError("a chat needs a tokenizer")
        system = [message_text(message) for message in messages if message.get("role") == "system"]
        turns = [message_text(message) for message in messages if message.get("role") != "system"]
        template = dataclasses.replace(self.template, system=system[0]) if system else self.template
        known = self.tokenizer.tokenizer.token_to_id(template.stop) is not None
        return ChatPrompt(template.prompt([*turns, None]), True, () if known else (template.stop,))

    def empty_past(self, size: int) -> PrefixCache:
        return empty_prefix(self.config.decoder, size)

    def remember(self, state: DecodeState, size: int) -> PrefixCache:
        return compiled_remember(state, size)

    @property
    def reuses(self) -> bool:
        return not self.config.language.keys_depend_on_length


def with_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A copy with the tokens of `ADDED`, before them `<pad>` where padding is missing or ends a text."""
    library = tokenizers.Tokenizer.from_str(tokenizer.tokenizer.to_str())
    special = dict(tokenizer.special)
    if library.token_to_id(ADDED[0]) is None and special.get("pad_token") in (None, special.get("eos_token")):
        special["pad_token"] = PAD
        library.add_special_tokens([PAD])
    library.add_special_tokens([name for name in ADDED if library.token_to_id(name) is None])
    return dataclasses.replace(tokenizer, tokenizer=library, special=special)
