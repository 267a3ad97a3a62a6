"""The part of FlamingoModel between arrays: its inputs, `forward`, features of images, and what a prompt becomes."""

import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.interface.few_shot import FewShotModel
from mmjax.interface.inputs import Input
from mmjax.models.flamingo.config import FlamingoConfig
from mmjax.models.flamingo.media import arranged, image_attention_mask
from mmjax.models.flamingo.network import Flamingo
from mmjax.nn.norm import l2_normalize
from mmjax.text.interleaved import IMAGE
from mmjax.types import Array, ArrayLike, Float

INPUTS = {
    "pixel_values": Input("b images frames height width 3", "float"),
    "frame_mask": Input("b images frames"),
    "input_ids": Input("b l", required=True),
    "attention_mask": Input("b l"),
    "image_attention_mask": Input("b l all_images"),
}
ENCODED = 16
"""Frames that the image encoder takes at a time, so that few programs are compiled."""


class FlamingoArrays(FewShotModel):
    """Base of FlamingoModel: from images, ids and masks to outputs and to the inputs of generation."""

    system: ClassVar[str] = "flamingo"
    config_class: ClassVar[type] = FlamingoConfig
    int8_channels: ClassVar[Mapping[str, int]] = {"language/**/kernel": 1, "language/token_embedding": 0}
    config: FlamingoConfig

    @classmethod
    def build(cls, config: FlamingoConfig) -> nn.Module:
        return Flamingo(config)

    @classmethod
    def inputs(cls, config: FlamingoConfig) -> Mapping[str, Input]:
        return INPUTS

    @classmethod
    def example(cls, config: FlamingoConfig) -> dict[str, jax.ShapeDtypeStruct]:
        height, width = config.image_size
        pixels = jax.ShapeDtypeStruct((1, 1, 1, height, width, 3), jnp.float32)
        return {"pixel_values": pixels, "input_ids": jax.ShapeDtypeStruct((1, 8), jnp.int32)}

    @classmethod
    def default_preprocess(cls, config: FlamingoConfig, layout: str) -> ImagePreprocessing:
        """CLIP's; of Idefics squashed to a square."""
        size = config.image_size[0]
        return ImagePreprocessing.albef(size) if layout == "idefics" else ImagePreprocessing.clip(size)

    @classmethod
    def folder_fields(cls, folder: pathlib.Path) -> dict[str, Any]:
        """The id of `<image>`, where a tokenizer.json has it."""
        file = folder / "tokenizer.json"
        added = json.loads(file.read_text()).get("added_tokens", ()) if file.is_file() else ()
        ids = [token["id"] for token in added if token["content"] == IMAGE]
        return {"image_token": ids[0]} if ids else {}

    # ----------------------------------------------------------------------------------------------------------- arrays

    def forward(
        self,
        pixel_values: ArrayLike | None = None,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        **others: ArrayLike | None,
    ) -> dict[str, Array]:
        """The network on preprocessed arrays; compiled once for each shape.

        pixel_values: float32 [b, images, h, w, 3], with zeros behind the images of a prompt that has fewer; of videos
            [b, images, frames, h, w, 3]; or [n, h, w, 3], the images of all prompts in their order.
        input_ids: int [b, l], `config.image_token` where an image is. attention_mask: int [b, l], 1 = a token.
        frame_mask: int [b, images, frames], 1 = a frame, of videos of several lengths.
        image_attention_mask: int [b, l, images], 1 where a token attends to an image; a row of zeros gets exactly zero.
            None: as `<image>` determines it.
        Returns logits float32 [b, l, v]; last_hidden_state [b, l, d]; hidden_states, depth + 1 of them; with images
            image_hidden_states [b, images, latents, e].
        Raises MmjaxError for a prompt with fewer images than `<image>`, and as for every model.
        """
        if input_ids is not None:
            self.check_room(np.shape(input_ids)[-1], 0)
        if pixel_values is not None and input_ids is not None:
            ids, mask = np.asarray(input_ids), others.get("image_attention_mask")
            pixel_values = arranged(ids, jnp.asarray(pixel_values), self.config.image_token, counted=mask is None)
            if mask is None:
                others |= self._image_mask(ids, pixel_values.shape[1])
            elif np.shape(mask)[-1] != pixel_values.shape[1]:
                shape = list(np.shape(mask))
                raise MmjaxError(f"image_attention_mask {shape} for {pixel_values.shape[1]} images of a prompt")
        return super().forward(pixel_values, input_ids, attention_mask, **others)

    def _image_mask(self, ids: np.ndarray, images: int) -> dict[str, Any]:
        """The input `image_attention_mask` of a model whose texts end; none of others, whose network determines it."""
        c = self.config
        if c.end_of_text is None or ids.ndim != 2 or not images:
            return {}
        return {"image_attention_mask": jnp.asarray(image_attention_mask(ids, c.image_token, c.end_of_text, images))}

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """See `forward`."""
        names = ("pixel_values", "input_ids", "attention_mask", "frame_mask", "image_attention_mask")
        outputs: Any = self.module.apply(variables, *(inputs.get(name) for name in names))
        states = tuple(outputs["states"])
        named = {"logits": outputs["logits"], "last_hidden_state": states[-1], "hidden_states": states}
        return named if outputs["media"] is None else named | {"image_hidden_states": outputs["media"]}

    def encode_image(self, images: Any) -> Float[Array, "b e"]:
        """Unit-norm features of the image encoder by itself, by which RICES selects examples."""
        pixels = self.pixels(images)
        parts = [self._features(self.variables, part) for part in _parts(pixels)]
        return jnp.concatenate(parts)[: len(pixels)]

    @functools.cached_property
    def _features(self) -> Any:
        def features(variables: Any, x: Array) -> Array:
            pooled: Any = self.module.apply(variables, x, method="image_features")
            return l2_normalize(pooled)

        return jax.jit(features)

    @functools.cached_property
    def _tokens(self) -> Any:
        return jax.jit(lambda variables, x: self.module.apply(variables, x, method="tokens"))

    @functools.cached_property
    def _resampled(self) -> Any:
        return jax.jit(lambda variables, *arrays: self.module.apply(variables, *arrays, method="resample"))

    def image_inputs(self, images: Any) -> dict[str, Array]:
        """Images and videos in their order: pixel_values [n, frames, height, width, 3], frame_mask [n, frames]."""
        videos = [self._frames(image) for image in images]
        longest = max(map(len, videos))
        pixels = [np.pad(video, ((0, longest - len(video)), (0, 0), (0, 0), (0, 0))) for video in videos]
        mask = np.arange(longest) < np.asarray([len(video) for video in videos])[:, None]
        return {"pixel_values": jnp.asarray(np.stack(pixels)), "frame_mask": jnp.asarray(mask, jnp.int32)}

    def _frames(self, image: Any) -> np.ndarray:
        """An image or a video -> float32 [frames, height, width, 3]."""
        video = isinstance(image, np.ndarray) and image.ndim == 4
        return np.asarray(self.preprocess(image if video else [image]))

    def _prepare(
        self, prompts: Any, mask: Any, add_special_tokens: bool, visual: Mapping[str, Any], new_tokens: int
    ) -> dict[str, Any]:
        if prompts is None:
            raise MmjaxError(f"generate of {self.system} needs prompts, with {IMAGE} where an image is")
        ids, mask = self._inputs(prompts, mask, add_special_tokens)
        visual = dict(visual)
        if "pixel_values" in visual or (ids == self.config.image_token).any():
            pixels = visual.get("pixel_values", np.zeros((0, *self.config.image_size, 3), np.float32))
            frame_mask = visual.pop("frame_mask", None)
            listed = np.ndim(frame_mask) == 2  # as of `image_inputs`
            counted = "image_attention_mask" not in visual
            arrange = functools.partial(arranged, ids, image_token=self.config.image_token, listed=listed)
            visual["pixel_values"] = arrange(jnp.asarray(pixels), counted=counted)
            if counted:
                visual |= self._image_mask(ids, visual["pixel_values"].shape[1])
            if frame_mask is not None and not np.all(frame_mask):
                visual["frame_mask"] = arrange(jnp.asarray(frame_mask))
        else:
            visual |= self._image_mask(ids, 0)
        return super()._prepare(ids, mask, add_special_tokens, visual, new_tokens)

    def prompt_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        """The media encoded, so that the programs of generation do not depend on images and frames."""
        names = ("input_ids", "attention_mask", "image_attention_mask")
        texts = {name: inputs[name] for name in names if name in inputs}
        if "pixel_values" not in inputs:
            return texts
        pixels = inputs["pixel_values"]
        shape = pixels.shape[:3]
        parts = [self._tokens(self.variables, part) for part in _parts(pixels.reshape(-1, *pixels.shape[3:]))]
        tokens = jnp.concatenate(parts)[: int(np.prod(shape))]
        tokens = tokens.reshape(*shape, *tokens.shape[1:])
        return {**texts, "media": self._resampled(self.variables, tokens, inputs.get("frame_mask"))}


def _parts(images: Any) -> Iterator[Array]:
    """[n, ...] in parts of ENCODED, the last with zeros behind; of fewer images one part of their own size."""
    size = min(ENCODED, max(len(images), 1))
    for start in range(0, len(images), size):
        part = jnp.asarray(images[start : start + size])
        yield jnp.pad(part, ((0, size - len(part)), *((0, 0),) * (part.ndim - 1)))
