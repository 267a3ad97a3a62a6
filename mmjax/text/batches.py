"""Batches of texts of unequal length as one array of ids, for all tokenizers of language models."""

import abc
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from mmjax.errors import MmjaxError

Side = Literal["left", "right"]
SURROGATES = re.compile("[\ud800-\udfff]")


def list_of_strings(texts: str | Sequence[str]) -> list[str]:
    """One text or several, as a list. Raises MmjaxError for what is not text: no string, or half a character."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise MmjaxError(f"a tokenizer takes strings, not {type(text).__name__}: {text!r}")
        if SURROGATES.search(text):
            raise MmjaxError(f"{text!r} is no Unicode text: a lone surrogate, half of a character")
    return texts


class Batches(abc.ABC):
    """Base class of tokenizers: a subclass implements `encode` and `encode_truncated`."""

    @property
    @abc.abstractmethod
    def pad(self) -> int | None:
        """The padding id; None if there is none."""

    @abc.abstractmethod
    def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text, unpadded."""

    @abc.abstractmethod
    def encode_truncated(self, text: str, width: int, add_special_tokens: bool) -> list[int]:
        """The first `width` ids of a text, special tokens included. Raises MmjaxError if special tokens need more."""

    def __call__(
        self,
        texts: str | Sequence[str],
        padding_side: Side = "right",
        length: int | Sequence[int] | None = None,
        add_special_tokens: bool = True,
        truncate: bool = False,
    ) -> tuple[Int[np.ndarray, "b l"], Int[np.ndarray, "b l"]]:
        """(ids, attention mask), int32; the mask is 1 at tokens and 0 at padding.

        padding_side: "left" for prompts that a decoder continues.
        length: l; of several lengths the smallest that fits every text, so that few shapes compile; None: the longest
            text's.
        add_special_tokens: those of the file's post-processor, such as bos. False for a text of `chat`, which contains
            them.
        truncate: truncate longer texts at their end; special tokens stay.
        Raises MmjaxError: not a string, a text longer than `length`, or padding without a padding id.
        """
        texts = list_of_strings(texts)
        if padding_side not in ("left", "right"):
            raise MmjaxError(f"padding_side={padding_side!r}: left or right")
        sequences = self.encode(texts, add_special_tokens)
        longest = max(map(len, sequences), default=0)
        lengths = [longest] if length is None else [length] if isinstance(length, int | np.integer) else sorted(length)
        width = next((size for size in lengths if size >= longest), None)
        if width is None:
            width = lengths[-1] if lengths else 0
            if not truncate:
                longest_text = texts[int(np.argmax([len(ids) for ids in sequences]))]
                raise MmjaxError(f"length={width}: a text of {longest} ids does not fit: {longest_text[:200]!r}")
            sequences = [
                ids if len(ids) <= width else self.encode_truncated(text, width, add_special_tokens)
                for text, ids in zip(texts, sequences)
            ]
        return self._padded(sequences, width, padding_side)

    def _padded(self, sequences: Sequence[Sequence[int]], width: int, side: Side) -> tuple[np.ndarray, np.ndarray]:
        if self.pad is None and any(len(sequence) < width for sequence in sequences):
            raise MmjaxError(
                "texts of unequal length need padding, and this tokenizer has neither a pad nor an eos token"
            )
        return padded(sequences, width, self.pad or 0, side)


def padded(
    sequences: Sequence[Sequence[int]], width: int, pad: int, side: Side
) -> tuple[Int[np.ndarray, "b l"], Int[np.ndarray, "b l"]]:
    """(ids, attention mask), int32, of sequences of at most `width` ids."""
    ids = np.full((len(sequences), width), pad, np.int32)
    mask = np.zeros_like(ids)
    for index, sequence in enumerate(sequences):
        span = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[index, span], mask[index, span] = sequence, 1
    return ids, mask
