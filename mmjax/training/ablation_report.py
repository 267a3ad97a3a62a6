"""The results of an ablation: means and spreads over seeds, the paper's figures beside them, a table and a picture."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

DETAILS = ("_low", "_high", "_chance", "_n")
"""Ends of the names of metrics that belong to another one: in ablation.json, not in the table."""
MEAN = "mean/"
"""Begins the names of means over the run."""
UNTRAINED = "untrained"
"""The row of the networks before training."""
COLUMNS = 6
"""Metrics that the table and the picture show; all of them are in ablation.json."""


def summary(
    over: Mapping[str, Sequence[str]],
    results: Sequence[Mapping[str, Any]],
    published: Mapping[str, Any] | None = None,
    untrained: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """{"results": one an arm, "table": one a choice of values, seeds together}, ready for JSON; with `untrained` also
    {"untrained": {"results": one a seed, "metrics"}}.

    With several seeds, "paired" of each row but the first has the differences to the first row, of the same seed: mean,
    std, n, and "above", the number of seeds whose difference is positive. Arms of one seed have the same first weights
    and data.

    results: {"values": name -> text, "seed", "metrics": name -> number}. published: name -> {value: number or word}, of
    an experiment that repeats a paper's ablation; used where one name alone is varied. untrained: {"seed", "metrics"}
    of the networks before training.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result["values"].values()), []).append(result)
    table: list[dict[str, Any]] = []
    first: list[Mapping[str, Any]] = []
    for values, members in groups.items():
        row: dict[str, Any] = {"values": dict(zip(over, values)), "metrics": _spreads(members)}
        if len(over) == 1:
            name = next(iter(over))
            row["published"] = lookup((published or {}).get(name, {}), values[0])
        if table and len(members) > 1:
            row["paired"] = _paired(members, first)
        table.append(row)
        first = first or members
    contents: dict[str, Any] = {"results": [dict(result) for result in results], "table": table}
    if untrained:
        contents[UNTRAINED] = {"results": [dict(result) for result in untrained], "metrics": _spreads(untrained)}
    return contents


def course_means(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """The means of training metrics over all logged steps of a run: "key_drift" -> "mean/key_drift".

    lines: of its metrics.jsonl. A metric without a finite value is omitted.
    """
    means = {}
    for name in names:
        values = [line[f"train/{name}"] for line in lines if line.get(f"train/{name}") is not None]
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            means[MEAN + name] = float(np.mean(finite))
    return means


def _spreads(members: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {n: _spread(members, n) for n in dict.fromkeys(name for member in members for name in member["metrics"])}


def _spread(members: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds whose number is there and finite."""
    values = [member["metrics"].get(name) for member in members]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    std = float(np.std(finite, ddof=1)) if len(finite) > 1 else None
    return {"mean": float(np.mean(finite)) if finite else None, "std": std, "n": len(finite)}


def _paired(members: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The spreads of the differences to the reference of the same seed."""
    by_seed = {member["seed"]: member["metrics"] for member in reference}
    differences = []
    for member in members:
        other = by_seed.get(member["seed"], {})
        pairs = {name: (value, other.get(name)) for name, value in member["metrics"].items()}
        differences.append({"metrics": {n: a - b for n, (a, b) in pairs.items() if a is not None and b is not None}})
    spreads = _spreads(differences)
    for name, spread in spreads.items():
        spread["above"] = sum(one["metrics"].get(name, 0) > 0 for one in differences)
    return spreads


def lookup(published: Mapping[Any, Any], text: str) -> Any:
    """The published figure for a value as it was written on the command line; None if there is none."""
    for value, figure in published.items():
        try:
            same = float(value) == float(text)
        except (TypeError, ValueError):
            same = str(value) == text
        if same:
            return figure
    return None


def shown_metrics(ablation: Mapping[str, Any]) -> list[str]:
    """The metrics worth a column: those of the evaluations, the loss, the configured means over the run, and
    refused updates where there were any."""
    first = dict.fromkeys(name for row in ablation["table"] for name in row["metrics"])
    val = [name for name in first if name.startswith("val/") and not name.endswith(DETAILS)]
    chosen = [*val[: COLUMNS - 1], "train/loss", *(name for name in first if name.startswith(MEAN))]
    refused = any((row["metrics"].get("train/skipped_updates") or {}).get("mean") for row in ablation["table"])
    return [name for name in chosen if name in first] + (["train/skipped_updates"] if refused else [])


def tables(ablation: Mapping[str, Any]) -> list[Table]:
    """For `rich.print`: the table, and with several seeds the differences to its first row."""
    paired = [row for row in ablation["table"] if "paired" in row]
    if not paired:
        return [table(ablation)]
    names, metrics = list(ablation["over"]), shown_metrics(ablation)
    values = ", ".join(f"{name}={value}" for name, value in ablation["table"][0]["values"].items())
    title = f"difference to {values} of the same seed, mean ± standard deviation (seeds above it)"
    differences = Table(title=title, title_justify="left", min_width=min(len(title), 80))
    for name in [*names, *metrics]:
        differences.add_column(name, justify="right", overflow="fold")
    for row in paired:
        cells = [_difference(row["paired"].get(name)) for name in metrics]
        differences.add_row(*(row["values"][name] for name in names), *cells)
    return [table(ablation), differences]


def _difference(spread: Mapping[str, Any] | None) -> str:
    if spread is None or spread["mean"] is None:
        return ""
    std = "" if spread["std"] is None else f" ± {spread['std']:.2g}"
    return f"{spread['mean']:+.3g}{std} ({spread['above']}/{spread['n']})"


def table(ablation: Mapping[str, Any]) -> Table:
    """For `rich.print`."""
    names, metrics = list(ablation["over"]), shown_metrics(ablation)
    seeds = max(row["metrics"][metrics[0]]["n"] for row in ablation["table"]) if metrics else 1
    after = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    figures = any(row.get("published") is not None for row in ablation["table"])
    title = f"after {ablation['steps']} steps{after}"
    shown = Table(title=title, title_justify="left", min_width=len(title))
    for name in [*names, *metrics, *(["published"] if figures else [])]:
        shown.add_column(name, justify="right", overflow="fold")
    if UNTRAINED in ablation:
        values = [UNTRAINED, *[""] * (len(names) - 1)]
        shown.add_row(*values, *(_cell(ablation[UNTRAINED]["metrics"].get(name)) for name in metrics))
    for row in ablation["table"]:
        cells = [row["values"][name] for name in names] + [_cell(row["metrics"].get(name)) for name in metrics]
        figure = row.get("published")
        shown.add_row(*cells, *(["" if figure is None else str(figure)] if figures else []))
    return shown


def _cell(spread: Mapping[str, Any] | None) -> str:
    if spread is None or spread["mean"] is None:
        return "not finite" if spread is not None else ""
    return f"{spread['mean']:.4g}" + ("" if spread["std"] is None else f" ± {spread['std']:.2g}")


def plot(path: Any, ablation: Mapping[str, Any], curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A panel a metric over the ablated values, and the training loss of every arm over steps.

    curves: arm -> the lines of its metrics.jsonl.
    """
    from matplotlib.figure import Figure

    metrics = shown_metrics(ablation)
    columns = min(3, len(metrics) + 1)
    rows = math.ceil((len(metrics) + 1) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    figures = {
        i: row["published"] for i, row in enumerate(ablation["table"]) if isinstance(row.get("published"), int | float)
    }
    for index, name in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, index + 1)
        _values_panel(axes, ablation, name)
        if index == 0 and figures:
            axes.plot(list(figures), list(figures.values()), "D--", color="grey", label="published (its own setting)")
            axes.legend(fontsize=6)
    _loss_panel(figure.add_subplot(rows, columns, len(metrics) + 1), ablation, curves)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)


def _loss_panel(axes: Any, ablation: Mapping[str, Any], curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A line an arm; those that differ in the seed alone have one colour and one label."""
    colours: dict[str, str] = {}
    for result in ablation["results"]:
        lines = curves.get(result["arm"], ())
        points = [(line["step"], line["train/loss"]) for line in lines if line.get("train/loss") is not None]
        if points:
            values = ", ".join(f"{name}={value}" for name, value in result["values"].items())
            label = None if values in colours else values
            colour = colours.setdefault(values, f"C{len(colours) % 10}")
            axes.plot(*zip(*points), linewidth=1, color=colour, label=label)
    axes.set_title("train/loss over steps", fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if 0 < len(colours) <= 12:
        axes.legend(fontsize=6)


def _values_panel(axes: Any, ablation: Mapping[str, Any], name: str) -> None:
    """Values of the first name along the axis, evenly spaced; a line for each of the others', or for each seed."""
    first, *others = ablation["over"]
    if not others:
        _seed_lines(axes, ablation, name)
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for row in ablation["table"]:
        spread = row["metrics"].get(name)
        if spread is not None and spread["mean"] is not None:
            label = ", ".join(f"{other}={row['values'][other]}" for other in others)
            position = list(ablation["over"][first]).index(row["values"][first])
            lines.setdefault(label, []).append((position, spread["mean"], spread["std"] or 0.0))
    for label, points in lines.items():
        positions, means, stds = zip(*points)
        axes.errorbar(
            positions, means, yerr=stds, marker="o", markersize=4, linewidth=1, capsize=3, label=label or None
        )
    untrained = ablation.get(UNTRAINED, {}).get("metrics", {}).get(name)
    if untrained is not None and untrained["mean"] is not None:
        axes.axhline(untrained["mean"], color="grey", linestyle=":", linewidth=1, label=UNTRAINED)
    axes.set_xticks(range(len(ablation["over"][first])), _ticks(ablation["over"][first]))
    axes.set_title(name, fontsize=9)
    axes.set_xlabel(first, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if (others and lines) or untrained is not None:
        axes.legend(fontsize=6)


def _seed_lines(axes: Any, ablation: Mapping[str, Any], name: str) -> None:
    """The values of each seed, where there are several: whether one arm is above another in all of them."""
    (first,) = ablation["over"]
    order = list(ablation["over"][first])
    lines: dict[int, list[tuple[int, float]]] = {}
    for result in ablation["results"]:
        value = result["metrics"].get(name)
        if value is not None and math.isfinite(value):
            lines.setdefault(result["seed"], []).append((order.index(result["values"][first]), value))
    for points in lines.values() if len(lines) > 1 else ():
        axes.plot(*zip(*sorted(points)), ".-", color="C0", markersize=3, linewidth=0.6, alpha=0.45)


def _ticks(values: Sequence[str]) -> list[str]:
    """Values without the folders that they share, where they are paths."""
    paths = [value.rstrip("/").split("/") for value in values]
    shared = 0
    while len(paths) > 1 and all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return ["/".join(path[shared:]) for path in paths]
