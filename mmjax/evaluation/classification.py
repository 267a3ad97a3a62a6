"""Classification metrics: top-k and per-class accuracy, confusion matrix, F1, Matthews, and chance levels.

>>> logits = [[0.9, 0.1, 0.0], [0.2, 0.1, 0.7], [0.3, 0.6, 0.1], [0.5, 0.4, 0.1]]
>>> labels = np.array([0, 2, 1, 1])
>>> print(top_k(logits, labels)[1])
75.00% [25.00, 100.00] (n = 4, chance 50.00)
>>> confusion(np.argmax(logits, 1), labels, classes=3).tolist()
[[1, 0, 0], [1, 1, 0], [0, 0, 1]]
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.evaluation.bootstrap import bootstrap_interval, interval, resampled_counts
from mmjax.evaluation.features import Encode, Extractor, Inputs, checked_integers
from mmjax.evaluation.pictures import confusion_picture, mistakes_picture
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score, proportion
from mmjax.types import ArrayLike, Float, Int, MmjaxError, Params


def class_ranks(logits: Float[ArrayLike, "n c"], labels: Int[ArrayLike, " n"]) -> Int[np.ndarray, " n"]:
    """Number of other classes that score at least as high as the true one; 0 is right. Ties count against the model.

    Raises MmjaxError for NaN (which would count as right), wrong shapes, or labels out of range.
    """
    scores = np.asarray(logits)
    if scores.ndim != 2 or 0 in scores.shape:
        raise MmjaxError(f"logits: need [n, classes], not {list(scores.shape)}")
    if np.isnan(scores).any():
        raise MmjaxError(f"logits: {int(np.isnan(scores).sum())} of {scores.size} are NaN")
    truth = checked_integers("labels", labels, len(scores), scores.shape[1])
    true_scores = np.take_along_axis(scores, truth[:, None], 1)
    return np.count_nonzero(scores >= true_scores, axis=1) - 1


def top_k(
    logits: Float[ArrayLike, "n c"], labels: Int[ArrayLike, " n"], ks: tuple[int, ...] = (1, 5)
) -> dict[int, Score]:
    """k -> top-k accuracy in percent; a k that leaves no other class is omitted."""
    ranks, classes = class_ranks(logits, labels), np.shape(logits)[1]
    chances = {k: constant_guess(labels, k) for k in ks if k < classes or k == 1}
    return {k: proportion(int(np.count_nonzero(ranks < k)), len(ranks), chance) for k, chance in chances.items()}


def accuracy(predicted: Int[ArrayLike, " n"], labels: Int[ArrayLike, " n"]) -> Score:
    """The share of predictions that are right."""
    guess = np.asarray(predicted)
    truth = checked_integers("labels", labels, len(guess))
    if not len(guess):
        raise MmjaxError("predicted: there are no predictions")
    return proportion(int(np.count_nonzero(guess == truth)), len(guess), constant_guess(truth, 1))


def constant_guess(labels: Int[ArrayLike, " n"], k: int = 1) -> float:
    """Accuracy in percent of always predicting the k most common classes; 100 k / c for classes of equal size.

    The chance level reported beside accuracies: a uniform guess would flatter them where one class is common.
    """
    counts = np.sort(np.unique(np.asarray(labels), return_counts=True)[1])[::-1]
    return 100.0 * float(counts[:k].sum()) / float(counts.sum())


def per_class_accuracy(
    predicted: Int[ArrayLike, " n"], labels: Int[ArrayLike, " n"], classes: int
) -> tuple[Float[np.ndarray, " c"], Int[np.ndarray, " c"]]:
    """(accuracy in percent, number of items) of each class; the accuracy is NaN for a class without items."""
    matrix = confusion(predicted, labels, classes)
    counts = matrix.sum(1)
    return np.where(counts > 0, 100.0 * matrix.diagonal() / np.maximum(counts, 1), np.nan), counts


def mean_per_class(predicted: Int[ArrayLike, " n"], labels: Int[ArrayLike, " n"], classes: int) -> Score:
    """Mean accuracy over the classes that have items: the metric of Caltech-101, Pets, Flowers and Aircraft.

    Chance: a uniform guess. A resample that lacks a class is a mean over the others.
    """
    matrix = confusion(predicted, labels, classes)
    counts = matrix.sum(1)
    right, counts = matrix.diagonal()[counts > 0], counts[counts > 0]
    hits, misses = np.moveaxis(resampled_counts(np.stack([right, counts - right])), 1, 0)  # [resamples, c] each
    items = hits + misses
    shares = np.divide(hits, items, out=np.full(items.shape, np.nan), where=items > 0)
    low, high = interval(100.0 * np.nanmean(shares, 1))
    return Score(100.0 * float(np.mean(right / counts)), int(counts.sum()), low, high, chance=100.0 / len(counts))


def confusion(predicted: Int[ArrayLike, " n"], labels: Int[ArrayLike, " n"], classes: int) -> Int[np.ndarray, "c c"]:
    """Counts of each true class (row) predicted as each class (column)."""
    truth = checked_integers("labels", labels, len(np.asarray(labels)), classes)
    guess = checked_integers("predicted", predicted, len(truth), classes)
    return np.bincount(truth.astype(np.int64) * classes + guess, minlength=classes * classes).reshape(classes, classes)


def log_probabilities(logits: Float[ArrayLike, "n c"]) -> Float[np.ndarray, "n c"]:
    """log softmax over the classes, float64."""
    scores = np.asarray(logits, np.float64)
    scores = scores - scores.max(1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


def cross_entropy(logits: Float[ArrayLike, "n c"], labels: Int[ArrayLike, " n"]) -> Score:
    """The mean of -log p(true class), in nats. Chance: always predicting the class shares (their entropy)."""
    truth = checked_integers("labels", labels, len(logits), np.shape(logits)[1])
    losses = -np.take_along_axis(log_probabilities(logits), truth[:, None], 1)[:, 0]
    low, high = bootstrap_interval(np.stack([losses, np.full_like(losses, 100.0)], 1))
    shares = np.unique(truth, return_counts=True)[1] / len(truth)
    return Score(float(losses.mean()), len(losses), low, high, -float(shares @ np.log(shares)), "nats")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ClassificationEvaluation(ScoredEvaluation):
    """`classification_top1`, `_top5`, `_mean_per_class` and `_loss` of a network with a head, for images or texts.

    Pictures, at the end: the confusion matrix, and the most confident mistakes.

    Attributes:
        logits: (params, state, images [b, ...]) -> [b, classes], such as `predict` of mmjax.training.classification.
        images, labels: an array [n, ...] (for texts a dict of arrays) and int [n]; or a pipeline, which has labels.
        class_names: for the pictures; None: no pictures.
        attribution: a line at the foot of the pictures.
    """

    name: str = "classification"
    logits: Encode
    images: Inputs
    labels: Int[ArrayLike, " n"] | None = None
    ks: tuple[int, ...] = (1, 5)
    class_names: Sequence[str] | None = None
    attribution: str | None = None
    batch_size: int = 256

    @functools.cached_property
    def _extractor(self) -> Extractor:
        return Extractor(self.logits, self.batch_size)

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        logits, labels = self._extractor.labelled(params, state, self.images, self.labels, "images")
        scores = {f"{self.name}_{key}": score for key, score in classification_scores(logits, labels, self.ks).items()}
        figures = {}
        if pictures and self.class_names is not None:
            matrix = confusion(logits.argmax(1), labels, logits.shape[1])
            figures[f"{self.name}_confusion"] = confusion_picture(matrix, self.class_names, self.attribution)
            mistakes = surest_mistakes(logits, labels)
            if len(mistakes) and isinstance(self.images, np.ndarray) and self.images.dtype == np.uint8:
                guess, share = logits[mistakes].argmax(1), np.exp(log_probabilities(logits[mistakes]).max(1))
                lines = [
                    f"{self.class_names[i]}, taken for {self.class_names[j]} ({100 * p:.0f}%)"
                    for i, j, p in zip(labels[mistakes], guess, share)
                ]
                figures[f"{self.name}_mistakes"] = mistakes_picture(self.images[mistakes], lines, self.attribution)
        return Outcome(scores, {f"{self.name}_n": len(labels)}, figures)


def classification_scores(
    logits: Float[ArrayLike, "n c"], labels: Int[ArrayLike, " n"], ks: tuple[int, ...] = (1, 5)
) -> dict[str, Score]:
    """top1, top5, mean_per_class and loss; for two classes also f1 and matthews."""
    scores = {f"top{k}": score for k, score in top_k(logits, labels, ks).items()}
    guess, classes = np.argmax(logits, 1), np.shape(logits)[1]
    scores["mean_per_class"] = mean_per_class(guess, labels, classes)
    return scores | ({} if classes != 2 else binary_scores(guess, labels)) | {"loss": cross_entropy(logits, labels)}


def binary_scores(predicted: Int[ArrayLike, " n"], labels: Int[ArrayLike, " n"]) -> dict[str, Score]:
    """GLUE's "f1" of the second class in percent (MRPC, QQP; chance: always predicting it), and "matthews" (CoLA).

    Matthews' correlation is multiplied by 100, and is 0 where only one class is predicted or present.
    """
    matrix = confusion(predicted, labels, 2)
    resampled = resampled_counts(matrix).astype(np.float64)
    totals = int(matrix[1].sum()), int(matrix.sum())
    chances = {"f1": 200.0 * totals[0] / (totals[0] + totals[1]), "matthews": 0.0}
    scores = {}
    for name, metric, unit in (("f1", _f1, "%"), ("matthews", _matthews, "")):
        low, high = interval(metric(resampled))
        scores[name] = Score(float(metric(matrix.astype(np.float64))), totals[1], low, high, chances[name], unit)
    return scores


def _f1(matrix: Float[np.ndarray, "*r 2 2"]) -> Float[np.ndarray, "*r"]:
    right = matrix[..., 1, 1]
    return 200.0 * right / np.maximum(2 * right + matrix[..., 0, 1] + matrix[..., 1, 0], 1)


def _matthews(matrix: Float[np.ndarray, "*r 2 2"]) -> Float[np.ndarray, "*r"]:
    spread = np.prod(matrix.sum(-1), -1) * np.prod(matrix.sum(-2), -1)
    determinant = matrix[..., 0, 0] * matrix[..., 1, 1] - matrix[..., 0, 1] * matrix[..., 1, 0]
    return 100.0 * determinant / np.sqrt(np.where(spread > 0, spread, np.inf))


def surest_mistakes(
    logits: Float[ArrayLike, "n c"], labels: Int[ArrayLike, " n"], most: int = 24
) -> Int[np.ndarray, " m"]:
    """Indices of wrongly classified items, the most confident first."""
    scores = log_probabilities(logits)
    wrong = np.flatnonzero(scores.argmax(1) != np.asarray(labels))
    return wrong[np.argsort(-scores[wrong].max(1), kind="stable")][:most]
