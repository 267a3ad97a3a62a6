"""From class scores to numbers: top-k, accuracy a class, confusions, and what guessing would get."""

import numpy as np

from mmjax.evaluation.features import checked_integers
from mmjax.evaluation.report import Score, proportion
from mmjax.types import ArrayLike, Float, Int, MmjaxError


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


def mean_per_class(predicted: Int[ArrayLike, " n"], labels: Int[ArrayLike, " n"], classes: int) -> float:
    """The mean over classes that have items, in percent: the metric of Caltech-101, Pets, Flowers and Aircraft."""
    return float(np.nanmean(per_class_accuracy(predicted, labels, classes)[0]))


def confusion(predicted: Int[ArrayLike, " n"], labels: Int[ArrayLike, " n"], classes: int) -> Int[np.ndarray, "c c"]:
    """How often each class (row) was taken for each (column)."""
    truth = checked_integers("labels", labels, len(np.asarray(labels)), classes)
    guess = checked_integers("predicted", predicted, len(truth), classes)
    return np.bincount(truth.astype(np.int64) * classes + guess, minlength=classes * classes).reshape(classes, classes)
