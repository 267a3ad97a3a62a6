"""Masked language modelling: which tokens are masked, and by what (google-research/bert create_pretraining_data.py).

Static masking, as in BERT, samples once when the data is prepared: `Masking.mask_all`. Dynamic masking, as in RoBERTa,
samples whenever a text is used: `Masking.__call__` with a new generator.

    >>> masking = Masking(vocab_size=1000, mask=103, special=(101, 102), limit=2)
    >>> masked = masking(np.array([101, 7, 8, 9, 102, 0]), 5, np.random.default_rng(0))
    >>> masked["masked_weights"].tolist()  # 15 % of five tokens: one
    [1.0, 0.0]
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from mmjax.errors import MmjaxError
from mmjax.text.wordpiece import WordPieceTokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Masking:
    """Masks tokens. Of the selected tokens 80 % become [MASK], 10 % any piece of the whole vocabulary (special tokens
    and itself included), and 10 % stay.

    Attributes:
        vocab_size: number of pieces to sample from. mask: the id of [MASK].
        special: ids that are never selected, [CLS] and [SEP]; the rate still counts them.
        rate: share of a text's tokens that is selected; at least one is.
        limit: maximum number of selected tokens, and the length of the returned arrays.
        continuations: bool [v], pieces that continue a word: whole words are then selected; None: single pieces.
    """

    vocab_size: int
    mask: int
    special: tuple[int, ...]
    rate: float = 0.15
    limit: int = 20
    continuations: Bool[np.ndarray, " v"] | None = None

    def __post_init__(self) -> None:
        """Raises MmjaxError for a rate or limit that masks nothing, or continuations of another vocabulary."""
        if not 0 < self.rate <= 1 or self.limit < 1:
            raise MmjaxError(f"masking: rate={self.rate} (above 0, at most 1), limit={self.limit} (at least 1)")
        if self.continuations is not None and len(self.continuations) != self.vocab_size:
            raise MmjaxError(f"masking: continuations of {len(self.continuations)} pieces, not {self.vocab_size}")

    @classmethod
    def of(
        cls, tokenizer: WordPieceTokenizer, rate: float = 0.15, limit: int = 20, whole_words: bool = False
    ) -> "Masking":
        """Masking for a tokenizer's ids."""
        words = tokenizer.continuations() if whole_words else None
        special = (tokenizer.cls, tokenizer.sep)
        return cls(tokenizer.vocab_size, tokenizer.mask, special, rate, limit, words)

    def __call__(
        self, ids: Int[np.ndarray, " l"], length: int, rng: np.random.Generator
    ) -> dict[str, Int[np.ndarray, " x"]]:
        """Masks one text, whose first `length` ids are tokens and the others padding.

        Returns int32 "input_ids" [l], the masked ids, and in order of position "masked_positions" [limit],
        "masked_ids" [limit], the original ids, and float32 "masked_weights" [limit], 1 at selected tokens, 0 after
        them.
        """
        groups = self._groups(ids[:length])
        budget = min(self.limit, max(1, round(length * self.rate)))
        chosen: list[int] = []
        for index in rng.permutation(len(groups)).tolist():
            if len(chosen) + len(groups[index]) <= budget:
                chosen += groups[index]
            if len(chosen) == budget:
                break
        positions = np.sort(np.asarray(chosen, np.int64))
        visible = np.array(ids, np.int32)
        kind, others = rng.random(len(positions)), rng.integers(0, self.vocab_size, len(positions))
        replacements = np.where(kind < 0.8, self.mask, np.where(kind < 0.9, visible[positions], others))
        targets = {
            "masked_positions": np.zeros(self.limit, np.int32),
            "masked_ids": np.zeros(self.limit, np.int32),
            "masked_weights": np.zeros(self.limit, np.float32),
        }
        for name, values in zip(targets, (positions, visible[positions], 1)):
            targets[name][: len(positions)] = values
        visible[positions] = replacements
        return {"input_ids": visible} | targets

    def mask_all(
        self, ids: Int[np.ndarray, "n l"], lengths: Int[np.ndarray, " n"], seed: int
    ) -> dict[str, Int[np.ndarray, "n x"]]:
        """Masks many texts: row i is a function of (seed, i) only."""
        masked = [self(row, int(k), np.random.default_rng((seed, i))) for i, (row, k) in enumerate(zip(ids, lengths))]
        return {name: np.stack([row[name] for row in masked]) for name in masked[0]}

    def _groups(self, ids: Sequence[int] | np.ndarray) -> list[list[int]]:
        """Positions that are selected together."""
        groups: list[list[int]] = []
        joins = None if self.continuations is None else self.continuations[ids]
        for position, id in enumerate(np.asarray(ids).tolist()):
            if id in self.special:
                continue
            if joins is not None and joins[position] and groups:
                groups[-1].append(position)
            else:
                groups.append([position])
        return groups
