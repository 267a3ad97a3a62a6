"""curves.png: one page of a run. The training loss first, then the headline scores, then other training metrics."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.training.scores import DETAILS

PANELS = 9
"""The maximum of panels on the page, in three columns."""
SMOOTH_FROM = 12
"""The number of points from which a smooth line is plotted over the raw one."""
COLORS = ("#1f6feb", "#d1571f", "#2c8a4b", "#8250df")
LOSS = "train/loss"

Points = list[tuple[int, float]]


def draw(lines: Sequence[Mapping[str, Any]], units: Mapping[str, str], title: str = "") -> bytes | None:
    """A PNG of the lines of a metrics.jsonl; None if no metric has two different values.

    units: of the scores, by their names in the lines: "%", "rank" ...
    """
    series = points_of(lines)
    panels = choose_panels(series)
    if not panels:
        return None
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows + 0.4), layout="constrained")
    last = max(line["step"] for line in lines)
    figure.suptitle(_plain(f"{title}, {last:,} steps"), x=0.01, ha="left", fontsize=12, fontweight="bold")
    for index, (name, members) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        _panel(axes, name, members, series, _chances(lines, members), units)
        axes.set_xlim(0, last * 1.01)
        if index + columns >= len(panels):
            axes.set_xlabel("step", fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def points_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """name -> its points, in the order of their steps."""
    series: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and value is not None:
                series.setdefault(name, {})[line["step"]] = value
    return {name: sorted(points.items()) for name, points in series.items()}


def choose_panels(series: Mapping[str, Points]) -> dict[str, list[str]]:
    """Title of a panel -> the metrics in it, in the order of the page; only metrics with two different values.

    Metrics whose names differ in a number at the end share a panel: R@1, R@5, R@10. A score's interval and chance are
    plotted with it.
    """
    detail = {name + end for name in series for end in DETAILS}
    scores, training = {}, {}
    varying = [name for name, points in series.items() if len({value for _, value in points}) > 1]
    for name in varying:
        if name in detail or name == LOSS:
            continue
        group, _, rest = name.partition("/")
        title = re.sub(r"[_@]?(top|k)?\d+$", "", rest) or rest
        (scores if group == "val" else training).setdefault(f"{group}/{title}", []).append(name)
    panels = {LOSS: [LOSS]} if LOSS in varying else {}
    for title, names in (*scores.items(), *training.items()):
        panels[title] = names[: len(COLORS)]
    return dict(list(panels.items())[:PANELS])


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """A Gaussian mean around each point, over a sixtieth of the points to either side: it does not lag behind."""
    width = max(len(values) / 60, 1.0)
    offsets = np.arange(-math.ceil(3 * width), math.ceil(3 * width) + 1)
    kernel = np.exp(-0.5 * (offsets / width) ** 2)
    inside = slice(len(offsets) // 2, len(offsets) // 2 + len(values))
    return (np.convolve(values, kernel) / np.convolve(np.ones(len(values)), kernel))[inside]


def _chances(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """The last chance of each score that has one."""
    return {name: line[f"{name}_chance"] for line in lines for name in names if line.get(f"{name}_chance") is not None}


def _panel(
    axes: Any,
    title: str,
    names: Sequence[str],
    series: Mapping[str, Points],
    chances: Mapping[str, float],
    units: Mapping[str, str],
) -> None:
    several, ends = len(names) > 1, []
    for name, color in zip(names, COLORS):
        steps, values = map(np.asarray, zip(*series[name]))
        line = values
        if len(values) >= SMOOTH_FROM:
            axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
            line = smooth(values)
        marker = "o" if len(values) < SMOOTH_FROM else None
        axes.plot(steps, line, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=_label(name, title))
        _interval(axes, name, series, color)
        if name in chances:
            axes.axhline(chances[name], color=color if several else "#777777", linestyle="--", linewidth=1)
        ends.append(f"{line[-1]:.3g}" if several else f"{line[-1]:.4g}")
    unit = units.get(names[0], "")
    heading = title.removeprefix("val/").replace("_", " ") + ("@K" if names[0].startswith(f"{title}@") else "")
    axes.set_title(_plain(heading), loc="left", fontsize=10)
    axes.set_title(f"{' / '.join(ends)} {unit}".strip(), loc="right", fontsize=9, color="#444444")
    axes.set_ylabel(unit or _plain(title.split("/")[-1].replace("_per_second", " / s").replace("_", " ")), fontsize=9)
    if chances:
        axes.plot([], [], color="#777777", linestyle="--", linewidth=1, label="chance")
    if several or chances:
        axes.legend(fontsize=7.5, frameon=False, ncols=2, loc="best")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _interval(axes: Any, name: str, series: Mapping[str, Points], color: str) -> None:
    """The band between a score's low and high."""
    low, high = (dict(series.get(name + end, ())) for end in DETAILS[:2])
    steps = sorted(low.keys() & high.keys())
    if len(steps) > 1:
        axes.fill_between(
            steps, [low[step] for step in steps], [high[step] for step in steps], color=color, alpha=0.14, linewidth=0
        )


def _label(name: str, title: str) -> str | None:
    """The name of a line in its panel: "R@5", "top1"; None where the panel has the title of its only line."""
    rest = name.removeprefix(title)
    if not rest:
        return None
    return f"{re.split(r'[_/]', title)[-1]}{rest}" if rest[0] == "@" else rest.strip("_")


def _plain(text: str) -> str:
    """Text that matplotlib does not parse as mathematics."""
    return text.replace("$", r"\$")
