"""VisionLanguageModel, the base of language models with images in their prompts."""

import abc
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer

from mmjax.data.preprocess import as_image
from mmjax.errors import MmjaxError
from mmjax.generation.stopping import Stops
from mmjax.interface.chat import ChatModel, ChatPrompt
from mmjax.interface.generation import BUCKETS, are_strings
from mmjax.interface.inputs import PROMPTS, Input, check_ids, check_inputs
from mmjax.text.batches import padded
from mmjax.text.chat_template import Message
from mmjax.text.image_prompts import IMAGE, encode_with_images, expand, feature_index
from mmjax.types import Array, ArrayLike

MULTIPLE = 64
"""Rows of an embedding table that is enlarged, as transformers' script of conversion has it."""
NETWORK_INPUTS = {"pixel_values", "input_ids", "attention_mask", "index"}
"""What every network takes; the rest is for its connector."""


class VisionLanguageModel(ChatModel):
    """A network whose prompts are ids with an index of visual features beside them.

    An image is `<image>` in a string, and in ids as many ids `config.image_token` as it has features. The network has

        encode_image(pictures [n, h, w, 3]) -> [n, p, d]        embed(ids, index, features) -> [b, l, d]
        __call__(pictures, ids, index, mask) -> {"features", "states", "logits"}

    and generation continues embeddings, so that its programs do not depend on the images.
    """

    int8_channels: ClassVar[Mapping[str, int]] = {"language/**/kernel": 1, "language/token_embedding": 0}

    @property
    def image_id(self) -> int:
        return self.config.image_token

    @abc.abstractmethod
    def pictures(self, inputs: Mapping[str, Array]) -> tuple[Array, list[np.ndarray]]:
        """(what the tower takes [n, h, w, 3]; of each image its rows of the table of their features).

        inputs: `pixel_values` and `image_sizes`. Raises MmjaxError if the two do not fit each other.
        """

    def connector_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Further arguments of `encode_image` for the pictures of `inputs`, by their names."""
        return {}

    @classmethod
    def inputs(cls, config: Any) -> Mapping[str, Input]:
        return PROMPTS

    @classmethod
    def example(cls, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        pixels = jax.ShapeDtypeStruct((1, *config.vision.image_size, 3), jnp.float32)
        return {"pixel_values": pixels, "input_ids": ids, "index": ids}

    # ----------------------------------------------------------------------------------------------------------- arrays

    def forward(
        self,
        pixel_values: ArrayLike | None = None,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        **others: ArrayLike | None,
    ) -> dict[str, Array]:
        """The network on preprocessed arrays; compiled once for each shape.

        pixel_values: float32 [images, h, w, 3], or of several pictures an image [images, pictures, h, w, 3]; the images
            of all prompts, in their order. None: texts alone.
        input_ids: int [b, l], in which an image is as many ids `config.image_token` as it has features.
        attention_mask: int [b, l], 1 = a token. image_sizes: int [images, 2], height and width before preprocessing,
            for images of any resolution.
        Returns logits float32 [b, l, v]; last_hidden_state [b, l, d]; hidden_states, depth + 1 of them; with images
            image_hidden_states [n, p, d], the features of each picture.
        Raises MmjaxError for another number of image ids than of features, and as for every model.
        """
        values = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask, **others}
        inputs = check_inputs(self.inputs(self.config), values, self.system)
        self._check_vocabulary(inputs["input_ids"])
        self.check_room(inputs["input_ids"].shape[1], 0)
        return dict(self._compiled(self.variables, self._indexed(inputs)))

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """See `forward`. inputs: input_ids, attention_mask, and with images their pictures, and `index` [b, l]."""
        pixels, ids, mask = inputs.get("pixel_values"), inputs["input_ids"], inputs.get("attention_mask")
        if pixels is None:
            embeds = self.module.apply(variables, ids, method="embed")
            outputs: Any = self.module.apply(variables, embeds, mask, method="decode")
        else:
            further: dict[str, Any] = {name: inputs[name] for name in inputs.keys() - NETWORK_INPUTS}
            outputs = self.module.apply(variables, pixels, ids, inputs["index"], mask, **further)
        states = tuple(outputs["states"])
        named = {"logits": outputs["logits"], "last_hidden_state": states[-1], "hidden_states": states}
        return named | ({} if pixels is None else {"image_hidden_states": outputs["features"]})

    def _check_vocabulary(self, ids: ArrayLike) -> None:
        """Raises MmjaxError for an id that is neither of the vocabulary nor of an image."""
        ids = np.asarray(ids)
        check_ids({"input_ids": ids[ids != self.config.image_token]}, self.id_counts())

    def _indexed(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The network's inputs: pictures and an index in place of images and their sizes."""
        ids = np.asarray(inputs["input_ids"])
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        if "pixel_values" not in inputs:
            feature_index(ids, self.config.image_token, [])
            return texts
        pixels, rows = self.pictures(inputs)
        index = feature_index(ids, self.config.image_token, rows)
        return {**texts, "pixel_values": pixels, "index": jnp.asarray(index), **self.connector_inputs(inputs)}

    # ------------------------------------------------------------------------------------------------------ generation

    def generate(
        self,
        prompts: str | Sequence[str] | ArrayLike | None = None,
        *,
        images: Any = None,
        **options: Any,
    ) -> Any:
        """Continues prompts.

            model.generate("USER: <image>\\nWhat is it? ASSISTANT:", images=[image], max_new_tokens=20)

        prompts: strings with `<image>` where an image is, anywhere and several times; or ids, in which an image is as
            many ids `config.image_token` as it has features.
        images: those of all prompts, in their order; or for each prompt a list of its images.
        options: further arguments as of every generating model. Raises MmjaxError as these do, and for another number
        of images than of `<image>`.
        """
        return super().generate(prompts, images=self._all_images(prompts, images), **options)

    def stream(self, prompt: str | None = None, *, images: Any = None, **options: Any) -> Iterator[str]:
        """The text of `generate`, piece by piece."""
        return super().stream(prompt, images=self._all_images(prompt, images), **options)

    def beginning(self) -> int:
        raise MmjaxError(f"generate of {self.system} needs prompts, with {IMAGE} where an image is")

    def image_inputs(self, images: Any) -> dict[str, Array]:
        pixels = self.pixels(images)
        if not self.config.grids:
            return {"pixel_values": pixels}
        if pixels.ndim == 5 and not isinstance(images, Sequence):
            raise MmjaxError("tiles come with the sizes of their images: pixel_values={'pixel_values', 'image_sizes'}")
        return {"pixel_values": pixels, "image_sizes": jnp.asarray(self.preprocess.image_sizes(images))}

    def prompt_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        """Ids and masks as they are, with the embeddings of prompts and images."""
        network = self._indexed(inputs)
        texts = {name: network[name] for name in ("input_ids", "attention_mask")}
        further = {name: network[name] for name in network.keys() - NETWORK_INPUTS}
        pixels = network.get("pixel_values")
        features = None if pixels is None else self._encoded(self.variables, pixels, **further)
        embeds = self._embedded(self.variables, texts["input_ids"], network.get("index"), features)
        return {**texts, "inputs_embeds": embeds}

    @functools.cached_property
    def _encoded(self) -> Any:
        """Compiled for each number of pictures."""

        def encode(variables: Mapping[str, Any], *arrays: Any, **further: Any) -> Any:
            return self.module.apply(variables, *arrays, **further, method="encode_image")

        return jax.jit(encode)

    @functools.cached_property
    def _embedded(self) -> Any:
        return jax.jit(lambda variables, *arrays: self.module.apply(variables, *arrays, method="embed"))

    def encode_prompt(self, text: str, lengths: Sequence[int], add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, in which each `<image>` is as many ids as `lengths` has for it."""
        if self.tokenizer is None:
            raise MmjaxError(
                f"this {self.system} came without a tokenizer: pass ids, or set one: vlm.replace(tokenizer=)"
            )
        ids = encode_with_images(self.tokenizer, text, self.config.image_token, add_special_tokens)
        return expand(ids, self.config.image_token, lengths, text)

    def turn_ids(self, prompt: ChatPrompt, lengths: Sequence[int]) -> list[int]:
        return self.encode_prompt(prompt.text, lengths, prompt.add_special_tokens)

    def feature_count(self, image: Any) -> int:
        return len(self.pictures(self.image_inputs([image]))[1][0])

    def stops(self, stop: str | Sequence[str], inputs: Mapping[str, Any]) -> Stops | None:
        visible = jnp.where(inputs["input_ids"] == self.config.image_token, 0, inputs["attention_mask"])
        return super().stops(stop, {**inputs, "attention_mask": visible})

    def _all_images(self, prompts: Any, images: Any) -> Any:
        """The images of all prompts in one list; None for none."""
        if not isinstance(images, list | tuple):
            return images
        if any(isinstance(each, list | tuple) for each in images):
            texts = [prompts] if isinstance(prompts, str) else list(prompts) if are_strings(prompts) else None
            if texts is None or len(texts) != len(images):
                raise MmjaxError(f"images: lists of images for {len(images)} prompts; one list for each string")
            for text, each in zip(texts, images):
                expand([0] * text.count(IMAGE), 0, [1] * len(each), text)
            images = [image for each in images for image in each]
        return [as_image(image) for image in images] or None

    def _prepare(
        self, prompts: Any, mask: Any, add_special_tokens: bool, visual: Mapping[str, Any], new_tokens: int
    ) -> dict[str, Any]:
        if are_strings(prompts):
            if mask is not None:
                raise MmjaxError("attention_mask goes with ids; strings are padded here")
            texts = [prompts] if isinstance(prompts, str) else list(prompts)
            prompts, mask = self._encoded_prompts(texts, visual, add_special_tokens)
        return super()._prepare(prompts, mask, add_special_tokens, visual, new_tokens)

    def _encoded_prompts(
        self, texts: Sequence[str], visual: Mapping[str, Any], add_special_tokens: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        visual = {name: jnp.asarray(value) for name, value in visual.items()}
        lengths = [len(rows) for rows in self.pictures(visual)[1]] if visual else []
        counts = [text.count(IMAGE) for text in texts]
        if sum(counts) != len(lengths):
            raise MmjaxError(
                f"the prompts have {sum(counts)} times {IMAGE} for {len(lengths)} images: {texts[0][:200]!r}"
            )
        starts = np.cumsum([0, *counts])
        ids = [
            self.encode_prompt(text, lengths[start : start + count], add_special_tokens)
            for text, start, count in zip(texts, starts, counts)
        ]
        empty = [text for text, row in zip(texts, ids) if not row]
        if empty:
            raise MmjaxError(f"{empty[0]!r} has no token to go on from")
        longest, maximum = max(map(len, ids)), self.max_prompt_length or BUCKETS[-1]
        if longest > maximum:
            raise MmjaxError(f"a prompt of {longest} ids, images included, is longer than {maximum}")
        width = min(next(size for size in BUCKETS if size >= longest), maximum)
        return padded(ids, width, self.pad, self.padding_side)

    def _inputs(self, prompts: Any, mask: ArrayLike | None, add_special_tokens: bool) -> tuple[np.ndarray, np.ndarray]:
        ids = np.asarray(prompts)
        images = ids == self.config.image_token  # which need not be an id of the vocabulary
        ids, mask = super()._inputs(np.where(images, 0, ids), mask, add_special_tokens)
        return np.where(images, self.config.image_token, ids), mask

    # --------------------------------------------------------------------------------------------------- conversations

    def chat(self, messages: str | Sequence[Message], *, images: Any = None, **options: Any) -> str:
        """The assistant's next turn.

            model.chat("What is it?", images=[image])

        messages: the user's message, or a conversation so far, whose contents are strings, with `<image>` where an
            image is, or lists of {"type": "image"} and {"type": "text", "text": ...}.
        images: in the order of the conversation; those of a single message may lack `<image>`: they come before it.
        options: as of `generate`. Raises MmjaxError where there is no template.
        """
        return super().chat(self._with_places(messages, images), images=images, **options)

    def stream_chat(self, messages: str | Sequence[Message], *, images: Any = None, **options: Any) -> Iterator[str]:
        """The same, piece by piece; see `stream`."""
        return super().stream_chat(self._with_places(messages, images), images=images, **options)

    def answer(self, images: Any, questions: Sequence[str], **options: Any) -> list[str]:
        """The answer to each question, about the image of the same index, in the template's words.

        options: as of `generate`. Raises MmjaxError for another number of questions than of images.
        """
        if len(images) != len(questions):
            raise MmjaxError(f"{len(images)} images and {len(questions)} questions: one image for each")
        messages = [[{"role": "user", "content": f"{IMAGE}\n{question}"}] for question in questions]
        prompts = [self.chat_prompt(each) for each in messages]
        stop = [*self.strings(options.pop("stop", ())), *prompts[0].stop]
        specials = {"add_special_tokens": prompts[0].add_special_tokens, "stop": stop}
        return self.generate([prompt.text for prompt in prompts], images=list(images), **specials, **options)

    def _with_places(self, messages: str | Sequence[Message], images: Any) -> str | Sequence[Message]:
        if not isinstance(messages, str) or images is None or IMAGE in messages:
            return messages
        count = len(images) if isinstance(images, list | tuple) else 1
        return f"{IMAGE}\n" * count + messages

    # ---------------------------------------------------------------------------------------------------------- layouts

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
        for name in {"token_embedding", "embedding", "head"} & params.keys():  # a decoder's, and T5's two tables
            leaf = params[name]
            inner = isinstance(leaf, Mapping)
            params[name] = {k: _with_rows(v, size, -1) for k, v in leaf.items()} if inner else _with_rows(leaf, size, 0)
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
