"""Weighted nearest-neighbour classification of frozen features (InstDisc; `eval_knn.py` of DINO).

The k nearest rows of a bank by cosine vote for their class with weight exp(cosine / temperature). Bank features are
extracted without augmentation, in evaluation mode.
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
"""So many similarities are held at a time: 64 MiB."""


@functools.partial(jax.jit, static_argnames="k")
def _nearest(
    bank: Float[Array, "q d"], queries: Float[Array, "b d"], own: Int[Array, " b"], k: int
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    similarity = jnp.matmul(l2_normalize(queries), l2_normalize(bank).T, precision="highest")
    # A row is not its own neighbour; own = -1 (outside the bank) leaves all.
    similarity = jnp.where(own[:, None] == jnp.arange(len(bank))[None], -jnp.inf, similarity)
    nearest_first, index = jax.lax.top_k(similarity, k)
    return nearest_first, index


def nearest(
    bank: Float[ArrayLike, "q d"], queries: Float[ArrayLike, "m d"] | None, k: int
) -> tuple[Float[np.ndarray, "m k"], Int[np.ndarray, "m k"]]:
    """(cosines, bank rows) of the k nearest rows, nearest first; of equally near ones the lower row comes first.

    Args:
        queries: None: the bank's own rows, each without itself (leave one out).
        k: cut to the rows there are.

    The similarities exist a block of queries at a time. Raises MmjaxError, naming the argument, for bad features.
    """
    rows = checked_features("bank", bank)
    asked = rows if queries is None else checked_features("queries", queries, rows.shape[1])
    most = len(rows) - (queries is None)
    if k < 1 or most < 1:
        raise MmjaxError(f"k={k} neighbours out of {most} rows")
    k = min(k, most)
    own = jnp.arange(len(rows)) if queries is None else jnp.full(len(asked), -1)
    size = min(len(asked), max(1, BLOCK // len(rows)))
    similarity, index = np.empty((len(asked), k), np.float32), np.empty((len(asked), k), np.int32)
    # Blocks of one shape: the last overlaps the one before it.
    starts = [min(start, len(asked) - size) for start in range(0, len(asked), size)]
    for start in starts:
        block = slice(start, start + size)
        similarity[block], index[block] = _nearest(rows, asked[block], own[block], k)
    return similarity, index


@functools.partial(jax.jit, static_argnames="classes")
def votes(
    similarity: Float[Array, "m k"], labels: Int[Array, "m k"], temperature: Float[Array, ""] | float, classes: int
) -> Float[Array, "m c"]:
    """The classes' shares of their neighbours' votes, which sum to 1; `labels` are the neighbours'."""
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
    """Votes for each class; their argmax is the prediction (of equal ones the lower class).

    Args:
        queries: None: leave one out over the bank.
        k: more than the bank has takes all of it.
        classes: by default the largest label + 1.

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
    """k -> accuracy: the neighbours are searched once, for the largest k.

    With queries None (leave one out) the labels are the bank's. A query of a class that the bank lacks is wrong.
    """
    if not ks or not temperature > 0:
        raise MmjaxError(f"ks={ks}, temperature={temperature}: need a k, and a temperature above 0")
    labels = checked_integers("bank_labels", bank_labels, len(bank))
    truth = labels if queries is None else checked_integers("query_labels", query_labels, len(queries))  # type: ignore[arg-type]
    similarity, index = nearest(bank, queries, max(ks))
    classes = int(labels.max()) + 1
    told = {}
    for k in ks:
        predicted = np.argmax(votes(similarity[:, :k], labels[index[:, :k]], temperature, classes), axis=1)
        told[k] = accuracy(predicted, truth)
    return told


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class KNNEvaluation(ScoredEvaluation):
    """kNN accuracy of an encoder: `knn_top1` for one k, `knn_top1_k20` ... for several.

    Attributes:
        encode: (params, state, images [b, ...]) -> features [b, d].
        train_images, train_labels: the bank: an array [n, ...] and int [n], or a pipeline, which has labels of its own.
        test_images, test_labels: what is classified; None: leave one out over the bank.
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
        asked, truth = None, None
        if self.test_images is not None:
            asked, truth = extract(params, state, self.test_images, self.test_labels, "test_images")
        found = knn_scores(bank, labels, asked, truth, self.ks, self.temperature)
        names = {k: f"{self.name}_top1" if len(self.ks) == 1 else f"{self.name}_top1_k{k}" for k in self.ks}
        return Outcome({names[k]: score for k, score in found.items()}, {f"{self.name}_n": found[self.ks[0]].n})
