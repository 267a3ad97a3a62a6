"""Intervals, paired tests, summaries and tables: by hand, against scipy, coverage in simulations."""

import io
import math

import numpy as np
import pytest
import rich.console

from mmjax.errors import MmjaxError
from mmjax.evaluation import bootstrap, report
from mmjax.training import scores as training_scores
from mmjax.training.scores import Score


def test_bootstrap_of_a_mean_has_its_spread():
    values = np.random.default_rng(0).normal(3.0, 2.0, 401)
    statistics = np.stack([values / 100, np.ones(401)], 1)
    sums = bootstrap.resampled_sums(statistics, 4000, seed=1)
    means = bootstrap.ratio(sums)
    assert means.mean() == pytest.approx(values.mean(), abs=4 * values.std() / (401 * 4000) ** 0.5)
    assert means.std() == pytest.approx(values.std() / 401**0.5, rel=0.05)
    low, high = bootstrap.bootstrap_interval(statistics, resamples=4000, seed=1)
    half = 1.96 * values.std() / 401**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.04) and high == pytest.approx(
        values.mean() + half, abs=0.04
    )


def test_bootstrap_keeps_an_images_captions_together():
    # 50 images of 5 captions, all five right or all five wrong: the spread is that of 50 items, not of 250.
    hits = np.repeat([5, 0], 25)
    low, high = bootstrap.bootstrap_interval(np.stack([hits, np.full(50, 5)], 1), resamples=5000)
    sd = 100 * 0.5 / 50**0.5
    assert high - low == pytest.approx(2 * 1.96 * sd, rel=0.08)


def test_bootstrap_is_a_function_of_seed_and_not_of_order(monkeypatch):
    values = np.random.default_rng(2).integers(0, 5, (97, 2)) + 1
    first = bootstrap.resampled_sums(values, 1000, seed=3)
    np.testing.assert_array_equal(first, bootstrap.resampled_sums(values[::-1], 1000, seed=3))
    assert (first != bootstrap.resampled_sums(values, 1000, seed=4)).any()
    monkeypatch.setattr(bootstrap, "BLOCK", 100)  # the resamples are computed in several blocks
    np.testing.assert_array_equal(first, bootstrap.resampled_sums(values, 1000, seed=3))


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        hits = rng.binomial(5, 0.3, 150)
        low, high = bootstrap.bootstrap_interval(np.stack([hits, np.full(150, 5)], 1), resamples=500, seed=trial)
        covered += low <= 30.0 <= high
    assert covered >= 180  # 95 % of 200 is 190, with a standard deviation of 3


def test_wilson_by_hand():
    low, high = bootstrap.wilson_interval(800, 1000)
    assert (low, high) == (pytest.approx(77.41, abs=0.01), pytest.approx(82.36, abs=0.01))
    assert bootstrap.wilson_interval(0, 10) == (0.0, pytest.approx(100 * 3.841459 / 13.841459, abs=1e-3))
    assert bootstrap.wilson_interval(10, 10)[1] == 100 and bootstrap.wilson_interval(0, 7)[0] == 0  # not 3.6e-15
    with pytest.raises(MmjaxError, match="successes=3 of n=2"):
        bootstrap.wilson_interval(3, 2)


def test_mcnemar_by_hand_and_by_scipy():
    stats = pytest.importorskip("scipy.stats")
    first = np.array([True] * 10 + [False] * 2 + [True] * 30)
    second = np.array([False] * 10 + [True] * 2 + [True] * 30)
    result = bootstrap.mcnemar(first, second)
    assert (result.only_first, result.only_second) == (10, 2)
    assert result.p == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    rng = np.random.default_rng(6)
    one, two = rng.random(5000) < 0.7, rng.random(5000) < 0.68
    result = bootstrap.mcnemar(one, two)
    expected = stats.binomtest(result.only_first, result.only_first + result.only_second, 0.5).pvalue
    assert result.p == pytest.approx(expected, rel=1e-6)
    assert bootstrap.mcnemar(one, one).p == 1
    with pytest.raises(MmjaxError, match="same items"):
        bootstrap.mcnemar(one, two[:5])


def test_paired_bootstrap_detects_what_unpaired_intervals_miss():
    rng = np.random.default_rng(7)
    base = rng.random(400) < 0.5
    better = base | (rng.random(400) < 0.06)
    one, two = (np.stack([right, np.ones(400)], 1) for right in (better, base))
    result = bootstrap.paired_bootstrap(one, two)
    assert result.value == pytest.approx(100 * (better.mean() - base.mean()))
    assert 0 < result.low < result.value < result.high and result.p < 0.01
    assert bootstrap.bootstrap_interval(one)[0] < bootstrap.bootstrap_interval(two)[1]
    same = bootstrap.paired_bootstrap(two, two)
    assert (same.value, same.p) == (0, 1)


def test_over_seeds_and_holm():
    summary = bootstrap.over_seeds([60.6, 60.6, 60.7, 60.9, 61.1])
    assert summary.mean == pytest.approx(60.78) and summary.std == pytest.approx(0.2168, abs=1e-4) and summary.n == 5
    assert str(summary) == "60.78 ± 0.22 (n = 5)"
    assert bootstrap.over_seeds([3.0]).std is None and "one run" in str(bootstrap.over_seeds([3.0]))
    assert bootstrap.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with pytest.raises(MmjaxError, match="values"):
        bootstrap.over_seeds([])


@pytest.mark.parametrize("bad", [np.zeros((0, 2)), np.full((3, 2), np.nan), np.ones(3)])
def test_statistics_are_checked(bad):
    with pytest.raises(MmjaxError, match="statistics"):
        bootstrap.resampled_sums(bad)


def test_proportions():
    score = report.proportion(800, 1000, 25.0)
    assert (score.value, score.n, score.chance) == (80.0, 1000, 25.0)
    # The 2.5 and 97.5 % points of a binomial distribution of 1,000 draws at 0.8: 775 and 824.
    np.testing.assert_allclose([score.low, score.high], [77.5, 82.4], atol=0.3)
    assert report.proportion(0, 4) == Score(0.0, 4, *bootstrap.wilson_interval(0, 4))
    score = report.clustered_proportion([2, 0, 1], [2, 1, 5])
    assert score.value == pytest.approx(100 * 3 / 8) and score.n == 8
    assert report.clustered_proportion([2, 1], [2, 1]).low == bootstrap.wilson_interval(2, 2)[0]
    assert report.clustered_proportion([0, 0], [2, 1]).high == bootstrap.wilson_interval(0, 2)[1]


def test_table_json_and_metrics():
    scores = {"top1": Score(76.25, 50000, 75.9, 76.6, 0.1), "median": Score(3.0, 7, unit="rank")}
    assert report.from_json(report.to_json(scores, split="test")) == scores
    assert '"split": "test"' in report.to_json(scores, split="test")
    console = rich.console.Console(width=100, record=True, file=io.StringIO())
    console.print(training_scores.table(scores, "ImageNet"))
    text = console.export_text()
    for word in ("ImageNet", "76.25", "75.90 - 76.60", "50,000", "0.10", "3.00 rank"):
        assert word in text
    assert training_scores.metrics(scores, details=False) == {"top1": 76.25, "median": 3.0}
    assert training_scores.metrics(scores) == {
        "top1": 76.25, "median": 3.0, "top1_low": 75.9, "top1_high": 76.6, "top1_chance": 0.1
    }  # fmt: skip
    assert str(scores["top1"]) == "76.25% [75.90, 76.60] (n = 50000, chance 0.10)"


def test_information_bound():
    bound = report.mutual_information_bound(2.0, 4096)
    assert bound.ceiling == pytest.approx(8.318, abs=1e-3) and bound.nats == pytest.approx(6.318, abs=1e-3)
    assert report.mutual_information_bound(math.log(256), 256).nats == pytest.approx(0)
    with pytest.raises(MmjaxError, match="loss=nan"):
        report.mutual_information_bound(math.nan, 4)
