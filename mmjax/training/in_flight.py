"""Metrics of the dispatched steps: a bound on their number, and one transfer to the host for a group of them."""

import collections
from collections.abc import Mapping
from typing import Any

import jax

from mmjax.training.lift import PackedMetrics, pack_metrics

IN_FLIGHT = 2
"""Steps dispatched ahead of the device: enough to keep it busy, few enough to bound the memory of their batches."""
GROUP = 32
"""The maximum of steps that share a transfer: a refused update is noticed within them."""

Received = list[tuple[int, list[dict[str, float]]]]
"""(step, metrics of each arm) of the steps whose metrics are on the host now; a run has one arm."""


class InFlight:
    """Bounds the dispatched steps, and brings their metrics to the host with one transfer for a group of steps.

    A group ends where a step is logged. It is packed on the device right after its last step, and fetched when the
    step after that is dispatched: the device has work while the host waits for the numbers.
    """

    def __init__(self, log_every: int):
        self._log_every = log_every
        self._dispatched: collections.deque[Any] = collections.deque(maxlen=IN_FLIGHT + 1)
        self._group: list[tuple[int, Mapping[str, jax.Array]]] = []
        self._packed: list[tuple[list[int], PackedMetrics]] = []

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> Received:
        """Takes the metrics of a step that was just dispatched; returns the metrics that have arrived, oldest first."""
        self._dispatched.append(metrics)
        if len(self._dispatched) > IN_FLIGHT:
            jax.block_until_ready(self._dispatched[0])
        received = self._fetch()
        self._group.append((step, metrics))
        if step % self._log_every == 0 or len(self._group) == GROUP:
            self._pack()
        return received

    def flush(self) -> Received:
        """Waits for every step; returns the metrics not returned before."""
        self._pack()
        return self._fetch()

    def _pack(self) -> None:
        if self._group:
            steps, metrics = zip(*self._group)
            self._packed.append((list(steps), pack_metrics(metrics)))
            self._group = []

    def _fetch(self) -> Received:
        packed, self._packed = self._packed, []
        return [pair for steps, metrics in packed for pair in zip(steps, metrics.fetch())]
