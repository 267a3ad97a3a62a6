"""Correlations and squared errors, against scipy and by hand."""

import numpy as np
import pytest
from scipy import stats

from mmjax.errors import MmjaxError
from mmjax.evaluation.regression import ranks, regression_scores


def test_against_scipy():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 7, 211) + 1e4
    y = x + rng.integers(-4, 5, 211)
    np.testing.assert_array_equal(ranks(y), stats.rankdata(y))
    scores = regression_scores(x, y)
    assert scores["pearson"].value == pytest.approx(100 * stats.pearsonr(x, y).statistic, rel=1e-9)
    assert scores["spearman"].value == pytest.approx(100 * stats.spearmanr(x, y).statistic, rel=1e-9)
    interval = stats.pearsonr(x, y).confidence_interval()
    assert abs(scores["pearson"].low - 100 * interval.low) < 3 and abs(scores["pearson"].high - 100 * interval.high) < 3
    assert scores["squared_error"].value == pytest.approx(np.mean((x - y) ** 2))
    assert scores["squared_error"].chance == pytest.approx(np.var(y))


def test_a_constant_has_no_correlation():
    scores = regression_scores(np.full(5, 3.0), np.arange(5.0))
    assert scores["pearson"].value == scores["spearman"].value == 0
    with pytest.raises(MmjaxError, match=r"expected \[n\]"):
        regression_scores([1.0, 2.0], [1.0])
