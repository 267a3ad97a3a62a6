"""Texts of unequal length as one array of ids: what every tokenizer of a language model does alike."""

import abc
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from mmjax.errors import MmjaxError

Side = Literal["left", "right"]


class Batches(abc.ABC):
    """A tokenizer is called with texts; a subclass says what the ids of one are, and how it is cut."""

    @property
    @abc.abstractmethod
    def pad(self) -> int | None:
        """The id that fills rows up; None: there is none."""

    @abc.abstractmethod
    def rows(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text, as many as it has."""

    @abc.abstractmethod
    def cut(self, text: str, width: int, add_special_tokens: bool) -> list[int]:
        """Its first ids, `width` with the special tokens around them. Raises MmjaxError where those alone are more."""

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
        length: l; of several the smallest that holds every text, so that few shapes compile; None: the longest text's.
        add_special_tokens: those of the file's post-processor, such as bos; not for a text of `chat`, which has them.
        truncate: cut what is longer than `length` at its end, special tokens kept.
        Raises MmjaxError: not a string, a text longer than `length`, or padding without any token to pad with.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise MmjaxError(f"a tokenizer takes strings, not {type(wrong).__name__}: {wrong!r}")
        if padding_side not in ("left", "right"):
            raise MmjaxError(f"padding_side={padding_side!r}: left or right")
        rows = self.rows(texts, add_special_tokens)
        longest = max(map(len, rows), default=0)
        lengths = [longest] if length is None else [length] if isinstance(length, int | np.integer) else sorted(length)
        width = next((size for size in lengths if size >= longest), None)
        if width is None:
            width = lengths[-1] if lengths else 0
            if not truncate:
                told = texts[int(np.argmax([len(row) for row in rows]))]
                raise MmjaxError(f"length={width}: a text of {longest} ids does not fit: {told[:200]!r}")
            rows = [
                row if len(row) <= width else self.cut(text, width, add_special_tokens)
                for text, row in zip(texts, rows)
            ]
        return self._padded(rows, width, padding_side)

    def _padded(self, rows: Sequence[Sequence[int]], width: int, side: Side) -> tuple[np.ndarray, np.ndarray]:
        if self.pad is None and any(len(row) < width for row in rows):
            raise MmjaxError(
                "texts of unequal length need padding, and this tokenizer has neither a pad nor an eos token"
            )
        ids = np.full((len(rows), width), self.pad or 0, np.int32)
        mask = np.zeros_like(ids)
        for place, row in enumerate(rows):
            span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[place, span], mask[place, span] = row, 1
        return ids, mask
