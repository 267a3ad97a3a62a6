"""A conversation that caches keys and values, so that a turn computes its new tokens alone."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.generation.engine import stream
from mmjax.interface.generation import BUCKETS
from mmjax.models.language.decode import PrefixCache, empty_prefix, remember
from mmjax.models.language.tasks import LanguageModel
from mmjax.nn.rotary import Rotary

SMALLEST = 256
"""Slots of the past at the beginning; they double when they are full, and a program is compiled then."""


class Conversation:
    """Turns of a user and a model.

        talk = Conversation(mmjax.load("SmolLM2-135M-Instruct.Q4_1.gguf"), max_new_tokens=128)
        for piece in talk.say("Name three fruits."):
            print(piece, end="")

    Attributes:
        messages: the conversation so far, as the chat template takes it.
        reused: the number of ids of the last turn that came from the cache.
    """

    def __init__(self, model: LanguageModel, system: str | None = None, **options: Any):
        """system: the first message, else the template's own. options: as of `generate`, and `stop`,
        `seed`. Raises MmjaxError where the tokenizer has no chat template."""
        if model.tokenizer is None or not model.tokenizer.templates:
            raise MmjaxError("a conversation needs a tokenizer with a chat template")
        self._model, self._options = model, dict(options)
        self._stop = self._options.pop("stop", ())
        self._seed = self._options.pop("seed", 0)
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.reused = 0
        self._cached_ids: list[int] = []
        self._past: PrefixCache | None = None

    def say(self, text: str, every: int = 1) -> Iterator[str]:
        """The answer, piece by piece; it joins `messages` when it is complete.

        every: tokens between pieces.
        """
        model, options = self._model, self._model.options(**self._options)
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = model.tokenizer(model.tokenizer.chat(messages), add_special_tokens=False)[0][0].tolist()
        # The template may render an answer otherwise than it was generated: then nothing is reused. And under
        # LongRope always, whose keys of a short text do not serve a long one.
        same = ids[: len(self._cached_ids)] == self._cached_ids and len(ids) > len(self._cached_ids)
        self.reused = len(self._cached_ids) if same and not _depends_on_length(model) else 0
        if not self.reused:
            self._cached_ids, self._past = [], None
        rest = np.asarray([ids[self.reused :]], np.int32)
        width = next(size for size in BUCKETS if size >= rest.shape[1])
        mask = np.zeros((1, width), np.int32)
        mask[:, width - rest.shape[1] :] = 1
        model.check_room(len(ids), options.max_new_tokens)
        past = empty_prefix(model.config, SMALLEST) if self._past is None else self._past
        inputs = {"input_ids": jnp.asarray(np.pad(rest, ((0, 0), (width - rest.shape[1], 0)))), "past": past}
        inputs["attention_mask"] = jnp.asarray(mask)
        stops = model.stops(self._stop, inputs)
        parts = stream(model.decodable(), model.variables, inputs, options, self._seed, stops, every)
        new_ids: list[int] = []

        def parts_of_row() -> Iterator[np.ndarray]:
            state = None
            while True:
                try:
                    part = next(parts)[0, 0]
                except StopIteration as end:
                    state = end.value
                    break
                new_ids.extend(part.tolist())
                yield part
            self._cached_ids = [*ids, *new_ids[: int(state.index)]]
            size = SMALLEST
            while size < len(self._cached_ids):
                size *= 2
            self._past = _remember(state, size)

        text_so_far = ""
        for piece in model.pieces(parts_of_row(), options.eos, model.strings(self._stop)):
            text_so_far += piece
            yield piece
        self.messages = [*messages, {"role": "assistant", "content": text_so_far}]


def _depends_on_length(model: LanguageModel) -> bool:
    return isinstance(model.config.positions, Rotary) and model.config.positions.longrope is not None


_remember = functools.partial(jax.jit, static_argnums=1)(lambda state, size: remember(state, 0, size))
