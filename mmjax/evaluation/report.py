"""Scores from counts of successes, scores as JSON, and the bound on mutual information of a contrastive loss."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.evaluation.bootstrap import bootstrap_interval, ratio, wilson_interval
from mmjax.training.scores import Score
from mmjax.types import ArrayLike, MmjaxError


def proportion(successes: int, n: int, chance: float | None = None) -> Score:
    """The share of n independent items that succeed: `clustered_proportion` of items of one each."""
    return clustered_proportion(np.arange(n) < successes, np.ones(n), chance)


def clustered_proportion(
    successes: ArrayLike, counts: ArrayLike, chance: float | None = None, resamples: int = 1000, seed: int = 0
) -> Score:
    """The share of successes among what belongs to independent items: the captions of images.

    Args:
        successes: [items], of each item's `counts` [items].

    The interval resamples items. Where all or none succeed every resample is the same: there it is Wilson's over items.
    """
    statistics = np.stack([np.asarray(successes, np.float64), np.asarray(counts, np.float64)], 1)
    total, n = statistics.sum(0)
    if total in (0, n):
        low, high = wilson_interval(len(statistics) if total else 0, len(statistics))
    else:
        low, high = bootstrap_interval(statistics, ratio, resamples, seed)
    return Score(100.0 * total / n, int(n), low, high, chance)


def to_json(scores: Mapping[str, Score], **facts: Any) -> str:
    """{"name": {"value", "n", "low", "high", "chance", "unit"}, ...} and `facts` beside them."""
    records = {name: dataclasses.asdict(score) for name, score in scores.items()}
    return json.dumps({"scores": records} | facts, indent=2, default=str) + "\n"


def from_json(text: str) -> dict[str, Score]:
    """The scores that `to_json` wrote."""
    return {name: Score(**row) for name, row in json.loads(text)["scores"].items()}


@dataclasses.dataclass(frozen=True)
class InformationBound:
    """In nats: a lower bound on I(X; Y), and the most that the estimate can reach, log n."""

    nats: float
    ceiling: float

    def __str__(self) -> str:
        return f"I(X; Y) >= {self.nats:.3f} nats (the estimate cannot exceed log n = {self.ceiling:.3f})"


def mutual_information_bound(loss: float, n: int) -> InformationBound:
    """The bound of a contrastive loss with n candidates, the right one among them: log n - loss.

    From van den Oord et al. 2018, section 2.3. loss = log n gives the trivial bound 0; loss near 0 gives log n. Holds
    for one-hot targets without label smoothing only.
    """
    if n < 2 or not math.isfinite(loss):
        raise MmjaxError(f"loss={loss} and n={n}: need a finite loss over at least two candidates")
    return InformationBound(math.log(n) - loss, math.log(n))
