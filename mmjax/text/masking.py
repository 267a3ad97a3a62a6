"""Masked words: which tokens are hidden, and behind what (google-research/bert create_pretraining_data.py).

Static masking, as in BERT, draws once when the data is made: `Masking.rows`. Dynamic masking, as in RoBERTa, draws
whenever a text is seen: `Masking.__call__` with a generator of that moment.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from mmjax.errors import MmjaxError
from mmjax.text.wordpiece import WordPieceTokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Masking:
    """How tokens are hidden. Of those chosen 80 % become [MASK], 10 % any piece of the whole vocabulary (special
    tokens and itself included), 10 % stay.

    Attributes:
        vocab_size: pieces to draw from. mask: the id of [MASK].
        special: ids that are never chosen, [CLS] and [SEP]; they count among the tokens that the rate is of.
        rate: share of a text's tokens that is chosen; at least one is.
        limit: chosen tokens of a text at most, and the length of what is returned.
        continuations: bool [v], which pieces go on with a word: words are then chosen whole; None: pieces are.
    """

    vocab_size: int
    mask: int
    special: tuple[int, ...]
    rate: float = 0.15
    limit: int = 20
    continuations: Bool[np.ndarray, " v"] | None = None

    def __post_init__(self) -> None:
        """Raises MmjaxError for a rate or limit that hides nothing, or continuations of another vocabulary."""
        if not 0 < self.rate <= 1 or self.limit < 1:
            raise MmjaxError(f"masking: rate={self.rate} (above 0, at most 1), limit={self.limit} (at least 1)")
        if self.continuations is not None and len(self.continuations) != self.vocab_size:
            raise MmjaxError(f"masking: continuations of {len(self.continuations)} pieces, not {self.vocab_size}")

    @classmethod
    def of(
        cls, tokenizer: WordPieceTokenizer, rate: float = 0.15, limit: int = 20, whole_words: bool = False
    ) -> "Masking":
        """For a tokenizer's ids."""
        words = tokenizer.continuations() if whole_words else None
        special = (tokenizer.cls, tokenizer.sep)
        return cls(tokenizer.vocab_size, tokenizer.mask, special, rate, limit, words)

    def __call__(
        self, ids: Int[np.ndarray, " l"], length: int, rng: np.random.Generator
    ) -> dict[str, Int[np.ndarray, " x"]]:
        """One text, whose first `length` ids are tokens and the others padding.

        Returns int32 "input_ids" [l], what is left to see, and by rising place "masked_positions" [limit],
        "masked_ids" [limit], what was there, and "masked_weights" [limit], 1 and behind them 0, float32.
        """
        groups = self._groups(ids[:length])
        budget = min(self.limit, max(1, round(length * self.rate)))
        chosen: list[int] = []
        for index in rng.permutation(len(groups)).tolist():
            if len(chosen) + len(groups[index]) <= budget:
                chosen += groups[index]
            if len(chosen) == budget:
                break
        places = np.sort(np.asarray(chosen, np.int64))
        seen = np.array(ids, np.int32)
        kind, others = rng.random(len(places)), rng.integers(0, self.vocab_size, len(places))
        behind = np.where(kind < 0.8, self.mask, np.where(kind < 0.9, seen[places], others))
        told = {
            "masked_positions": np.zeros(self.limit, np.int32),
            "masked_ids": np.zeros(self.limit, np.int32),
            "masked_weights": np.zeros(self.limit, np.float32),
        }
        for name, values in zip(told, (places, seen[places], 1)):
            told[name][: len(places)] = values
        seen[places] = behind
        return {"input_ids": seen} | told

    def rows(
        self, ids: Int[np.ndarray, "n l"], lengths: Int[np.ndarray, " n"], seed: int
    ) -> dict[str, Int[np.ndarray, "n x"]]:
        """Many texts: row i is a function of (seed, i) alone."""
        hidden = [self(row, int(k), np.random.default_rng((seed, i))) for i, (row, k) in enumerate(zip(ids, lengths))]
        return {name: np.stack([row[name] for row in hidden]) for name in hidden[0]}

    def _groups(self, ids: Sequence[int] | np.ndarray) -> list[list[int]]:
        """Places that are chosen together."""
        groups: list[list[int]] = []
        joins = None if self.continuations is None else self.continuations[ids]
        for place, id in enumerate(np.asarray(ids).tolist()):
            if id in self.special:
                continue
            if joins is not None and joins[place] and groups:
                groups[-1].append(place)
            else:
                groups.append([place])
        return groups
