"""The verb `check`: an experiment's data and its first gradient, before a long run."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich
import tokenizers
from rich.progress import track
from rich.table import Table

from mmjax import tree
from mmjax.cli.runs import load_weights
from mmjax.errors import MmjaxError
from mmjax.objectives.language import IGNORED
from mmjax.training.experiment import batch_shapes, load_experiment, parse_overrides
from mmjax.training.partition import FROZEN
from mmjax.training.preflight import gradient_norms
from mmjax.training.start import Start

LISTED = 8
"""Records and parameters that a line names."""


@dataclasses.dataclass(frozen=True)
class FirstGradient:
    """The gradient of one batch.

    Attributes:
        norms: slash path of each trainable parameter -> the norm of its gradient.
        frozen: the paths of the others.
        metrics: those of the step, "loss" among them.
    """

    norms: Mapping[str, float]
    frozen: Sequence[str]
    metrics: Mapping[str, float]

    @property
    def unreached(self) -> list[str]:
        """Trainable parameters that the loss of this batch does not depend on: their gradient is exactly zero."""
        return [path for path, norm in self.norms.items() if norm == 0]

    @property
    def not_finite(self) -> list[str]:
        """Parameters with a gradient that has NaN or infinity."""
        return [path for path, norm in self.norms.items() if not math.isfinite(norm)]


def check(experiment: str, batches: int | None, fields: Sequence[str]) -> int:
    """Prints what the first batches hold and what their gradient reaches.

    batches: how many are read; None: a whole epoch, each record decoded once but for those that fill no batch.
    Returns 1, for scripts, where a run would stop: too many bad records, a loss or gradient that is not finite.
    """
    config: Any = parse_overrides(load_experiment(experiment), fields, prog=f"mmjax check {experiment}")
    data = dataclasses.replace(config, max_bad_fraction=1.0).train_data()
    first, lines, bad = _read(data, batches, config)
    rich.print(_arrays(first))
    for line in lines + _row(first, getattr(config, "tokenizer", None)):
        print(line)
    method, optimizer = config.method(), config.optimizer()
    start = Start(config, method, optimizer, batch_shapes(config, lambda: first))
    with rich.get_console().status("compiling the gradient"):
        state, _, report = start.state(load_weights)
        sizes = {path: math.prod(leaf.shape) for path, leaf in tree.flatten(state.params).items()}
        norms = functools.partial(gradient_norms, method, optimizer, accumulate=config.accumulate)
        by_leaf, metrics = jax.device_get(jax.jit(norms)(jax.device_put(state), first))
    labels = optimizer.partition.labels(state.params)
    frozen = [path for path, label in labels.items() if label == FROZEN]
    gradient = FirstGradient(tree.flatten(by_leaf), frozen, metrics)
    if report is not None:
        print(report)
    rich.print(_modules(gradient, sizes))
    for line in _warnings(gradient):
        print(line)
    return 1 if bad or gradient.not_finite or not math.isfinite(gradient.metrics["loss"]) else 0


def _read(data: Any, batches: int | None, config: Any) -> tuple[dict[str, np.ndarray], list[str], bool]:
    """(the first batch, lines about all, whether a run would stop at the bad records)."""
    count = getattr(data, "steps_per_epoch", None) if batches is None else batches
    if count is None:
        raise MmjaxError("--epoch: this experiment's data has no epochs; --batches N reads N")
    iterator, first, counted = iter(data), {}, _Counted()
    for step in track(range(count), "reading", disable=count < LISTED, transient=True):
        batch = next(iterator)
        first = first if step else dict(batch)
        counted.add(batch)
    bad = list(getattr(iterator, "skipped", ()))
    records = count * config.batch_size
    lines = [f"read         {count:,} batches of {config.batch_size} {config.unit}, {len(bad)} bad records"]
    lines += [f"{'':<13}{record}" for record in bad[:LISTED]]
    lines += [f"{'':<13}and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
    return first, lines + counted.lines(), len(bad) > config.max_bad_fraction * records


class _Counted:
    """Tokens and labels of batches of texts."""

    def __init__(self) -> None:
        self.tokens = self.positions = 0
        self.labels: list[np.ndarray] = []

    def add(self, batch: Mapping[str, np.ndarray]) -> None:
        if "attention_mask" in batch:
            self.tokens += int(batch["attention_mask"].sum())
            self.positions += batch["attention_mask"].size
        if _has_labels(batch):
            self.labels.append((batch["labels"] != IGNORED).sum(-1).ravel())

    def lines(self) -> list[str]:
        padding = f"{1 - self.tokens / self.positions:.1%} of all positions" if self.positions else ""
        lines = [f"padding      {padding}"] if padding else []
        if self.labels:
            labels = np.concatenate(self.labels)
            rows = f"{labels.mean():.1f} a row, {labels.min()} to {labels.max()}"
            lines.append(f"labels       {rows}; {int((labels == 0).sum())} rows have none")
        return lines


def _has_labels(batch: Mapping[str, np.ndarray]) -> bool:
    return "labels" in batch and "input_ids" in batch and batch["labels"].shape == batch["input_ids"].shape


def _arrays(batch: Mapping[str, np.ndarray]) -> Table:
    """A row for each array of a batch."""
    shown = Table()
    for name in ("array", "dtype", "shape", "least", "greatest"):
        shown.add_column(name, justify="left" if name in ("array", "dtype") else "right")
    for name, array in batch.items():
        extent = (f"{array.min():.4g}", f"{array.max():.4g}") if array.size else ("", "")
        shown.add_row(name, str(array.dtype), " x ".join(map(str, array.shape)), *extent)
    return shown


def _row(batch: Mapping[str, np.ndarray], tokenizer: Any) -> list[str]:
    """The text of the first row as one line; labels are in double brackets, features of images are counted."""
    tokenizer = getattr(tokenizer, "tokenizer", None)
    if "input_ids" not in batch or not isinstance(tokenizer, tokenizers.Tokenizer):
        return []
    ids = batch["input_ids"][0]
    mask = batch["attention_mask"][0].astype(bool) if "attention_mask" in batch else np.ones(len(ids), bool)
    visual = batch["feature_index"][0] >= 0 if "feature_index" in batch else np.zeros(len(ids), bool)
    learned = batch["labels"][0] != IGNORED if _has_labels(batch) else np.zeros(len(ids), bool)
    kinds = np.where(visual, 2, learned)[mask]
    ends = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    pieces = []
    for begin, end in itertools.pairwise(ends):
        text = tokenizer.decode(ids[mask][begin:end].tolist(), skip_special_tokens=False)
        pieces.append({0: text, 1: f"[[{text}]]", 2: f"<{end - begin} features>"}[int(kinds[begin])])
    return [f"row 0        {''.join(pieces)!r}"]


def _modules(gradient: FirstGradient, sizes: Mapping[str, int]) -> Table:
    """A row for each top-level module: its parameters, and the norm of their gradient."""
    shown = Table()
    for name in ("module", "trainable", "frozen", "gradient's norm", "without gradient"):
        shown.add_column(name, justify="left" if name == "module" else "right")
    for module in dict.fromkeys(path.split("/")[0] for path in sizes):
        norms = {path: norm for path, norm in gradient.norms.items() if path.split("/")[0] == module}
        frozen = sum(sizes[path] for path in gradient.frozen if path.split("/")[0] == module)
        norm = f"{math.hypot(*norms.values()):.3g}" if norms else ""
        unreached = sum(sizes[path] for path in gradient.unreached if path in norms)
        trainable = sum(sizes[path] for path in norms)
        shown.add_row(module, f"{trainable:,}", f"{frozen:,}", norm, f"{unreached:,}")
    return shown


def _warnings(gradient: FirstGradient) -> list[str]:
    lines = [f"loss         {gradient.metrics['loss']:.4f}"]
    for what, paths in (("no gradient", gradient.unreached), ("not finite", gradient.not_finite)):
        if paths:
            more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
            lines.append(f"{what:<13}{', '.join(paths[:LISTED])}{more}")
    return lines
