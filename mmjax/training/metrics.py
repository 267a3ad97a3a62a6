"""Writes the metrics of a run: metrics.jsonl, TensorBoard, artifacts, and at the end a plot."""

import json
import math
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mmjax.training.curves import draw
from mmjax.training.event_file import UPLOAD_SECONDS, EventFile
from mmjax.training.scores import Score, metrics
from mmjax.training.storage import BestEffort, is_local, write_file

METRICS = "metrics.jsonl"
CURVES = "curves.png"


class MetricsWriter:
    """One line a call in `metrics.jsonl`; numbers also to TensorBoard. Names have their group: `train/loss`.

    What cannot be written is reported once a file, and written later if that becomes possible; nothing is raised. An
    object store gets metrics.jsonl every `UPLOAD_SECONDS`, and with `flush`: before a checkpoint, so that a resumed run
    has every line up to its step.
    """

    def __init__(
        self,
        workdir: Any,
        tensorboard: bool = True,
        resume_step: int = 0,
        warn: Callable[[str], None] = warnings.warn,
    ):
        """Lines of steps after `resume_step` (of a run that was killed after its last checkpoint) are dropped."""
        self._workdir = epath.Path(workdir)
        self._attempt = BestEffort(warn)
        self._path = self._workdir / METRICS
        self._lines: list[dict[str, Any]] = []
        self._units: dict[str, str] = {}
        self._size, self._pending, self._uploaded = 0, b"", time.monotonic()
        with self._attempt(self._path):
            self._lines = [line for line in _read_lines(self._workdir) if line["step"] <= resume_step]
            if self._path.exists():
                data = _encode(self._lines)
                write_file(self._path, data)
                self._size = len(data)
        self._board = EventFile(self._workdir / "tensorboard", resume_step + 1) if tensorboard else None

    def write(self, step: int, outputs: Mapping[str, Any]) -> None:
        """Scores and numbers are logged; text and uint8 images [height, width, 3] become files in `artifacts/`.

        The numbers of a second evaluation at a step replace those of the first.
        """
        numbers = {}
        self._units |= {name: value.unit for name, value in outputs.items() if isinstance(value, Score)}
        for name, value in metrics(outputs).items():
            if isinstance(value, str) or np.ndim(value) > 0:
                with self._attempt(self._workdir / "artifacts"):
                    self._artifact(step, name, value)
            else:
                numbers[name] = float(value)
        if not numbers:
            return
        # JSON has no NaN; null keeps the line readable for every parser.
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        if self._replace(line):
            return
        self._lines.append(line)
        self._pending += _encode([line])
        if is_local(self._path) or time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self.flush()
        if self._board is not None:
            with self._attempt(self._workdir / "tensorboard"):
                self._board.write(step, numbers)

    def _replace(self, line: dict[str, Any]) -> bool:
        """Whether a line of this step had one of the names; it has the new numbers then."""
        for earlier in reversed(self._lines):
            if earlier["step"] != line["step"]:
                return False
            if earlier.keys() & line.keys() != {"step"}:
                earlier |= line
                with self._attempt(self._path):
                    write_file(self._path, _encode(self._lines))
                    self._size, self._pending = len(_encode(self._lines)), b""
                return True
        return False

    def flush(self) -> None:
        """Writes the lines that are not in the file yet."""
        if not self._pending:
            return
        with self._attempt(self._path):
            if is_local(self._path):
                with open(self._path, "ab") as file:
                    file.truncate(self._size)  # the rest of a failed write
                    file.write(self._pending)
            else:  # object stores have no append
                self._uploaded = time.monotonic()
                self._path.write_bytes(_encode(self._lines))
            self._size, self._pending = self._size + len(self._pending), b""

    def last(self) -> dict[str, float]:
        """The newest value of every metric."""
        return {
            name: value for line in self._lines for name, value in line.items() if name != "step" and value is not None
        }

    def has(self, step: int, prefix: str) -> bool:
        """Whether a metric with this prefix was written at a step."""
        return any(name.startswith(prefix) for line in self._lines if line["step"] == step for name in line)

    def _artifact(self, step: int, name: str, value: Any) -> None:
        path = self._workdir / "artifacts" / f"{name}_{step}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, str):
            path.with_suffix(".txt").write_text(value)
            return
        from PIL import Image

        with path.with_suffix(".png").open("wb") as file:
            Image.fromarray(np.asarray(value, np.uint8)).save(file, format="PNG")

    def plot(self) -> None:
        """`curves.png`: one page of the whole run."""
        with self._attempt(self._workdir / CURVES):
            page = draw(self._lines, self._units, title=self._workdir.name)
            if page is not None:
                write_file(self._workdir / CURVES, page)

    def close(self) -> None:
        """Writes the lines that are still missing."""
        self.flush()
        if self._board is not None:
            with self._attempt(self._workdir / "tensorboard"):
                self._board.flush()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a workdir's metrics.jsonl."""
    return _read_lines(epath.Path(workdir))


def _encode(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _read_lines(workdir: epath.Path | pathlib.Path) -> list[dict[str, Any]]:
    path = workdir / METRICS
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:  # cut short by a kill; what follows was never written
            break
    return lines
