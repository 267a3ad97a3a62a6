"""Instance retrieval: which of many pictures shows the same thing as this one, in another view?

Instance discrimination (InstDisc, MoCo) is trained to recognise an image under augmentation. This protocol measures it
on views that no augmentation makes, such as other artists' drawings of the same emoji. Every item has one picture in
every view. Each picture of one view searches its item among all items of another view, by cosine of the features; the
scores are means over all ordered pairs of views. Ties count against the model, as in `mmjax.evaluation.retrieval`.

    >>> first, second = np.eye(3), np.array([[1.0, 0, 0], [0, 1, 0], [0, 1, 0.5]])
    >>> print(instance_scores({"first": first, "second": second}, ks=(1,))["R@1"].value)
    83.33333333333333
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.evaluation.features import Encode, Extractor
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score, clustered_proportion
from mmjax.evaluation.retrieval import ranks_of_features
from mmjax.types import ArrayLike, Float, Int, MmjaxError, Params

KS = (1, 5)


def instance_ranks(views: Mapping[str, Float[ArrayLike, "n d"]]) -> Int[np.ndarray, "p n"]:
    """Ranks from 0 (best) of each item, one row for each ordered pair of views, pairs in the order of `permutations`.

    views: name -> features of the same n items in the same order.
    Raises MmjaxError, naming the view: fewer than two views, different numbers of items, NaN.
    """
    if len(views) < 2:
        raise MmjaxError(f"views: need at least two, not {len(views)}")
    names = list(views)
    for name in names[1:]:
        if np.shape(views[name]) != np.shape(views[names[0]]):
            shapes = list(np.shape(views[names[0]])), list(np.shape(views[name]))
            raise MmjaxError(f"views: {names[0]} has features {shapes[0]}, {name} {shapes[1]}: need the same items")
    ranks: dict[tuple[str, str], np.ndarray] = {}
    for first, second in itertools.combinations(names, 2):
        both = ranks_of_features(views[first], views[second])
        ranks[first, second], ranks[second, first] = both.image, both.text
    return np.stack([ranks[pair] for pair in itertools.permutations(names, 2)])


def instance_scores(
    views: Mapping[str, Float[ArrayLike, "n d"]], ks: Sequence[int] = KS, resamples: int = 1000, seed: int = 0
) -> dict[str, Score]:
    """`R@K` in percent: the share of searches whose item is among the first K. Intervals resample items with all their
    pictures. Raises MmjaxError as `instance_ranks`."""
    ranks = instance_ranks(views)
    pairs, n = ranks.shape
    totals = np.full(n, pairs)
    return {
        f"R@{k}": clustered_proportion((ranks < k).sum(0), totals, 100.0 * min(k, n) / n, resamples, seed) for k in ks
    }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InstanceRetrievalEvaluation(ScoredEvaluation):
    """`instances_R@1` and `instances_R@5` of an encoder.

    Attributes:
        encode: (params, state, images [b, ...]) -> features [b, d].
        views: name -> images [n, ...] of the same n items in the same order; all views have one shape.
        ks: the K of R@K.
    """

    name: str = "instances"
    encode: Encode
    views: Mapping[str, ArrayLike]
    ks: tuple[int, ...] = KS
    batch_size: int = 256

    @functools.cached_property
    def _extractor(self) -> Extractor:
        return Extractor(self.encode, self.batch_size)

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        features = {name: self._extractor(params, state, images, name) for name, images in self.views.items()}
        scores = instance_scores(features, self.ks)
        counts = {f"{self.name}_n": len(next(iter(features.values())))}
        return Outcome({f"{self.name}_{name}": score for name, score in scores.items()}, counts)
