"""Masked-language-model loss and accuracy on validation texts, compared with a unigram baseline."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.evaluation.bootstrap import bootstrap_interval
from mmjax.evaluation.classification import constant_guess
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score, clustered_proportion
from mmjax.types import ArrayLike, Float, Int, Params

Judge = Callable[[Params, Any, Mapping[str, Any]], Mapping[str, Any]]
"""(params, state, batch) -> mlm_loss and mlm_accuracy [b, m], and optionally nsp_accuracy [b]: `BERT.judge`."""


def unigram(ids: Int[ArrayLike, "n l"], mask: Int[ArrayLike, "n l"], vocab_size: int) -> Float[np.ndarray, " v"]:
    """Log probabilities of pieces from their counts among the tokens of training texts, with add-one smoothing."""
    counts = np.bincount(np.asarray(ids)[np.asarray(mask) > 0], minlength=vocab_size) + 1.0
    return np.log(counts / counts.sum())


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MaskedWordsEvaluation(ScoredEvaluation):
    """`mlm_loss` in nats (chance: `mlm_unigram_loss`, the unigram loss of the same words), `mlm_accuracy` (chance:
    always predicting the most frequent word), `nsp_accuracy` (chance: the more frequent answer). Intervals resample
    documents.

    Attributes:
        judge: computes the loss and accuracy of each masked word, see `Judge`.
        columns: the validation batch, masked once: inputs of the method, each [n, ...].
        documents: [n], the document of each row.
        frequencies: `unigram` of the training texts.
    """

    name: str = "masked_words"
    judge: Judge
    columns: Mapping[str, np.ndarray]
    documents: Int[np.ndarray, " n"]
    frequencies: Float[np.ndarray, " v"]
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not len(self.documents) or not np.any(self.columns["masked_weights"]):
            raise MmjaxError(f"{self.name}: no masked word in {len(self.documents)} rows")

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return jax.jit(self.judge)

    def _measure(self, params: Params, state: Any) -> dict[str, np.ndarray]:
        """Over all rows; the last batch is padded with its last row."""
        n = len(self.documents)
        size, parts = min(self.batch_size, n), []
        for start in range(0, n, size):
            indices = np.minimum(np.arange(start, start + size), n - 1)
            part = self._compiled(params, state, {name: column[indices] for name, column in self.columns.items()})
            parts.append({name: np.asarray(value)[: n - start] for name, value in part.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        measured = self._measure(params, state)
        weights, words = self.columns["masked_weights"], self.columns["masked_ids"]
        counts = self._sums(weights)
        common = 100.0 * float(np.average(words == self.frequencies.argmax(), weights=weights))
        losses = {"mlm_loss": measured["mlm_loss"], "mlm_unigram_loss": -self.frequencies[words]}
        scores = {name: self._mean(loss * weights, counts) for name, loss in losses.items()}
        scores["mlm_loss"] = dataclasses.replace(scores["mlm_loss"], chance=scores["mlm_unigram_loss"].value)
        right = self._sums(measured["mlm_accuracy"] * weights)
        scores["mlm_accuracy"] = clustered_proportion(right, counts, common)
        if "nsp_accuracy" in measured:
            guess = constant_guess(self.columns["next_label"])
            right, answered = self._sums(measured["nsp_accuracy"]), self._sums(np.ones(len(weights)))
            scores["nsp_accuracy"] = clustered_proportion(right, answered, guess)
        return Outcome(scores, {"mlm_documents": len(counts)})

    def _sums(self, values: np.ndarray) -> np.ndarray:
        """Sums over each document, in the order of document numbers."""
        row_sums = values.reshape(len(values), -1).sum(1, dtype=np.float64)
        numbers, groups = np.unique(self.documents, return_inverse=True)
        return np.bincount(groups, row_sums, len(numbers))

    def _mean(self, losses: np.ndarray, counts: np.ndarray) -> Score:
        sums = self._sums(losses)
        low, high = bootstrap_interval(np.stack([sums, 100.0 * counts], 1))
        return Score(float(sums.sum() / counts.sum()), int(counts.sum()), low, high, unit="nats")
