"""The table and the picture of `experiments/blip_capfilt.py`, of all seeds that have results.

python -m experiments.capfilt_report workdirs/capfilt
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from experiments.blip_capfilt import TEXTS
from mmjax.errors import MmjaxError
from mmjax.evaluation.pictures import pixels, png
from mmjax.training import ablation_report
from mmjax.training.storage import write_file

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
COLUMNS = {
    "texts": "texts",
    "val/captions_cider": "CIDEr",
    "val/features_image_to_text_R@1": "features, texts of an image",
    "val/features_text_to_image_R@1": "features, images of a text",
    "val/image_to_text_R@1": "reranked, texts of an image",
    "val/text_to_image_R@1": "reranked, images of a text",
}


def write_report(workdir: tyro.conf.Positional[pathlib.Path], folder: pathlib.Path = RESULTS) -> None:
    """Prints the table of all seeds below `workdir`, and writes blip_capfilt.json and blip_capfilt.png."""
    seeds = [json.loads(path.read_text()) for path in sorted(workdir.glob("seed_*/results.json"))]
    if not seeds:
        raise MmjaxError(f"{workdir}: no seed_*/results.json")
    results = [
        {"values": {"texts": kind}, "seed": seed["seed"], "metrics": shown(metrics)}
        for seed in seeds
        for kind, metrics in seed["arms"].items()
    ]
    kinds = [kind for kind in TEXTS if any(kind in seed["arms"] for seed in seeds)]
    contents = ablation_report.summary({"texts": kinds}, results)
    of_filter = [{"values": {}, "seed": seed["seed"], "metrics": seed["filter"]} for seed in seeds]
    contents["filter"] = ablation_report.summary({}, of_filter)["table"][0]["metrics"]
    contents |= {"command": f"python -m experiments.blip_capfilt --seed {'|'.join(str(s['seed']) for s in seeds)}"}
    rows = {row["values"]["texts"]: row["metrics"] for row in contents["table"]}
    print("| texts | " + " | ".join(COLUMNS.values()) + " |")
    for kind in kinds:
        print(f"| {kind} | " + " | ".join(cell(rows[kind][key]) for key in COLUMNS) + " |")
    for key, spread in contents["filter"].items():
        print(f"{key}: {cell(spread)}")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "blip_capfilt.json", (json.dumps(contents, indent=1) + "\n").encode())
    write_file(folder / "blip_capfilt.png", png(report_picture(kinds, results, seeds)))


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """Counts and the scores of evaluations, without intervals."""
    names = [name for name in metrics if name in ("images", "texts") or name.startswith("val/")]
    return {name: metrics[name] for name in names if not name.endswith(ablation_report.DETAILS)}


def cell(spread: Mapping[str, Any]) -> str:
    """ "12.3 ± 0.4" """
    if spread["mean"] is None:
        return "-"
    return f"{spread['mean']:.1f}" + ("" if spread["std"] is None else f" ± {spread['std']:.1f}")


def report_picture(
    kinds: Sequence[str], results: Sequence[Mapping[str, Any]], seeds: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """Scores of each kind of texts, a point a seed; and the filter's scores of right and wrong web texts."""
    figure = Figure(figsize=(10, 3.4), dpi=100, layout="constrained")
    captions, retrieval, scores = figure.subplots(1, 3)
    keys = ["image_to_text_R@1", "text_to_image_R@1"]
    random = float(np.mean([seed["filter"]["baseline/random_cider"] for seed in seeds]))
    chance = 100 / seeds[0]["arms"]["raw"]["val/retrieval_n"]
    panels = (
        (captions, ("val/captions_cider",), "CIDEr of held-out captions", random, "a random training caption"),
        (retrieval, [f"val/{key}" for key in keys], "R@1 with the ITM head, both directions, %", chance, "chance"),
    )
    for axes, names, title, floor, label in panels:
        values = [
            [np.mean([each["metrics"][name] for name in names]) for each in results if each["values"]["texts"] == kind]
            for kind in kinds
        ]
        axes.bar(range(len(kinds)), [np.mean(each) for each in values], color="#9ecae1")
        for position, each in enumerate(values):
            axes.plot([position] * len(each), each, "o", color="#08519c", markersize=4)
        axes.axhline(floor, color="grey", linestyle=":", label=label)
        axes.legend(fontsize=8)
        axes.set_xticks(range(len(kinds)), kinds, fontsize=8)
        axes.set_title(title, fontsize=9)
    edges = np.linspace(0, 1, 21)
    for truth, colour in (("right", "#31a354"), ("wrong", "#de2d26")):
        counts = np.sum([seed["histograms"][f"web {truth}"] for seed in seeds], 0)
        scores.stairs(counts / counts.sum(), edges, fill=True, alpha=0.5, color=colour, label=f"{truth} web texts")
    scores.axvline(0.5, color="grey", linestyle=":")
    scores.set_title("ITM probability by the filter, share of texts", fontsize=9)
    scores.legend(fontsize=8)
    return pixels(figure)


if __name__ == "__main__":
    tyro.cli(write_report)
