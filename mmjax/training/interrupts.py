"""Signals that stop a run."""

import os
import signal
import threading
import types
from typing import Any

import jax


class Interrupts:
    """While entered, SIGTERM and SIGINT (Ctrl-C) stop the run after a step instead of at once, however many come.

    Several processes stop after the same step, whichever of them the signal reached: JAX's preemption service agrees on
    it. That service listens to SIGTERM alone, so there a process that is interrupted sends itself SIGTERM.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            several = jax.process_count() > 1
            handlers = {signal.SIGINT: self._forward if several else self._note}
            if not several:
                handlers[signal.SIGTERM] = self._note
            self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: types.FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def _forward(self, number: int, frame: types.FrameType | None) -> None:
        self._note(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> str | None:
        """The signal after which to stop before the next step; all processes get an answer for the same step.

        A process that only follows the others reports SIGTERM.
        """
        if jax.process_count() == 1:
            return self.received
        from jax.experimental import multihost_utils

        return (self.received or "SIGTERM") if multihost_utils.reached_preemption_sync_point(step) else None
