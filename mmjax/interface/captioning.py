"""CaptioningModel, the base of BLIP's and BLIP-2's models, whose decoders of word pieces write texts about images."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.generation.engine import generate
from mmjax.generation.options import GenerationOptions
from mmjax.generation.stopping import Stops
from mmjax.interface.generation import GeneratingModel
from mmjax.text.wordpiece import WordPieceTokenizer


class CaptioningModel(GeneratingModel):
    """Texts begin with [DEC], `config.bos`, and end with [SEP], `config.sep`; `config.pad` is the padding."""

    @abc.abstractmethod
    def fitting_tokenizer(self) -> WordPieceTokenizer:
        """The tokenizer. Raises MmjaxError where there is none that fits."""

    @property
    def eos(self) -> tuple[int, ...]:
        sep = self.config.sep if self.tokenizer is None else self.tokenizer.sep
        return () if sep is None else (sep,)

    @property
    def pad(self) -> int:
        return self.config.pad

    def stops(self, stop: str | Sequence[str], inputs: Mapping[str, Any]) -> Stops | None:
        """Raises MmjaxError for stop strings."""
        if self.strings(stop):
            raise MmjaxError(
                f"stop: texts of {self.system} end at [SEP]; its lower-cased word pieces have no stop strings"
            )
        return None

    def _encode(self, prompts: Any, add_special_tokens: bool) -> tuple[np.ndarray, np.ndarray]:
        """[DEC] text, unchanged, padded on the left. add_special_tokens: False: without [DEC]."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        sequences = [[self.config.bos] * add_special_tokens + ids for ids in self.fitting_tokenizer().pieces(texts)]
        if not all(sequences):
            raise MmjaxError("a prompt without a token: add_special_tokens=False leaves out [DEC]")
        longest = max(map(len, sequences))
        ids = [[self.pad] * (longest - len(row)) + row for row in sequences]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in sequences]
        return np.asarray(ids, np.int32), np.asarray(mask, np.int32)

    def caption_start(self, prompt: str | None, max_length: int, min_length: int) -> tuple[list[int], dict[str, Any]]:
        """(the ids that captions begin with, the limits of new tokens of such texts as options of generation).

        max_length, min_length: both count [DEC] and the prompt. Raises MmjaxError for a prompt as long as max_length.
        """
        ids = [self.config.bos, *(self.fitting_tokenizer().pieces(prompt)[0] if prompt else [])]
        if max_length <= len(ids):
            raise MmjaxError(f"max_length={max_length} counts [DEC] and the prompt: {prompt!r} has {len(ids)} ids")
        return ids, {"max_new_tokens": max_length - len(ids), "min_new_tokens": max(min_length - len(ids), 0)}

    def captions_of(
        self, images: Any, ids: Sequence[int], options: GenerationOptions, seed: int, batch_size: int
    ) -> list[Any]:
        """A text about each image, after the same ids; with num_return_sequences above 1 a list of texts."""
        decodable = self.decodable()
        self.check_room(len(ids), options.max_new_tokens)
        captions: list[Any] = []
        pixels, key = self.pixels(images), jax.random.key(seed)
        size = min(batch_size, len(pixels))
        for start in range(0, len(pixels), size):
            rows = np.minimum(np.arange(start, start + size), len(pixels) - 1)  # the last batch with copies
            inputs = {"pixel_values": pixels[rows], "input_ids": jnp.tile(jnp.asarray([ids], jnp.int32), (size, 1))}
            rng = jax.random.fold_in(key, start)
            captions += list(np.asarray(generate(decodable, self.variables, inputs, options, rng).ids))
        texts = [[self._text(row, options.eos, ()) for row in item] for item in captions[: len(pixels)]]
        return [item[0] if options.num_return_sequences == 1 else item for item in texts]
