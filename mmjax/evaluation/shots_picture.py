"""The course of scores over the number of examples in the prompt, as a picture."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mmjax.evaluation.pictures import pixels, plain
from mmjax.training.scores import Score
from mmjax.types import UInt8


def shots_picture(
    series: Mapping[int, Mapping[str, Score]], names: Sequence[str], title: str = ""
) -> UInt8[np.ndarray, "pixels_high pixels_wide 3"]:
    """A line for each of the scores `names`, with 95 % intervals; a broken line where there is a chance.

    series: number of shots -> scores, all with these names. The shots are at equal distances.
    """
    shots = sorted(series)
    figure = Figure(figsize=(6, 3.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for number, name in enumerate(names):
        scores, color = [series[k][name] for k in shots], f"C{number}"
        values = np.array([score.value for score in scores])
        axes.plot(range(len(shots)), values, "o-", color=color, label=plain(name))
        intervals = [(score.low, score.high) for score in scores]
        ends = np.array([(x if low is None else low, x if high is None else high)
                         for x, (low, high) in zip(values, intervals)])  # fmt: skip
        axes.errorbar(range(len(shots)), values, np.maximum(np.abs(ends.T - values), 0), color=color, capsize=3)
        chance = scores[0].chance
        if chance is not None:
            axes.axhline(chance, color=color, linestyle="--", linewidth=1, label=plain(f"{name}: chance"))
    axes.set_xticks(range(len(shots)), [str(k) for k in shots])
    axes.set_xlabel("examples in the prompt")
    axes.set_title(plain("\n".join(textwrap.wrap(title, 70))), fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return pixels(figure)
