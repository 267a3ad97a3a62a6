"""From class scores to numbers: top-k, accuracy a class, confusions, and what guessing would get."""

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
    """How many other classes score at least as high as the true one: 0 is right. Ties count against the model.

    Raises MmjaxError for NaN (which would count as right), wrong shapes, labels out of range.
    """
    scores = np.asarray(logits)
    if scores.ndim != 2 or 0 in scores.shape:
        raise MmjaxError(f"logits: need [n, classes], not {list(scores.shape)}")
    if np.isnan(scores).any():
        raise MmjaxError(f"logits: {int(np.isnan(scores).sum())} of {scores.size} are NaN")
    truth = checked_integers("labels", labels, len(scores), scores.shape[1])
    own = np.take_along_axis(scores, truth[:, None], 1)
    return np.count_nonzero(scores >= own, axis=1) - 1


def top_k(
    logits: Float[ArrayLike, "n c"], labels: Int[ArrayLike, " n"], ks: tuple[int, ...] = (1, 5)
) -> dict[int, Score]:
    """k -> the share of items whose true class is among the k highest; a k that leaves no other class is left out."""
    ranks, classes = class_ranks(logits, labels), np.shape(logits)[1]
    chances = {k: constant_guess(labels, k) for k in ks if k < classes or k == 1}
    return {k: proportion(int(np.count_nonzero(ranks < k)), len(ranks), chance) for k, chance in chances.items()}


def accuracy(predicted: Int[ArrayLike, " n"], labels: Int[ArrayLike, " n"]) -> Score:
    """The share of predictions that are right."""
    guess = np.asarray(predicted)
    truth = checked_integers("labels", labels, len(guess))
    if not len(guess):
        raise MmjaxError("predicted: nothing to judge")
    return proportion(int(np.count_nonzero(guess == truth)), len(guess), constant_guess(truth, 1))


def constant_guess(labels: Int[ArrayLike, " n"], k: int = 1) -> float:
    """What always naming the k most common classes gets, in percent; with classes of one size this is 100 k / c.

    The chance level given beside accuracies: a uniform guess would flatter them where one class is common.
    """
    counts = np.sort(np.unique(np.asarray(labels), return_counts=True)[1])[::-1]
    return 100.0 * float(counts[:k].sum()) / float(counts.sum())


def per_class_accuracy(
    predicted: Int[ArrayLike, " n"], labels: Int[ArrayLike, " n"], classes: int
) -> tuple[Float[np.ndarray, " c"], Int[np.ndarray, " c"]]:
    """(accuracy of each class in percent, its number of items); NaN for a class without items."""
    matrix = confusion(predicted, labels, classes)
    counts = matrix.sum(1)
    return np.where(counts > 0, 100.0 * matrix.diagonal() / np.maximum(counts, 1), np.nan), counts


def mean_per_class(predicted: Int[ArrayLike, " n"], labels: Int[ArrayLike, " n"], classes: int) -> Score:
    """The mean over classes that have items: the metric of Caltech-101, Pets, Flowers and Aircraft.

    Chance: a uniform guess. A resample that misses a class altogether is a mean over the others.
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
    """How often each class (row) was taken for each (column)."""
    truth = checked_integers("labels", labels, len(np.asarray(labels)), classes)
    guess = checked_integers("predicted", predicted, len(truth), classes)
    return np.bincount(truth.astype(np.int64) * classes + guess, minlength=classes * classes).reshape(classes, classes)


def log_probabilities(logits: Float[ArrayLike, "n c"]) -> Float[np.ndarray, "n c"]:
    """log softmax over the classes, float64."""
    scores = np.asarray(logits, np.float64)
    scores = scores - scores.max(1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


def cross_entropy(logits: Float[ArrayLike, "n c"], labels: Int[ArrayLike, " n"]) -> Score:
    """The mean of -log p(true class), in nats. Chance: always naming the classes' own shares (their entropy)."""
    truth = checked_integers("labels", labels, len(logits), np.shape(logits)[1])
    losses = -np.take_along_axis(log_probabilities(logits), truth[:, None], 1)[:, 0]
    low, high = bootstrap_interval(np.stack([losses, np.full_like(losses, 100.0)], 1))
    shares = np.unique(truth, return_counts=True)[1] / len(truth)
    return Score(float(losses.mean()), len(losses), low, high, -float(shares @ np.log(shares)), "nats")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ClassificationEvaluation(ScoredEvaluation):
    """`classification_top1`, `_top5`, `_mean_per_class` and `_loss` of a network with a head, of images or of texts.

    Pictures, at the end: which class was taken for which, and the mistakes that the network was surest of.

    Attributes:
        logits: (params, state, images [b, ...]) -> [b, classes]: `predict` of mmjax.training.classification, say.
        images, labels: an array [n, ...], or of texts a dict of such, and int [n]; or a pipeline, which has labels.
        class_names: for the pictures; None draws none.
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
        drawn = {}
        if pictures and self.class_names is not None:
            matrix = confusion(logits.argmax(1), labels, logits.shape[1])
            drawn[f"{self.name}_confusion"] = confusion_picture(matrix, self.class_names, self.attribution)
            found = surest_mistakes(logits, labels)
            if len(found) and isinstance(self.images, np.ndarray) and self.images.dtype == np.uint8:
                guess, share = logits[found].argmax(1), np.exp(log_probabilities(logits[found]).max(1))
                told = [
                    f"{self.class_names[i]}, taken for {self.class_names[j]} ({100 * p:.0f}%)"
                    for i, j, p in zip(labels[found], guess, share)
                ]
                drawn[f"{self.name}_mistakes"] = mistakes_picture(self.images[found], told, self.attribution)
        return Outcome(scores, {f"{self.name}_n": len(labels)}, drawn)


def classification_scores(
    logits: Float[ArrayLike, "n c"], labels: Int[ArrayLike, " n"], ks: tuple[int, ...] = (1, 5)
) -> dict[str, Score]:
    """top1, top5, mean_per_class and loss; of two classes also f1 and matthews."""
    scores = {f"top{k}": score for k, score in top_k(logits, labels, ks).items()}
    guess, classes = np.argmax(logits, 1), np.shape(logits)[1]
    scores["mean_per_class"] = mean_per_class(guess, labels, classes)
    return scores | ({} if classes != 2 else binary_scores(guess, labels)) | {"loss": cross_entropy(logits, labels)}


def binary_scores(predicted: Int[ArrayLike, " n"], labels: Int[ArrayLike, " n"]) -> dict[str, Score]:
    """GLUE's two: "f1" of the second class in percent, beside always naming it (MRPC, QQP), and "matthews" (CoLA).

    Matthews' correlation is told 100 times, and is 0 where only one class is named or there.
    """
    matrix = confusion(predicted, labels, 2)
    drawn = resampled_counts(matrix).astype(np.float64)
    both = int(matrix[1].sum()), int(matrix.sum())
    chances = {"f1": 200.0 * both[0] / (both[0] + both[1]), "matthews": 0.0}
    scores = {}
    for name, metric, unit in (("f1", _f1, "%"), ("matthews", _matthews, "")):
        low, high = interval(metric(drawn))
        scores[name] = Score(float(metric(matrix.astype(np.float64))), both[1], low, high, chances[name], unit)
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
    """Rows whose highest class is not the true one, those of the highest probability first."""
    scores = log_probabilities(logits)
    wrong = np.flatnonzero(scores.argmax(1) != np.asarray(labels))
    return wrong[np.argsort(-scores[wrong].max(1), kind="stable")][:most]
