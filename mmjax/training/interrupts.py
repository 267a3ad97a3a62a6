"""Signals that ask a run to stop."""

import signal
import threading
import types
from typing import Any

import jax


class Interrupts:
    """While entered, SIGTERM and SIGINT (the first as the tenth) leave a note that the loop reads between steps."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            # Several processes must stop at the same step: there SIGTERM is left to JAX's preemption service.
            numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
            self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: types.FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def requested(self, step: int) -> str | None:
        """The signal after which to stop before the next step; all processes get the same answer for a step."""
        if jax.process_count() == 1:
            return self.received
        from jax.experimental import multihost_utils

        return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
