"""Regression metrics: GLUE's two correlations (STS-B), and the squared error.

>>> scores = regression_scores([1.0, 2.0, 3.0, 5.0], [1.5, 1.0, 3.0, 4.5])
>>> print(f"{scores['pearson'].value:.1f} {scores['spearman'].value:.1f} {scores['squared_error'].value}")
92.6 80.0 0.375
"""

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
    """Ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def pearson(sums: Float[np.ndarray, "*r 6"]) -> Float[np.ndarray, "*r"]:
    """100 times the correlation, from sums of 1, x, y, x^2, y^2 and xy; 0 where x or y is constant."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0)
    return 100.0 * (n * xy - x * y) / np.sqrt(np.where(spread > 0, spread, np.inf))


def regression_scores(predicted: Float[ArrayLike, " n"], targets: Float[ArrayLike, " n"]) -> dict[str, Score]:
    """100 times the correlations "pearson" and "spearman"; "squared_error" (chance: always predicting the mean).

    Spearman's interval resamples pairs of ranks among all items.
    Raises MmjaxError for fewer than two numbers, or different numbers of predictions and targets.
    """
    outputs, expected = (np.asarray(values, np.float64) for values in (predicted, targets))
    if outputs.shape != expected.shape or outputs.ndim != 1 or len(outputs) < 2:
        raise MmjaxError(f"predicted {list(outputs.shape)}, targets {list(expected.shape)}: expected [n], n at least 2")
    scores = {}
    for name, x, y in (("pearson", outputs, expected), ("spearman", ranks(outputs), ranks(expected))):
        x, y = x - x.mean(), y - y.mean()  # no digits lost in the sums of squares
        statistics = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1)
        low, high = bootstrap_interval(statistics, pearson)
        scores[name] = Score(float(pearson(statistics.sum(0))), len(x), low, high, 0.0, "")
    errors = np.square(outputs - expected)
    low, high = bootstrap_interval(np.stack([errors, np.full_like(errors, 100.0)], 1))
    return scores | {"squared_error": Score(float(errors.mean()), len(errors), low, high, float(expected.var()), "")}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RegressionEvaluation(ScoredEvaluation):
    """`regression_pearson`, `regression_spearman` and `regression_squared_error`.

    Attributes:
        predict: (params, state, columns [b, ...]) -> [b, 1].
        columns: inputs of `predict`, [n, ...] each. targets: [n].
    """

    name: str = "regression"
    predict: Encode
    columns: Mapping[str, ArrayLike]
    targets: Float[ArrayLike, " n"]
    batch_size: int = 256

    @functools.cached_property
    def _extractor(self) -> Extractor:
        return Extractor(self.predict, self.batch_size)

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        predicted = self._extractor(params, state, self.columns, self.name)[:, 0]
        scores = regression_scores(predicted, self.targets)
        return Outcome(
            {f"{self.name}_{name}": score for name, score in scores.items()}, {f"{self.name}_n": len(predicted)}
        )
