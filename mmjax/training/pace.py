"""The speed of a run by its steps alone, without compilation, evaluations and saves."""

import collections
import time
from collections.abc import Iterator
from contextlib import contextmanager

WINDOW = 64
"""Steps that the time left is measured by."""


class Pace:
    """Times steps on the host, which is never more than a few steps ahead of the device."""

    def __init__(self) -> None:
        self._idle = 0.0
        self._steps: collections.deque[tuple[int, float]] = collections.deque(maxlen=WINDOW)
        self._logged: tuple[int, float] | None = None

    def restart(self) -> None:
        """Discards the time so far, with the first step's compilation. Time starts at the next mark."""
        self._steps.clear()
        self._logged = None

    def mark(self, step: int) -> None:
        """A step was dispatched."""
        self._steps.append((step, time.perf_counter() - self._idle))
        if self._logged is None:
            self._logged = self._steps[0]

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside from the time of the steps."""
        began = time.perf_counter()
        yield
        self._idle += time.perf_counter() - began

    def since_log(self, step: int) -> float | None:
        """Steps per second since the call before; None where none was taken."""
        now = time.perf_counter() - self._idle
        before, self._logged = self._logged, (step, now)
        if before is None or step <= before[0] or now <= before[1]:
            return None
        return (step - before[0]) / (now - before[1])

    def seconds_left(self, steps: int) -> float | None:
        """Until `steps`, at the pace of the last `WINDOW` steps; None before two of them were measured."""
        if len(self._steps) < 3:
            return None
        (first, began), (last, ended) = self._steps[0], self._steps[-1]
        return (steps - last) * (ended - began) / (last - first)
