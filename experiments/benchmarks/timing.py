"""Timing of several functions against each other: alternating, in one process."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Timed = Callable[[], Any]
"""Runs once and waits for its result."""


def alternate(sides: Mapping[str, Timed], rounds: int, warm: bool = False) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one call of each that is not counted.

    warm: in every round an untimed call precedes each timed one. Without it, memory that one side leaves alone may be
    cold when its turn comes again.
    """
    for side in sides.values():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            if warm:
                side()
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of one side's time by another's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base]))
