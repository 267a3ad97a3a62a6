"""LlavaModel: answers, and chats, about images."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tokenizers import AddedToken, Tokenizer

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.tiles import best_grid
from mmjax.errors import MmjaxError
from mmjax.generation.decodable import DecodeState
from mmjax.interface.chat import ChatPrompt
from mmjax.interface.vision_language import VisionLanguageModel
from mmjax.models.language.decode import PrefixCache, compiled_remember, empty_prefix
from mmjax.models.llava.any_resolution import spatial_rows, tile_count
from mmjax.models.llava.templates import adds_special_tokens, chat_messages, message_text, template_called
from mmjax.models.vision_language.decode import LanguageSteps
from mmjax.models.vision_language.network import VisionLanguage, VisionLanguageConfig
from mmjax.text.chat_template import Message
from mmjax.text.image_prompts import IMAGE
from mmjax.types import Array

MULTIPLE = 64
"""Rows of an embedding table that is enlarged, as transformers' script of conversion has it."""


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
        """Without tiles, the pictures of an image one after the other; with them its grid, see `config.merge`.

        Tiles may be padded, [images, tiles, ...], or those of all images one after the other [n, ...].
        Raises MmjaxError for tiles without image_sizes, or another number of them than the sizes have.
        """
        c, pixels = self.config, inputs["pixel_values"]
        if not c.grids:
            counts = [1 if pixels.ndim == 4 else pixels.shape[1]] * len(pixels)
            ends = np.cumsum([0, *counts]) * c.tile_tokens
            rows = [np.arange(start, end, dtype=np.int32) for start, end in itertools.pairwise(ends)]
            return pixels.reshape(-1, *pixels.shape[-3:]), rows
        if "image_sizes" not in inputs:
            raise MmjaxError("image_sizes [images, 2]: the grid of tiles follows from the height and width of an image")
        side = c.vision.image_size[0]
        sizes = [(int(height), int(width)) for height, width in np.asarray(inputs["image_sizes"])]
        counts = [tile_count(size, c.grids, side) for size in sizes]
        if pixels.ndim == 5:
            short = [n for n in counts if n > pixels.shape[1]]
            if len(sizes) != len(pixels) or short:
                raise MmjaxError(f"image_sizes {sizes} have {counts} tiles, pixel_values {list(pixels.shape)}")
            pixels = jnp.concatenate([tiles[:n] for tiles, n in zip(pixels, counts)])
        elif len(pixels) != sum(counts):
            raise MmjaxError(f"image_sizes {sizes} have {counts} tiles, pixel_values {list(pixels.shape)}")
        return pixels, self._tiled_rows(sizes, counts)

    def _tiled_rows(self, sizes: Sequence[tuple[int, int]], counts: Sequence[int]) -> list[np.ndarray]:
        c, side = self.config, self.config.vision.image_size[0]
        starts = np.cumsum([0, *counts]) * c.tile_tokens
        if c.merge == "flat":
            return [np.arange(start, end, dtype=np.int32) for start, end in itertools.pairwise(starts)]
        newline = int(starts[-1]) if c.newline else None
        grids = [best_grid(size, c.grids, side) for size in sizes]
        return [
            spatial_rows(int(start), size, grid, c.vision.grid, newline)
            for start, size, grid in zip(starts, sizes, grids)
        ]

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

    def with_image_id(self) -> Self:
        """The same model with `<image>` in its vocabulary, and `<pad>` if it has no padding.

        The embedding and the head become a multiple of 64 rows; new rows are the mean of the others, and of no
        influence: features replace them in prompts. Without a tokenizer the new id is the first after the vocabulary.
        """
        c, language = self.config, self.config.language
        first = language.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size
        names = [IMAGE] + (["<pad>"] if language.pad is None else [])
        size = max(language.vocab_size, -(-(first + len(names)) // MULTIPLE) * MULTIPLE)
        params = dict(self.params["language"])
        params["token_embedding"] = _with_rows(params["token_embedding"], size, 0)
        if "head" in params:
            params["head"] = {name: _with_rows(leaf, size, -1) for name, leaf in params["head"].items()}
        pad = language.pad if language.pad is not None else first + 1
        decoder = dataclasses.replace(language, vocab_size=size, pad=pad)
        return self.replace(
            config=dataclasses.replace(c, language=decoder, image_token=first),
            params={**self.params, "language": params},
            tokenizer=self.tokenizer and _with_tokens(self.tokenizer, names),
        )


def _with_rows(leaf: Array, size: int, axis: int) -> Array:
    missing = size - leaf.shape[axis]
    mean = jnp.mean(leaf.astype(jnp.float32), axis, keepdims=True).astype(leaf.dtype)
    return jnp.concatenate([leaf, jnp.repeat(mean, missing, axis)], axis) if missing else leaf


def _with_tokens(tokenizer: Any, names: Sequence[str]) -> Any:
    enlarged = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    enlarged.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    special = {**tokenizer.special, **({"pad_token": "<pad>"} if "<pad>" in names else {})}
    return dataclasses.replace(tokenizer, tokenizer=enlarged, special=special)
