"""A conversation that caches keys and values, so that a turn computes its new tokens and images alone."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmjax.data.preprocess import ImageLike, as_image
from mmjax.generation.engine import stream
from mmjax.interface.chat import ChatModel
from mmjax.interface.generation import BUCKETS
from mmjax.text.batches import padded
from mmjax.text.image_prompts import IMAGE

SMALLEST = 256
"""Slots of the past at the beginning; they double when they are full, and a program is compiled then."""


class Attached(NamedTuple):
    """An image of a conversation. digest: of its pixels. length: the number of ids that it becomes."""

    image: Image.Image
    digest: str
    length: int


class Conversation:
    """Turns of a user and a model.

        talk = Conversation(mmjax.load("SmolLM2-135M-Instruct.Q4_1.gguf"), max_new_tokens=128)
        for piece in talk.say("Name three fruits."):
            print(piece, end="")

        talk = Conversation(mmjax.load("llava-hf/llava-1.5-7b-hf"))
        print("".join(talk.say("What is it?", ["photo.jpg"])), "".join(talk.say("And its colour?")))

    Attributes:
        messages: the conversation so far, as the chat template takes it; `<image>` where an image is.
        images: those of the conversation, in its order.
        reused: the number of ids of the last turn that came from the cache, those of images included.
    """

    def __init__(self, model: ChatModel, system: str | None = None, **options: Any):
        """system: the first message, else the template's own. options: as of `generate`, and `stop`,
        `seed`. Raises MmjaxError where there is no template of conversations."""
        model.chat_prompt([{"role": "user", "content": "Hello"}])
        self._model, self._options = model, dict(options)
        self._stop = model.strings(self._options.pop("stop", ()))
        self._seed = self._options.pop("seed", 0)
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.images: list[Attached] = []
        self.reused = 0
        self._cached: list[Any] = []
        self._past: Any = None

    def say(self, text: str, images: Sequence[ImageLike] = (), every: int = 1) -> Iterator[str]:
        """The answer, piece by piece. It joins `messages`, with the question, when it is complete; an answer that is
        not read to its end, or interrupted by Ctrl-C, joins them as far as it came.

        images: more of them, before the text unless it has `<image>`. every: tokens between pieces.
        Raises MmjaxError: images for a model without, or another number of them than of `<image>`.
        """
        model, options = self._model, self._model.options(**self._options)
        new_images = [self._attached(image) for image in images]
        if new_images and IMAGE not in text:
            text = f"{IMAGE}\n" * len(new_images) + text
        messages, attached = [*self.messages, {"role": "user", "content": text}], [*self.images, *new_images]
        prompt = model.chat_prompt(messages)
        ids = model.turn_ids(prompt, [each.length for each in attached])
        keys = self._keys(ids, attached)
        model.check_room(len(ids), options.max_new_tokens)
        # The template may render an answer otherwise than it was generated: then nothing is reused.
        same = keys[: len(self._cached)] == self._cached and len(keys) > len(self._cached)
        self.reused = len(self._cached) if same and model.reuses else 0
        if not self.reused:
            self._cached, self._past = [], None
        inputs = self._inputs(ids, attached)
        stops = model.stops([*self._stop, *prompt.stop], inputs)
        parts = stream(model.decodable(), model.variables, inputs, options, self._seed, stops, every)
        answer = ""
        try:
            rows = self._rows(parts, keys)
            for piece in model.pieces(rows, options.eos, [*self._stop, *prompt.stop]):
                answer += piece
                yield piece
        finally:
            self.messages, self.images = [*messages, {"role": "assistant", "content": answer}], attached

    def _attached(self, image: ImageLike) -> Attached:
        picture = as_image(image)
        digest = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
        return Attached(picture, digest, self._model.feature_count(picture))

    def _keys(self, ids: Sequence[int], images: Sequence[Attached]) -> list[Any]:
        """What the key and value of each position depend on, beside those before: its id, or the feature of an image.

        The ids of the features of different images are equal, which is why ids alone do not decide.
        """
        features = iter([(each.digest, i) for each in images for i in range(each.length)])
        return [next(features) if id == self._model.image_id else id for id in ids]

    def _inputs(self, ids: Sequence[int], images: Sequence[Attached]) -> dict[str, Any]:
        """Those of the `Decodable`: the ids and images after the cached ones, padded, and the cache."""
        model = self._model
        cached_features = sum(id == model.image_id for id in ids[: self.reused])
        ends = np.cumsum([each.length for each in images])
        new_images = [each.image for each, end in zip(images, ends) if end > cached_features]
        rest = ids[self.reused :]
        width = next(size for size in BUCKETS if size >= len(rest))
        rows, mask = padded([rest], width, model.pad, "left")
        inputs = {"input_ids": jnp.asarray(rows), "attention_mask": jnp.asarray(mask)}
        inputs = model.prompt_inputs(inputs | (model.image_inputs(new_images) if new_images else {}))
        return {**inputs, "past": model.empty_past(SMALLEST) if self._past is None else self._past}

    def _rows(self, parts: Any, keys: Sequence[Any]) -> Iterator[np.ndarray]:
        """The new ids, part by part; after the last part the cache has them."""
        new_ids: list[int] = []
        while True:
            try:
                part = next(parts)[0, 0]
            except StopIteration as end:
                state = end.value
                break
            new_ids.extend(part.tolist())
            yield part
        cached = [*keys, *new_ids[: int(state.index)]]
        size = SMALLEST
        while size < len(cached):
            size *= 2
        self._cached, self._past = cached, self._model.remember(state, size)
