"""FlamingoModel: continues texts with images or videos in them; captions and answers from a few examples."""

import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.generation.options import BeamRules
from mmjax.interface.few_shot import FewShotModel
from mmjax.interface.generation import BUCKETS, are_strings
from mmjax.interface.inputs import Input
from mmjax.interface.model import Model
from mmjax.models.flamingo.checkpoint import trained_part
from mmjax.models.flamingo.decode import FlamingoCache, FlamingoSteps, answer_scores, encode_prefix
from mmjax.models.flamingo.media import arranged, flattened
from mmjax.models.flamingo.network import Flamingo, FlamingoConfig
from mmjax.models.flamingo.start import assembled
from mmjax.nn.norm import l2_normalize
from mmjax.text.batches import padded
from mmjax.text.interleaved import IMAGE
from mmjax.types import Array, ArrayLike, Float
from mmjax.weights.files import read_weights, write_safetensors

INPUTS = {
    "pixel_values": Input("b images frames height width 3", "float"),
    "frame_mask": Input("b images frames"),
    "input_ids": Input("b l", required=True),
    "attention_mask": Input("b l"),
}
ENCODED = 16
"""Frames that the image encoder takes at a time, so that few programs are compiled."""


class FlamingoModel(FewShotModel):
    """A loaded Flamingo.

        model.generate("<image>Output:", images=[photo], num_beams=3)
        model.generate(["<image>A cat.<|endofchunk|><image>A"], images=[[cat, dog]])
        model.answer(photos, questions, examples=examples, shots=4, selection="rices")

    A string has `<image>` where an image or a video is. A video is a uint8 array [frames, height, width, 3].
    """

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
        """CLIP's."""
        return ImagePreprocessing.clip(config.image_size[0])

    # -------------------------------------------------------------------------------------------- from and to its parts

    @classmethod
    def assemble(
        cls,
        language: Model,
        vision: Model,
        trained: str | os.PathLike[str] | None = None,
        *,
        seed: int = 0,
        **fields: Any,
    ) -> Self:
        """A Flamingo over a loaded language model and a loaded image encoder: CLIP, a ViT or a ResNet.

            FlamingoModel.assemble(mmjax.load("anas-awadalla/mpt-7b"), mmjax.load("ViT-L-14.pt"), "checkpoint.pt")

        trained: one of OpenFlamingo's training files; None: what is trained begins anew, from `seed`, and texts have
            exactly the language model's logits.
        fields: further ones of `FlamingoConfig`, of the sizes where there is no file.
        The ids of `<|endofchunk|>`, `<image>` and, if the tokenizer has no padding, `<PAD>` follow those of the
        tokenizer; rows of the embedding without a token are cut off.
        Raises MmjaxError for other systems, or a file that does not fit the two.
        """
        file = None if trained is None else read_weights(pathlib.Path(trained))
        config, variables, tokenizer = assembled(language, vision, file, seed, fields)
        params, stats = (jax.tree.map(jnp.asarray, variables.get(name, {})) for name in ("params", "stats"))
        return cls(config, params, stats, tokenizer, vision.preprocess)

    def save_trained(self, file: str | os.PathLike[str]) -> None:
        """Writes what OpenFlamingo's training files hold, under their names, as safetensors."""
        variables = {"params": self.params} | ({"stats": self.stats} if self.stats else {})
        write_safetensors(pathlib.Path(file), trained_part(self.config, variables), {"format": "pt"})

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
        Returns logits float32 [b, l, v]; last_hidden_state [b, l, d]; hidden_states, depth + 1 of them; with images
            image_hidden_states [b, images, latents, e].
        Raises MmjaxError for a prompt with fewer images than `<image>`, and as for every model.
        """
        if input_ids is not None:
            self.check_room(np.shape(input_ids)[-1], 0)
        if pixel_values is not None and input_ids is not None:
            pixel_values = arranged(np.asarray(input_ids), jnp.asarray(pixel_values), self.config.image_token)
        return super().forward(pixel_values, input_ids, attention_mask, **others)

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """See `forward`."""
        names = ("pixel_values", "input_ids", "attention_mask", "frame_mask")
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

    # ------------------------------------------------------------------------------------------------------ generation

    def decodable(self) -> FlamingoSteps:
        return FlamingoSteps(self.config)

    @property
    def eos(self) -> tuple[int, ...]:
        """`<|endofchunk|>`."""
        return self.config.eos

    def fixed_options(self) -> dict[str, Any]:
        """Beams are compared as in the transformers version of OpenFlamingo's results."""
        return {"beam_rules": BeamRules.v4_33()}

    def generate(
        self,
        prompts: str | Sequence[str] | ArrayLike | None = None,
        *,
        images: Any = None,
        prefix: "Prefix | None" = None,
        **options: Any,
    ) -> Any:
        """Continues prompts, up to `<|endofchunk|>`.

        prompts: strings with `<image>` where an image or a video is, anywhere and several times; or ids.
        images: those of all prompts, in their order; or for each prompt a list of its images.
        prefix: of `encode_prefix`: a text with images that precedes every prompt, and was encoded before.
        options: further arguments as of every generating model. A video is as many frames as it has; a prompt's length
            in `beam_rules` and penalties is that without the prefix.
        Raises MmjaxError as these do, and for another number of images than of `<image>`.
        """
        return self._after(prefix, "generate", prompts, images, options)

    def stream(
        self, prompt: str | None = None, *, images: Any = None, prefix: "Prefix | None" = None, **options: Any
    ) -> Iterator[str]:
        """The text of `generate`, piece by piece."""
        return self._after(prefix, "stream", prompt, images, options)

    def _after(self, prefix: "Prefix | None", name: str, prompts: Any, images: Any, options: dict[str, Any]) -> Any:
        texts = [prompts] if isinstance(prompts, str) else list(prompts) if are_strings(prompts) else None
        images = flattened(texts, images)
        model = self if prefix is None else self._continuing(prefix)
        return getattr(super(FlamingoModel, model), name)(prompts, images=images, **options)

    def _continuing(self, prefix: "Prefix") -> "_Continuation":
        fields = {field: getattr(self, field) for field in ("params", "stats", "tokenizer", "preprocess", "layout")}
        model = _Continuation(self.config, **fields)
        model.prefix = prefix
        for name in ("module", "_tokens", "_resampled", "_ranked"):
            vars(model).update({name: getattr(self, name)})  # whose programs are compiled already
        return model

    def encode_prefix(self, text: str, images: Any = None, add_special_tokens: bool = True) -> "Prefix":
        """A text with images before several prompts, encoded once.

            prefix = model.encode_prefix("<image>Output:A cat.<|endofchunk|>\\n", [cat])
            model.generate(["<image>Output:"] * 2, images=[dog, hen], prefix=prefix)

        The result of prompts after it is that of the whole texts, to rounding.
        """
        images = flattened([text], images)
        visual = self._visual(images, None)
        inputs = self._prepare(text, None, add_special_tokens, visual, 0)
        cache = self._prefilled(self.variables, inputs)
        return Prefix(text, add_special_tokens, cache)

    @functools.cached_property
    def _prefilled(self) -> Any:
        return jax.jit(functools.partial(encode_prefix, self.config))

    def rank(
        self,
        prompts: str | Sequence[str],
        answers: Sequence[str],
        *,
        images: Any = None,
        prefix: "Prefix | None" = None,
        k: int = 128,
        add_special_tokens: bool = True,
    ) -> list[list[tuple[str, float]]]:
        """For each prompt the answers as (answer, probability), the best first.

            model.rank(["<image>is it hateful? Answer:"], ["no", "yes"], images=[meme])

        Answers are compared by the mean log-probability of their tokens; of many, the k with the most probable first
        token alone. Probabilities are a softmax over these means. Others as of `generate`.
        Raises MmjaxError for no answers, or one without a token, and as `generate` does.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if isinstance(answers, str) or not len(answers):
            raise MmjaxError(f"answers: {answers!r} should be a list of strings to choose from")
        model = self if prefix is None else self._continuing(prefix)
        visual = model._visual(flattened(texts, images), None)
        names = list(answers)
        sequences = [] if self.tokenizer is None else self.tokenizer.encode(names, False)
        longest = max(map(len, sequences), default=0)
        inputs = model._prepare(texts, None, add_special_tokens, visual, longest)
        if not all(sequences):
            raise MmjaxError(f"answers: {names[list(map(len, sequences)).index(0)]!r} has no token")
        ids, mask = padded(sequences, longest, self.pad, "right")
        indices, scores = self._ranked(self.variables, inputs, ids, mask, min(k, len(names)))
        order = np.argsort(-np.asarray(scores), axis=1, kind="stable")
        ordered = np.take_along_axis(np.asarray(indices), order, 1).tolist()
        probabilities = np.take_along_axis(np.asarray(jax.nn.softmax(scores)), order, 1).tolist()
        return [[(names[i], p) for i, p in zip(*row)] for row in zip(ordered, probabilities)]

    @functools.cached_property
    def _ranked(self) -> Any:
        return jax.jit(functools.partial(answer_scores, self.config), static_argnums=4)

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
            visual["pixel_values"] = arranged(ids, jnp.asarray(pixels), self.config.image_token, listed)
            if frame_mask is not None and not np.all(frame_mask):
                visual["frame_mask"] = arranged(ids, jnp.asarray(frame_mask), self.config.image_token, listed)
        return super()._prepare(ids, mask, add_special_tokens, visual, new_tokens)

    def prompt_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        """The media encoded, so that the programs of generation do not depend on images and frames."""
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if "pixel_values" not in inputs:
            return texts
        pixels = inputs["pixel_values"]
        shape = pixels.shape[:3]
        parts = [self._tokens(self.variables, part) for part in _parts(pixels.reshape(-1, *pixels.shape[3:]))]
        tokens = jnp.concatenate(parts)[: int(np.prod(shape))]
        tokens = tokens.reshape(*shape, *tokens.shape[1:])
        return {**texts, "media": self._resampled(self.variables, tokens, inputs.get("frame_mask"))}


class Prefix:
    """An encoded text that precedes prompts; see `FlamingoModel.encode_prefix`."""

    def __init__(self, text: str, add_special_tokens: bool, cache: FlamingoCache):
        self.text, self.add_special_tokens, self.cache = text, add_special_tokens, cache


class _Continuation(FlamingoModel):
    """The same model, whose prompts follow a prefix."""

    prefix: Prefix

    def _encode(self, prompts: Any, add_special_tokens: bool) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the texts after those of the prefix.

        Raises MmjaxError where a tokenizer joins the end of the prefix with the beginning of a prompt.
        """
        texts, start = [prompts] if isinstance(prompts, str) else list(prompts), self.prefix
        ids, mask = super()._encode([start.text], start.add_special_tokens)
        first = ids[0][mask[0].astype(bool)].tolist()
        ids, mask = super()._encode([start.text + text for text in texts], start.add_special_tokens)
        rows = [row[valid.astype(bool)].tolist() for row, valid in zip(ids, mask)]
        joined = [text for text, row in zip(texts, rows) if row[: len(first)] != first or len(row) == len(first)]
        if joined:
            raise MmjaxError(f"the tokens of a prefix that ends {start.text[-20:]!r} change before {joined[0][:80]!r}")
        rest = [row[len(first) :] for row in rows]
        longest = max(map(len, rest))
        width = next((size for size in BUCKETS if size >= longest), longest)
        return padded(rest, width, self.pad, self.padding_side)

    def check_room(self, length: int, new_tokens: int) -> None:
        super().check_room(length + int(self.prefix.cache.text.mask.sum()), new_tokens)

    def prompt_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        return {**super().prompt_inputs(inputs), "past": self.prefix.cache}


def _parts(images: Any) -> Iterator[Array]:
    """[n, ...] in parts of ENCODED, the last with zeros behind; of fewer images one part of their own size."""
    size = min(ENCODED, max(len(images), 1))
    for start in range(0, len(images), size):
        part = jnp.asarray(images[start : start + size])
        yield jnp.pad(part, ((0, size - len(part)), *((0, 0),) * (part.ndim - 1)))
