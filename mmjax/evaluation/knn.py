"""Weighted nearest-neighbour classification of frozen features (InstDisc; `eval_knn.py` of DINO).

The k nearest features of a bank by cosine vote for their class with weight exp(cosine / temperature). Bank features are
extracted without augmentation, in evaluation mode.

    >>> bank, labels = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9]]), np.array([0, 1, 1])
    >>> knn_votes(bank, labels, np.array([[1.0, 0.1], [0.2, 1.0]]), k=2).argmax(1).tolist()
    [0, 1]
    >>> print(knn_scores(bank, labels, None, None, ks=(1,))[1].value)  # leave one out
    66.66666666666667
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.evaluation.classification import accuracy
from mmjax.evaluation.features import Encode, Extractor, Inputs, checked_features, checked_integers
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score
from mmjax.nn.norm import l2_normalize
from mmjax.types import Array, ArrayLike, Float, Int, MmjaxError, Params

BLOCK = 2**24
"""Number of similarities in memory at a time: 64 MiB."""


@functools.partial(jax.jit, static_argnames="k")
def _nearest(
    bank: Float[Array, "q d"], queries: Float[Array, "b d"], excluded: Int[Array, " b"], k: int
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    similarity = jnp.matmul(l2_normalize(queries), l2_normalize(bank).T, precision="highest")
    # With leave-one-out a feature is not its own neighbour; -1 excludes none.
    similarity = jnp.where(excluded[:, None] == jnp.arange(len(bank))[None], -jnp.inf, similarity)
    nearest_first, index = jax.lax.top_k(similarity, k)
    return nearest_first, index


def nearest(
    bank: Float[ArrayLike, "q d"], queries: Float[ArrayLike, "m d"] | None, k: int
) -> tuple[Float[np.ndarray, "m k"], Int[np.ndarray, "m k"]]:
    """(cosines, bank indices) of the k nearest features, nearest first; ties are in index order.

    Args:
        queries: None: the features of the bank, each compared with all others (leave one out).
        k: at most the size of the bank is used.

    Similarities are computed for one block of queries at a time. Raises MmjaxError, naming the argument, for invalid
    features.
    """
    features = checked_features("bank", bank)
    query_features = features if queries is None else checked_features("queries", queries, features.shape[1])
    most = len(features) - (queries is None)
    if k < 1 or most < 1:
        raise MmjaxError(f"k={k} neighbours out of {most} features")
    k = min(k, most)
    excluded = jnp.arange(len(features)) if queries is None else jnp.full(len(query_features), -1)
    size = min(len(query_features), max(1, BLOCK // len(features)))
    similarity, index = np.empty((len(query_features), k), np.float32), np.empty((len(query_features), k), np.int32)
    # Blocks of one shape: the last overlaps the one before it.
    starts = [min(start, len(query_features) - size) for start in range(0, len(query_features), size)]
    for start in starts:
        block = slice(start, start + size)
        similarity[block], index[block] = _nearest(features, query_features[block], excluded[block], k)
    return similarity, index


@functools.partial(jax.jit, static_argnames="classes")
def votes(
    similarity: Float[Array, "m k"], labels: Int[Array, "m k"], temperature: Float[Array, ""] | float, classes: int
) -> Float[Array, "m c"]:
    """Shares of the votes for each class, which sum to 1. labels: those of the neighbours."""
    weights = jax.nn.softmax(similarity / temperature, axis=-1)  # the sum cancels in the argmax; exp alone could vanish
    return jax.vmap(lambda weight, label: jnp.zeros(classes).at[label].add(weight))(weights, labels)


def knn_votes(
    bank: Float[ArrayLike, "q d"],
    bank_labels: Int[ArrayLike, " q"],
    queries: Float[ArrayLike, "m d"] | None,
    k: int = 200,
    temperature: float = 0.07,
    classes: int | None = None,
) -> Float[np.ndarray, "m c"]:
    """Votes for each class; their argmax is the prediction (the lower class of a tie).

    Args:
        queries: None: leave one out over the bank.
        k: at most the size of the bank is used.
        classes: None: the largest label + 1.

    Raises MmjaxError, naming the argument.
    """
    if not temperature > 0:
        raise MmjaxError(f"temperature={temperature}: must be above 0")
    labels = checked_integers("bank_labels", bank_labels, len(bank), classes)
    similarity, index = nearest(bank, queries, k)
    return np.asarray(votes(similarity, labels[index], temperature, classes or int(labels.max()) + 1))


def knn_scores(
    bank: Float[ArrayLike, "q d"],
    bank_labels: Int[ArrayLike, " q"],
    queries: Float[ArrayLike, "m d"] | None,
    query_labels: Int[ArrayLike, " m"] | None,
    ks: tuple[int, ...] = (200,),
    temperature: float = 0.07,
) -> dict[int, Score]:
    """k -> accuracy. Neighbours are searched once, for the largest k.

    With queries None (leave one out) the labels are the bank's. A query whose class is not in the bank is wrong.
    """
    if not ks or not temperature > 0:
        raise MmjaxError(f"ks={ks}, temperature={temperature}: need a k, and a temperature above 0")
    labels = checked_integers("bank_labels", bank_labels, len(bank))
    truth = labels if queries is None else checked_integers("query_labels", query_labels, len(queries))  # type: ignore[arg-type]
    similarity, index = nearest(bank, queries, max(ks))
    classes = int(labels.max()) + 1
    scores = {}
    for k in ks:
        predicted = np.argmax(votes(similarity[:, :k], labels[index[:, :k]], temperature, classes), axis=1)
        scores[k] = accuracy(predicted, truth)
    return scores


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class KNNEvaluation(ScoredEvaluation):
    """kNN accuracy of an encoder: `knn_top1` for one k, `knn_top1_k20` ... for several.

    Attributes:
        encode: (params, state, images [b, ...]) -> features [b, d].
        train_images, train_labels: the bank: an array [n, ...] and int [n], or a pipeline, which contains labels.
        test_images, test_labels: the queries; None: leave one out over the bank.
        ks, temperature: 200 and 0.07 are those of DINO, 200 and 0.1 of MoCo's CIFAR-10 demo.
    """

    name: str = "knn"
    encode: Encode
    train_images: Inputs
    train_labels: Int[ArrayLike, " q"] | None = None
    test_images: Inputs | None = None
    test_labels: Int[ArrayLike, " m"] | None = None
    ks: tuple[int, ...] = (200,)
    temperature: float = 0.07
    batch_size: int = 256

    @functools.cached_property
    def _extractor(self) -> Extractor:
        return Extractor(self.encode, self.batch_size)

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        extract = self._extractor.labelled
        bank, labels = extract(params, state, self.train_images, self.train_labels, "train_images")
        queries, truth = None, None
        if self.test_images is not None:
            queries, truth = extract(params, state, self.test_images, self.test_labels, "test_images")
        scores = knn_scores(bank, labels, queries, truth, self.ks, self.temperature)
        names = {k: f"{self.name}_top1" if len(self.ks) == 1 else f"{self.name}_top1_k{k}" for k in self.ks}
        return Outcome({names[k]: score for k, score in scores.items()}, {f"{self.name}_n": scores[self.ks[0]].n})
