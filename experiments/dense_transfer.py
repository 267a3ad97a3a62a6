"""One picture and one table of what encoders bring to segmentation and detection of scenes, from runs of both.

    mmjax ablate experiments/segment.py --data scenes --image_size 98 --scenes 600 --store_maps --no-augment \\
        --seeds 0,1,2 --over init_from=runs/moco/{seed},runs/clip/{seed} --workdir runs/segment
    mmjax ablate experiments/detect.py --data scenes --image_size 98 --scenes 600 --store_maps --no-flip \\
        --seeds 0,1,2 --over init_from=runs/moco/{seed},runs/clip/{seed} --workdir runs/detect
    python experiments/dense_transfer.py dense_transfer.png --segmentation MoCo "runs/segment/arms/*moco*" \\
        --detection MoCo "runs/detect/arms/*moco*"

The picture has the first seed's masks and boxes. Beside it, dense_transfer.json has the scores of every arm.

experiments/results/dense_transfer.png and .json compare encoders with frozen weights, on 200 scenes of the training
sprites and 200 of held-out ones, 98 pixels wide (three seeds, of the encoder as well as of the head):

| encoder | mIoU | held-out sprites | AP50 | held-out sprites |
|---|---|---|---|---|
| random ResNet of ten convolutions | 25.2 ± 0.8 | 25.4 ± 0.5 | 18.3 ± 0.4 | 17.0 ± 0.3 |
| MoCo (moco_openmoji.py, m = 0.99) | 29.5 ± 0.6 | 29.0 ± 0.9 | 20.4 ± 0.3 | 19.7 ± 0.3 |
| supervised, nine groups (resnet_openmoji.py) | 30.5 ± 0.8 | 30.2 ± 0.4 | 23.0 ± 1.7 | 21.3 ± 0.9 |
| CLIP (clip_openmoji.py, 120 steps; scenes of 96 pixels) | 27.4 ± 0.5 | 27.1 ± 0.3 | 18.6 ± 0.7 | 18.2 ± 0.8 |
| random ViT-S/14 | 25.2 ± 0.3 | 23.8 ± 0.1 | | |
| real ViT-S/14 (one encoder, three heads; AP50: one) | 44.7 ± 0.0 | 38.6 ± 0.0 | 18.8 | 19.5 |
| constant (background everywhere) | 17.0 | 17.4 | | |

MoCo's features transfer: they are above a random encoder's in every column and seed. That they transfer better than
supervised ones of the same data, as the paper reports of ImageNet's, does not reproduce at this size. After 500 steps
of the same views of the same drawings, the supervised encoder is above MoCo's in every column and seed: by 1.1 ± 0.4
and 1.2 ± 1.0 of mIoU, by 2.6 ± 1.7 and 1.6 ± 0.9 of AP50. It has an advantage: its nine groups are much like the four
classes of the scenes' things (animal, food, vehicle, object).

The heads are an affine layer (segmentation: 400 steps
of 32 scenes, rate 5e-3) and a small FCOS (detection: --head_width 64 --convs 2 --coarse 0 --most 10, 250 steps of 8).
The random rows are the runs with --from_scratch --seed {seed}.

Fine-tuned (--tune all, a rate of 3e-3, layer decay 0.75, 500 steps of 16; dense_tuned.png and .json), the advantage of
MoCo is gone: the random ResNet of the same seed is above it in five of six scores.

| encoder, fine-tuned | mIoU | held-out sprites |
|---|---|---|
| random ResNet of ten convolutions | 36.6 ± 2.1 | 35.3 ± 1.6 |
| MoCo | 34.3 ± 0.7 | 33.7 ± 0.4 |
| supervised, nine groups | 37.3 ± 1.2 | 35.5 ± 0.8 |
"""

import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.patches
import numpy as np
import tyro

import mmjax
from mmjax.data.masks import palette
from mmjax.data.openmoji import ATTRIBUTION
from mmjax.data.scenes.sources import SceneBoxes, SceneMasks
from mmjax.errors import MmjaxError
from mmjax.training.metrics import read_metrics

SCORES = {
    "segmentation": ("val/segmentation_mIoU", "val/segmentation_held_out_sprites_mIoU"),
    "detection": ("val/detection_AP50", "val/detection_held_out_sprites_AP50"),
}
"""Of validation scenes and of scenes of held-out sprites."""
SIZE = 98
THRESHOLD = 0.3
"""Of the score of a box that is shown."""


@dataclasses.dataclass(frozen=True)
class Start:
    """The runs from one encoder: a task's name -> its workdirs, a seed each."""

    name: str
    runs: Mapping[str, Sequence[pathlib.Path]]

    def scores(self) -> dict[str, list[float]]:
        """Score -> its last value of each run. Raises MmjaxError for a run without it."""
        scores: dict[str, list[float]] = {}
        for task, folders in self.runs.items():
            for folder in folders:
                metrics = {key: value for line in read_metrics(folder) for key, value in line.items()}
                for name in SCORES[task]:
                    if name not in metrics:
                        raise MmjaxError(f"{folder}: no {name} in metrics.jsonl")
                    scores.setdefault(name.removeprefix("val/"), []).append(metrics[name])
        return scores


def starts_of(globs: Mapping[str, Mapping[str, str]]) -> list[Start]:
    """globs: task -> name of the encoder -> glob of workdirs. Raises MmjaxError for one that matches none."""
    runs: dict[str, dict[str, list[pathlib.Path]]] = {}
    for task, named in globs.items():
        for name, glob in named.items():
            root, pattern = (pathlib.Path("/"), glob[1:]) if glob.startswith("/") else (pathlib.Path(), glob)
            folders = sorted(folder for folder in root.glob(pattern) if folder.is_dir())
            if not folders:
                raise MmjaxError(f"--{task} {name} {glob}: matches no folder")
            runs.setdefault(name, {})[task] = folders
    return [Start(name, tasks) for name, tasks in runs.items()]


def tasks_of(starts: Sequence[Start]) -> list[str]:
    """The tasks that any of them was trained for."""
    return [task for task in SCORES if any(task in start.runs for start in starts)]


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def table(starts: Sequence[Start]) -> str:
    """In Markdown: mean and standard deviation over seeds."""
    names = [name.removeprefix("val/") for task in tasks_of(starts) for name in SCORES[task]]
    lines = ["| start | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for start in starts:
        scores = start.scores()
        cells = [spread(scores[name]) if name in scores else "" for name in names]
        lines.append(f"| {start.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(starts: Sequence[Start], each: int = 2) -> matplotlib.figure.Figure:
    """Rows: `each` validation scenes and as many of held-out sprites, with masks, then with boxes, if there are runs of
    the task. Columns: the truth, and the prediction from each start."""
    splits: Any = ["validation"] * each + ["sprites"] * each
    indices = [*range(each), *range(each)]
    masks = [SceneMasks(each, split, size=SIZE)[i] for split, i in zip(splits, indices)]
    boxes = [SceneBoxes(each, split, size=SIZE)[i] for split, i in zip(splits, indices)]
    images, names = [record["image"] for record in masks], ("background", *SceneBoxes(1, size=SIZE).classes)
    truths: dict[str, Any] = {
        "segmentation": [record["mask"] for record in masks],
        "detection": [[(names[k + 1], box) for k, box in zip(r["labels"], r["boxes"]) if k >= 0] for r in boxes],
    }
    tasks = tasks_of(starts)
    rows = len(tasks) * len(images)
    figure = matplotlib.figure.Figure(figsize=(1.55 * (len(starts) + 1), 1.62 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, len(starts) + 1, squeeze=False)
    for column, start in enumerate([None, *starts]):
        for band, task in enumerate(tasks):
            if start is None:
                outputs = truths[task]
            elif task not in start.runs:
                outputs = [None] * len(images)
            else:
                model: Any = mmjax.load(str(start.runs[task][0]))
                if task == "segmentation":
                    outputs = model.segment(images)
                else:
                    outputs = [[(name, box) for name, _, box in r] for r in model.detect(images, THRESHOLD)]
            for i, (image, output) in enumerate(zip(images, outputs)):
                _panel(axes[band * len(images) + i, column], image, output, names)
        axes[0, column].set_title("truth" if start is None else start.name, fontsize=9)
    for row in range(rows):
        axes[row, 0].set_ylabel("held-out sprites" if splits[row % len(images)] == "sprites" else "", fontsize=7)
    handles = [matplotlib.patches.Patch(color=palette(len(names))[i] / 255, label=n) for i, n in enumerate(names) if i]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)
    figure.supxlabel(ATTRIBUTION, fontsize=6)
    return figure


def _panel(axis: Any, image: np.ndarray, output: Any, names: Sequence[str]) -> None:
    """An image with a mask [height, width], with boxes [(class, (x, y, width, height))], or nothing for None."""
    colours = palette(len(names))
    axis.set_xticks([])
    axis.set_yticks([])
    if output is None:
        axis.axis("off")
        return
    if isinstance(output, np.ndarray):
        image = np.where(output[..., None] > 0, image * 0.3 + colours[output] * 0.7, image).astype(np.uint8)
    axis.imshow(image)
    for name, (x, y, width, height) in () if isinstance(output, np.ndarray) else output:
        colour = colours[names.index(name)] / 255
        rectangle = matplotlib.patches.Rectangle((x - 0.5, y - 0.5), width, height, fill=False, color=colour, lw=1.4)
        axis.add_patch(rectangle)


def main(
    picture: tyro.conf.Positional[pathlib.Path], segmentation: dict[str, str], detection: dict[str, str] | None = None
) -> None:
    """segmentation, detection: the name of each encoder and the glob of its workdirs, a seed each, in turn."""
    starts = starts_of({"segmentation": segmentation, "detection": detection or {}})
    rows = [{"start": start.name, "seeds": start.scores()} for start in starts]
    contents = {"command": shlex.join(["python", *sys.argv]), "rows": rows}
    picture.with_suffix(".json").write_text(json.dumps(contents, indent=1) + "\n")
    print(table(starts))
    draw(starts).savefig(picture, dpi=100)


if __name__ == "__main__":
    tyro.cli(main)
