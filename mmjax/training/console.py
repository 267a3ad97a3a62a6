"""The output of a run: its facts at the start, progress, scores during the run, and its files at the end.

A terminal has a bar, and tables above it. A notebook has lines and tables. Elsewhere (a pipe, a log file) every event
is one line.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from mmjax import tree
from mmjax.training.checkpoint import FOLDER
from mmjax.training.experiment import ExperimentConfig
from mmjax.training.metrics import CURVES, METRICS
from mmjax.training.partition import FROZEN
from mmjax.training.scores import only_scores, table

Advance = Callable[[int, Mapping[str, float], float | None], None]
"""(step, last metrics, seconds left): moves the bar."""


class RunConsole:
    """Prints for one run; silent on all processes but the first."""

    def __init__(self, config: ExperimentConfig):
        self._config = config
        file = sys.stdout if jax.process_index() == 0 else open(os.devnull, "w")  # noqa: SIM115
        self.console = Console(file=file, highlight=False)
        self._bar: tuple[Progress, Any] | None = None

    def print(self, text: str) -> None:
        if self.console.is_jupyter:
            print(text)  # a stream that a notebook joins to one output
        else:
            self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        if self.console.is_jupyter:
            print(f"warning: {text}")
        else:
            self.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    # ------------------------------------------------------------------------------------------------------- start

    def start(self, workdir: Any, data: Any, model: Any, params: Any, labels: Mapping[str, str]) -> None:
        """The facts of a run before its first step.

        Args:
            data: the result of `train_data()`.
            model: the network's config.
            params: host arrays; labels: slash path -> label of the partition.
        """
        config = self._config
        facts = {
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {config.lift}",
            "precision": _precision(params, model),
            "steps": f"{config.steps:,} of {config.batch_size:,} {config.unit}, seed {config.seed}",
            "data": _data(data, config),
            "parameters": _parameters(params, labels),
            "workdir": os.fspath(workdir),
        }
        if jax.process_count() > 1:
            facts["device"] += f", {jax.process_count()} processes"
        for name, fact in facts.items():
            if fact:
                self.print(f"{name:<11}{fact}")
        if self.console.is_terminal or self.console.is_jupyter:
            self.console.print(_modules(params, labels))

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Around the first step, which compiles the program."""
        began = time.perf_counter()
        if self._bar is None:
            self.print("compiling the training step")
        yield
        self.print(f"compiled; the first step took {duration(time.perf_counter() - began)}")

    # ---------------------------------------------------------------------------------------------------- progress

    @contextmanager
    def progress(self, start: int) -> Iterator[Advance]:
        """A bar on a terminal; elsewhere the lines of `metrics` are the progress."""
        if not self.console.is_terminal:
            yield lambda step, last, left: None
            return
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[state]}"))
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("", total=self._config.steps, completed=start, state="compiling the training step")
            self._bar = progress, task

            def advance(step: int, last: Mapping[str, float], left: float | None) -> None:
                loss, rate = last.get("train/loss"), last.get(f"perf/{self._config.unit}_per_second")
                parts = [] if loss is None else [f"loss {loss:.4g}"]
                parts += [] if rate is None else [f"{rate:.4g} {self._config.unit}/s"]
                parts += [f"{duration(left)} left"] if left else []
                progress.update(task, completed=step, state=" · ".join(parts))

            try:
                yield advance
            finally:
                self._bar = None

    @contextmanager
    def activity(self, text: str) -> Iterator[None]:
        """Shows on a terminal what a run does between steps, while it lasts."""
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, state=text)
            yield
        elif self.console.is_terminal:
            with self.console.status(text):
                yield
        else:
            yield

    def metrics(self, step: int, numbers: Mapping[str, Any], left: float | None) -> None:
        """Training metrics of a step; a terminal has them on its bar."""
        if self.console.is_terminal:
            return
        shown = {"train/loss": numbers.get("train/loss")} | dict(numbers)
        shown.pop("perf/steps_per_second", None)
        if not shown.get("train/skipped_updates"):
            shown.pop("train/skipped_updates", None)
        parts = [f"{name.split('/')[-1]}={value:.4g}" for name, value in shown.items() if value is not None]
        parts += [f"left={duration(left)}"] if left else []
        self.print(f"step {step}/{self._config.steps}  {'  '.join(parts)}")

    def scores(self, step: int, name: str, outputs: Mapping[str, Any]) -> None:
        """An evaluation's scores: the table that `mmjax evaluate` prints, in a pipe one line."""
        scores = only_scores(outputs)
        if not scores:
            return
        if self.console.is_terminal or self.console.is_jupyter:
            self.console.print(table(scores, f"{name} at step {step} of {self._config.steps}"))
            return
        parts = [f"{key}={score.value:.4g}" for key, score in scores.items()]
        self.print(f"step {step}/{self._config.steps}  {'  '.join(parts)}")

    def written(self, workdir: Any) -> None:
        """The paths of a run's files that exist."""
        workdir = epath.Path(workdir)
        folder = workdir / FOLDER
        saved = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.exists() else []
        newest = max(saved, key=lambda path: int(path.name), default=None)
        paths = {
            "checkpoint": newest,
            "curves": workdir / CURVES,
            "metrics": workdir / METRICS,
            "artifacts": workdir / "artifacts",
        }
        for name, path in paths.items():
            if path is not None and path.exists():
                self.print(f"{name:<11}{path}")


def duration(seconds: float) -> str:
    """Seconds as one reads them: "3.2 s", "4:05 min", "7:31 h"."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def _precision(params: Any, model: Any) -> str:
    """The dtypes of the parameters, of the computation, and of products where that was set."""
    stored = dict.fromkeys(str(leaf.dtype) for leaf in jax.tree.leaves(params))
    computed = dict.fromkeys(_dtypes(model))
    products = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    text = f"parameters {', '.join(stored)}"
    text += f", computation {', '.join(computed)}" if computed else ""
    return text + (f", products {products}" if products else "")


def _dtypes(config: Any) -> Iterator[str]:
    """The values of all fields called dtype of a config and of the configs inside it."""
    for field in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
        value = getattr(config, field.name)
        if field.name == "dtype":
            yield str(value)
        else:
            yield from _dtypes(value)


def _data(data: Any, config: ExperimentConfig) -> str:
    """Records of the training data, and the number of epochs."""
    try:
        records = len(data.source)
    except (AttributeError, TypeError):
        return ""
    return f"{records:,} {config.unit}, {config.steps * config.batch_size / records:.3g} epochs"


def _parameters(params: Any, labels: Mapping[str, str]) -> str:
    sizes = {path: math.prod(leaf.shape) for path, leaf in tree.flatten(params).items()}
    total = sum(sizes.values())
    trainable = sum(size for path, size in sizes.items() if labels[path] != FROZEN)
    return f"{total:,}, {'all' if trainable == total else f'{trainable:,}'} trainable"


def _modules(params: Any, labels: Mapping[str, str]) -> Table:
    """A row for each top-level module: arrays, trainable and frozen parameters."""
    rows: dict[str, list[int]] = {}
    for path, leaf in tree.flatten(params).items():
        row = rows.setdefault(path.split("/")[0], [0, 0, 0])
        row[0] += 1
        row[2 if labels[path] == FROZEN else 1] += math.prod(leaf.shape)
    shown = Table()
    shown.add_column("module")
    for name in ("arrays", "trainable", "frozen"):
        shown.add_column(name, justify="right")
    for name, row in rows.items():
        shown.add_row(name, *(f"{value:,}" for value in row))
    shown.add_section()
    shown.add_row("total", *(f"{sum(row[i] for row in rows.values()):,}" for i in range(3)))
    return shown
