"""Uncertainty: intervals over test items, tests between two systems, spread over seeds. NumPy, on the host.

An item is what was sampled independently: for retrieval and captions an IMAGE with all its captions, never a caption.

    >>> low, high = wilson_interval(9, 10)  # 90 % of ten items
    >>> print(f"{low:.1f} to {high:.1f}")
    59.6 to 98.2
    >>> print(over_seeds([71.0, 72.0, 73.0]))
    72.00 ± 1.00 (n = 3)
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from mmjax.types import ArrayLike, Bool, Float, Int, MmjaxError

RESAMPLES = 1000
LEVEL = 0.95
Z = 1.959963984540054
"""The normal distribution's 97.5 % point."""
BLOCK = 2**24
"""Number of counts of resampled items in memory at a time."""

Metric = Callable[[np.ndarray], np.ndarray]
"""Sums of the items' statistics [..., m] -> the metric [...]."""


def ratio(sums: np.ndarray) -> np.ndarray:
    """The metric "first statistic over the second, in percent": hits over queries, correct over items."""
    return np.asarray(100.0 * sums[..., 0] / sums[..., 1])


def resampled_counts(
    counts: Int[ArrayLike, "*kinds"], resamples: int = RESAMPLES, seed: int = 0
) -> Int[np.ndarray, "resamples *kinds"]:
    """Counts of each kind in `resamples` resamples of the same number of items, with replacement."""
    observed = np.asarray(counts)
    resampled = np.random.default_rng(seed).multinomial(
        observed.sum(), observed.ravel() / observed.sum(), size=resamples
    )
    return resampled.reshape(resamples, *observed.shape)


def resampled_sums(
    statistics: Float[ArrayLike, "items m"], resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "resamples m"]:
    """Sums of the statistics over `resamples` resamples of all items, with replacement; float64.

    Items with equal statistics are sampled together (a multinomial sample of the count of each distinct row): the same
    distribution at a cost that does not grow with the items, and results that do not depend on the items' order.
    """
    values = np.asarray(statistics, np.float64)
    if values.ndim != 2 or not len(values) or not np.isfinite(values).all():
        raise MmjaxError(f"statistics: need finite numbers [items, m] of at least one item, not {list(values.shape)}")
    distinct, counts = np.unique(values, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, values.shape[1]))
    step = max(1, BLOCK // len(distinct))
    for start in range(0, resamples, step):
        block = sums[start : start + step]
        block[:] = rng.multinomial(len(values), counts / len(values), size=len(block)) @ distinct
    return sums


def bootstrap_interval(
    statistics: Float[ArrayLike, "items m"],
    metric: Metric = ratio,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[float, float]:
    """The percentile interval of a corpus metric that is a function of its items' summed statistics."""
    return interval(metric(resampled_sums(statistics, resamples, seed)), level)


def interval(resampled: Float[np.ndarray, " resamples"], level: float = LEVEL) -> tuple[float, float]:
    """The percentiles between which a share `level` of a metric's resampled values lies; NaN values are ignored."""
    tail = 50.0 * (1.0 - level)
    low, high = np.nanpercentile(resampled, [tail, 100.0 - tail])
    return float(low), float(high)


def wilson_interval(successes: float, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a proportion, in percent; its width is above 0 even where all or none succeed."""
    if n < 1 or not 0 <= successes <= n:
        raise MmjaxError(f"successes={successes} of n={n} is not a proportion")
    share, wide = successes / n, z * z / n
    centre = share + wide / 2
    half = z * math.sqrt((share * (1 - share) + wide / 4) / n)
    low, high = 100.0 * (centre - half) / (1 + wide), 100.0 * (centre + half) / (1 + wide)
    return 0.0 if successes == 0 else low, 100.0 if successes == n else high  # exact where rounding is not


@dataclasses.dataclass(frozen=True)
class Difference:
    """First minus second system on the same items, its interval, and `p`: the two-sided p value of no difference."""

    value: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    first: Float[ArrayLike, "items m"],
    second: Float[ArrayLike, "items m"],
    metric: Metric = ratio,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The difference of a corpus metric between two systems, both evaluated on the same resampled items."""
    one, two = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if one.shape != two.shape:
        raise MmjaxError(f"first {list(one.shape)} and second {list(two.shape)} should have the same items")
    m = one.shape[1]
    sums = resampled_sums(np.concatenate([one, two], 1), resamples, seed)
    resampled = metric(sums[:, :m]) - metric(sums[:, m:])
    low, high = interval(resampled)
    beyond = int(min(np.count_nonzero(resampled <= 0), np.count_nonzero(resampled >= 0)))
    value = float(metric(one.sum(0)) - metric(two.sum(0)))
    return Difference(value, low, high, min(1.0, 2 * (beyond + 1) / (resamples + 1)))


@dataclasses.dataclass(frozen=True)
class McNemar:
    """Numbers of items that only the first and only the second system got right; `p`: exact binomial, two-sided."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: Bool[ArrayLike, " items"], second: Bool[ArrayLike, " items"]) -> McNemar:
    """Tests whether two systems' accuracies on the same items differ (McNemar 1947), from the items that only one of
    them got right."""
    one, two = np.asarray(first, bool), np.asarray(second, bool)
    if one.shape != two.shape or one.ndim != 1:
        raise MmjaxError(f"first {list(one.shape)} and second {list(two.shape)} should have the same items")
    b, c = int(np.count_nonzero(one & ~two)), int(np.count_nonzero(two & ~one))
    n = b + c
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(min(b, c) + 1)]
    tail = sum(math.exp(value - n * math.log(2.0)) for value in logs)
    return McNemar(b, c, min(1.0, 2 * tail))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values of several comparisons: controls the chance of any false positive."""
    n, adjusted, worst = len(p_values), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(n), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (n - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


@dataclasses.dataclass(frozen=True)
class OverSeeds:
    """Mean and sample standard deviation (n - 1) of n runs; `std` is None for a single run."""

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} (one run)" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f} (n = {self.n})"


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """The summary of runs that differ only in their seed."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise MmjaxError(f"values: need one finite number per run, not {values!r}")
    return OverSeeds(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None, len(array))
