"""How well masked words are named on texts held out, beside what their frequencies alone would get."""

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
"""(params, state, batch) -> mlm_loss and mlm_accuracy [b, m], and perhaps nsp_accuracy [b]: `BERT.judge`."""


def unigram(ids: Int[ArrayLike, "n l"], mask: Int[ArrayLike, "n l"], vocab_size: int) -> Float[np.ndarray, " v"]:
    """Log probabilities of pieces by their counts among the tokens of training texts, one added to each."""
    counts = np.bincount(np.asarray(ids)[np.asarray(mask) > 0], minlength=vocab_size) + 1.0
    return np.log(counts / counts.sum())


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MaskedWordsEvaluation(ScoredEvaluation):
    """`mlm_loss` in nats with the unigram's on the same words as its chance (and as `mlm_unigram_loss`), `mlm_accuracy`
    beside always naming the commonest word, `nsp_accuracy` beside the commoner answer. Intervals resample documents.

    Attributes:
        judge: what tells each masked word's loss and hit.
        columns: the held-out batch, masked once: what the method takes, each [n, ...].
        documents: [n], which document a row is of.
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
            raise MmjaxError(f"{self.name}: no masked word to judge in {len(self.documents)} rows")

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return jax.jit(self.judge)

    def _judged(self, params: Params, state: Any) -> dict[str, np.ndarray]:
        """Over all rows, the last batch filled up with its last row."""
        n = len(self.documents)
        size, parts = min(self.batch_size, n), []
        for start in range(0, n, size):
            rows = np.minimum(np.arange(start, start + size), n - 1)
            part = self._compiled(params, state, {name: column[rows] for name, column in self.columns.items()})
            parts.append({name: np.asarray(value)[: n - start] for name, value in part.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        judged = self._judged(params, state)
        weights, words = self.columns["masked_weights"], self.columns["masked_ids"]
        counts = self._sums(weights)
        common = 100.0 * float(np.average(words == self.frequencies.argmax(), weights=weights))
        losses = {"mlm_loss": judged["mlm_loss"], "mlm_unigram_loss": -self.frequencies[words]}
        scores = {name: self._mean(loss * weights, counts) for name, loss in losses.items()}
        scores["mlm_loss"] = dataclasses.replace(scores["mlm_loss"], chance=scores["mlm_unigram_loss"].value)
        right = self._sums(judged["mlm_accuracy"] * weights)
        scores["mlm_accuracy"] = clustered_proportion(right, counts, common)
        if "nsp_accuracy" in judged:
            guess = constant_guess(self.columns["next_label"])
            right, asked = self._sums(judged["nsp_accuracy"]), self._sums(np.ones(len(weights)))
            scores["nsp_accuracy"] = clustered_proportion(right, asked, guess)
        return Outcome(scores, {"mlm_documents": len(counts)})

    def _sums(self, values: np.ndarray) -> np.ndarray:
        """Of each document, in the order of their numbers."""
        rows = values.reshape(len(values), -1).sum(1, dtype=np.float64)
        numbers, places = np.unique(self.documents, return_inverse=True)
        return np.bincount(places, rows, len(numbers))

    def _mean(self, losses: np.ndarray, counts: np.ndarray) -> Score:
        sums = self._sums(losses)
        low, high = bootstrap_interval(np.stack([sums, 100.0 * counts], 1))
        return Score(float(sums.sum() / counts.sum()), int(counts.sum()), low, high, unit="nats")
