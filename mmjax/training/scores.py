"""The scores that an evaluation returns: value, number of items, interval, and the score of a guess."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

DETAILS = ("_low", "_high", "_chance")
"""Suffixes of the names under which a score's interval and chance are logged beside its value."""


@dataclasses.dataclass(frozen=True)
class Score:
    """A measured number.

    Attributes:
        value: in `unit`; accuracies and recalls are percentages, 0 to 100, as in the papers.
        n: the number of items in the mean: images, captions, questions; 0 where it is unknown.
        low, high: ends of the 95 % interval over test items; None where it is not computed.
        chance: the score of a guess.
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


def metrics(outputs: Mapping[str, Any], details: bool = True) -> dict[str, Any]:
    """An evaluation's outputs for a log: a score is its value, with `details` also NAME_low, NAME_high, NAME_chance.

    An output that is no score does not change.
    """
    flat = {name: value.value if isinstance(value, Score) else value for name, value in outputs.items()}
    if details:
        for name, score in outputs.items():
            if isinstance(score, Score):
                extra = zip(DETAILS, (score.low, score.high, score.chance))
                flat |= {name + end: value for end, value in extra if value is not None}
    return flat


def only_scores(outputs: Mapping[str, Any]) -> dict[str, Score]:
    """The scores among an evaluation's outputs; where there are none, its numbers as scores of no unit."""
    scores = {name: value for name, value in outputs.items() if isinstance(value, Score)}
    if scores:
        return scores
    numbers = {name: value for name, value in outputs.items() if not isinstance(value, str) and np.ndim(value) == 0}
    return {name: Score(float(value), 0, unit="") for name, value in numbers.items()}


def table(scores: Mapping[str, Score], title: str | None = None) -> Table:
    """A table for `rich.print`: value, interval, n, chance."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("metric")
    for column in ("value", "95 % interval", "n", "chance"):
        shown.add_column(column, justify="right")
    for name, score in scores.items():
        interval = "" if score.low is None or score.high is None else f"{score.low:.2f} - {score.high:.2f}"
        chance = "" if score.chance is None else f"{score.chance:.2f}"
        unit = f" {score.unit}" if score.unit not in ("%", "") else ""
        shown.add_row(name, f"{score.value:.2f}{unit}", interval, f"{score.n:,}" if score.n else "", chance)
    return shown
