"""What an evaluation says: numbers with how many items they are of, how sure they are, and what guessing would get."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

from mmjax.evaluation.bootstrap import bootstrap_interval, ratio, wilson_interval
from mmjax.types import ArrayLike, MmjaxError


@dataclasses.dataclass(frozen=True)
class Score:
    """A measured number.

    Attributes:
        value: in `unit`; accuracies and recalls are percentages, 0 to 100, as in the papers.
        n: items that it is the mean of: images, captions, questions.
        low, high: ends of the 95 % interval over test items; None where none is given.
        chance: what a guess gets.
        unit: "%", "rank", "nats" ...
    """

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    unit: str = "%"

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.2f}, {self.high:.2f}]"
        chance = "" if self.chance is None else f", chance {self.chance:.2f}"
        return f"{self.value:.2f}{self.unit if self.unit == '%' else f' {self.unit}'}{interval} (n = {self.n}{chance})"


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


def metrics(scores: Mapping[str, Score], details: bool = True) -> dict[str, float]:
    """name -> number for a log; with `details` also NAME_low, NAME_high and NAME_chance."""
    told = {name: score.value for name, score in scores.items()}
    if details:
        for name, score in scores.items():
            extra = {"low": score.low, "high": score.high, "chance": score.chance}
            told |= {f"{name}_{key}": value for key, value in extra.items() if value is not None}
    return told


def to_json(scores: Mapping[str, Score], **facts: Any) -> str:
    """{"name": {"value", "n", "low", "high", "chance", "unit"}, ...} and whatever else is to be said of them."""
    rows = {name: dataclasses.asdict(score) for name, score in scores.items()}
    return json.dumps({"scores": rows} | facts, indent=2, default=str) + "\n"


def from_json(text: str) -> dict[str, Score]:
    """The scores that `to_json` wrote."""
    return {name: Score(**row) for name, row in json.loads(text)["scores"].items()}


def table(scores: Mapping[str, Score], title: str | None = None) -> Table:
    """A table for `rich.print`: value, interval, n, chance."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("metric")
    for column in ("value", "95 % interval", "n", "chance"):
        shown.add_column(column, justify="right")
    for name, score in scores.items():
        interval = "" if score.low is None or score.high is None else f"{score.low:.2f} - {score.high:.2f}"
        chance = "" if score.chance is None else f"{score.chance:.2f}"
        unit = "" if score.unit == "%" else f" {score.unit}"
        shown.add_row(name, f"{score.value:.2f}{unit}", interval, f"{score.n:,}", chance)
    return shown


@dataclasses.dataclass(frozen=True)
class InformationBound:
    """In nats: a lower bound on I(X; Y), and the most that the estimate can say, log n."""

    nats: float
    ceiling: float

    def __str__(self) -> str:
        return f"I(X; Y) >= {self.nats:.3f} nats (the estimate cannot exceed log n = {self.ceiling:.3f})"


def mutual_information_bound(loss: float, n: int) -> InformationBound:
    """What a contrastive loss with n candidates, the right one among them, says of mutual information: log n - loss.

    From van den Oord et al. 2018, section 2.3. loss = log n tells nothing; loss near 0 tells "at least log n". Holds
    for one-hot targets without label smoothing only.
    """
    if n < 2 or not math.isfinite(loss):
        raise MmjaxError(f"loss={loss} and n={n}: need a finite loss over at least two candidates")
    return InformationBound(math.log(n) - loss, math.log(n))
