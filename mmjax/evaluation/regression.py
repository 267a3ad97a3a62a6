"""Predicted numbers against the right ones: GLUE's two correlations (STS-B), and the squared error."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.evaluation.bootstrap import bootstrap_interval
from mmjax.evaluation.features import Encode, Extractor
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score
from mmjax.types import ArrayLike, Float, MmjaxError, Params


def ranks(values: Float[ArrayLike, " n"]) -> Float[np.ndarray, " n"]:
    """Places in order, from 1; equal values share the mean of theirs."""
    _, where, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


def pearson(sums: Float[np.ndarray, "*r 6"]) -> Float[np.ndarray, "*r"]:
    """100 times the correlation, from sums of 1, x, y, x^2, y^2 and xy; 0 where either is constant."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0)
    return 100.0 * (n * xy - x * y) / np.sqrt(np.where(spread > 0, spread, np.inf))


def regression_scores(predicted: Float[ArrayLike, " n"], wanted: Float[ArrayLike, " n"]) -> dict[str, Score]:
    """Of "pearson" and "spearman" 100 times the correlation; "squared_error" beside always telling the mean.

    Spearman's interval resamples pairs of ranks among all.
    Raises MmjaxError for fewer than two numbers, or not as many.
    """
    one, other = (np.asarray(values, np.float64) for values in (predicted, wanted))
    if one.shape != other.shape or one.ndim != 1 or len(one) < 2:
        raise MmjaxError(f"predicted {list(one.shape)}, wanted {list(other.shape)}: want as many, two or more")
    scores = {}
    for name, x, y in (("pearson", one, other), ("spearman", ranks(one), ranks(other))):
        x, y = x - x.mean(), y - y.mean()  # no digits lost in the sums of squares
        statistics = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1)
        low, high = bootstrap_interval(statistics, pearson)
        scores[name] = Score(float(pearson(statistics.sum(0))), len(x), low, high, 0.0, "")
    errors = np.square(one - other)
    low, high = bootstrap_interval(np.stack([errors, np.full_like(errors, 100.0)], 1))
    return scores | {"squared_error": Score(float(errors.mean()), len(errors), low, high, float(other.var()), "")}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RegressionEvaluation(ScoredEvaluation):
    """`regression_pearson`, `regression_spearman` and `regression_squared_error`.

    Attributes:
        predict: (params, state, columns [b, ...]) -> [b, 1].
        columns: what it takes, [n, ...] each. wanted: [n].
    """

    name: str = "regression"
    predict: Encode
    columns: Mapping[str, ArrayLike]
    wanted: Float[ArrayLike, " n"]
    batch_size: int = 256

    @functools.cached_property
    def _extractor(self) -> Extractor:
        return Extractor(self.predict, self.batch_size)

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        found = self._extractor(params, state, self.columns, self.name)[:, 0]
        scores = regression_scores(found, self.wanted)
        return Outcome({f"{self.name}_{name}": score for name, score in scores.items()}, {f"{self.name}_n": len(found)})
