"""Where the numbers of a run go: metrics.jsonl, TensorBoard, artifacts, and at the end a plot."""

import json
import math
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

METRICS = "metrics.jsonl"


class MetricsWriter:
    """One line a call in `metrics.jsonl`; numbers also to TensorBoard. Names have their group: `train/loss`."""

    def __init__(self, workdir: Any, tensorboard: bool = True, resume_step: int = 0):
        """Lines of steps after `resume_step` (of a run that was killed after its last checkpoint) are dropped."""
        self._workdir = epath.Path(workdir)
        self._lines = [line for line in _read_lines(self._workdir) if line["step"] <= resume_step]
        self._local = "://" not in os.fspath(self._workdir)
        self._board = None
        if self._lines or (self._workdir / METRICS).exists():
            (self._workdir / METRICS).write_text("".join(json.dumps(line) + "\n" for line in self._lines))
        if tensorboard:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import tensorboardX
            self._board = tensorboardX.SummaryWriter(
                os.fspath(self._workdir / "tensorboard"), purge_step=resume_step + 1
            )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Numbers are logged; text and uint8 images [height, width, 3] become files in `artifacts/`."""
        numbers = {}
        for name, value in metrics.items():
            if isinstance(value, str) or np.ndim(value) > 0:
                self._artifact(step, name, value)
            else:
                numbers[name] = float(value)
        if not numbers:
            return
        # JSON has no NaN; null keeps the line readable for every parser.
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._lines.append(line)
        if self._local:
            with open(self._workdir / METRICS, "a") as file:
                file.write(json.dumps(line) + "\n")
        else:  # object stores have no append
            (self._workdir / METRICS).write_text("".join(json.dumps(line) + "\n" for line in self._lines))
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)

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
        """`curves.png`: a panel a metric over the steps of the whole run."""
        series: dict[str, list[tuple[int, float]]] = {}
        for line in self._lines:
            for name, value in line.items():
                if name != "step" and value is not None:
                    series.setdefault(name, []).append((line["step"], value))
        if not series:
            return
        from matplotlib.figure import Figure

        columns = min(3, len(series))
        rows = math.ceil(len(series) / columns)
        figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
        for index, (name, points) in enumerate(sorted(series.items())):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.plot(*zip(*points), marker="o" if len(points) < 20 else None, markersize=3, linewidth=1)
            axes.set_title(name, fontsize=9)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
        with (self._workdir / "curves.png").open("wb") as file:
            figure.savefig(file, format="png", dpi=110)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a workdir's metrics.jsonl."""
    return _read_lines(epath.Path(workdir))


def _read_lines(workdir: epath.Path | pathlib.Path) -> list[dict[str, Any]]:
    path = workdir / METRICS
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:  # cut short by a kill; what follows was never written
            break
    return lines
