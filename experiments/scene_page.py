"""Draws a page of examples of the scenes: every task, with its texts, boxes and masks.

python experiments/scene_page.py scenes.png
python experiments/scene_page.py pairs.png --split pairs --seed 3
"""

import dataclasses
import pathlib
import textwrap
from collections.abc import Iterator

import matplotlib.figure
import matplotlib.patches
import numpy as np
import tyro

from mmjax.data.masks import palette
from mmjax.data.openmoji import ATTRIBUTION
from mmjax.data.scenes.sources import (
    SceneBoxes,
    SceneCaptions,
    SceneClips,
    SceneComparisons,
    SceneConversations,
    SceneDocuments,
    SceneMasks,
    SceneQuestions,
    SceneReferring,
    SceneStatements,
)
from mmjax.data.scenes.splits import Split

COLUMNS = 6
SIZE = 192


@dataclasses.dataclass(frozen=True)
class Panel:
    """An image, the text below it, and boxes (x, y, width, height) to draw."""

    image: np.ndarray
    text: str
    boxes: np.ndarray | None = None


def panels(split: Split, seed: int) -> Iterator[tuple[str, list[Panel]]]:
    """(title, six panels) of each row."""
    n, shared = COLUMNS, {"split": split, "seed": seed, "size": SIZE}
    captions = [SceneCaptions(n, **shared)[i] for i in range(n)]
    yield "captions", [Panel(r["image"], r["texts"][1]) for r in captions]
    masks, boxes = SceneMasks(n, **shared), SceneBoxes(n, **shared)
    colours = palette(len(masks.classes))
    row = []
    for i in range(n // 2):
        mask, box = masks[i], boxes[i]
        classes = mask["mask"]
        blended = np.where(classes[..., None] > 0, mask["image"] * 0.3 + colours[classes] * 0.7, mask["image"])
        text = "masks: " + ", ".join(masks.classes[k] for k in np.unique(classes)[1:])
        row.append(Panel(blended.astype(np.uint8), text))
        row.append(Panel(box["image"], "boxes", box["boxes"][box["labels"] >= 0]))
    yield "masks and boxes", row
    referring = [SceneReferring(n, **shared)[i] for i in range(n)]
    yield "referring expressions", [Panel(r["image"], r["text"], r["box"][None]) for r in referring]
    questions = [SceneQuestions(n, **shared)[i] for i in range(n)]
    yield "questions", [Panel(r["image"], f"{r['text']} {r['answers'][0]}") for r in questions]
    for title, source in (("comparing", SceneComparisons(3, **shared)), ("statements", SceneStatements(3, **shared))):
        row = []
        for i in range(n // 2):
            record = source[i]
            answer = record["answers"][0] if "answers" in record else str(bool(record["label"])).lower()
            row += [Panel(record["image_0"], f"{record['text']} {answer}"), Panel(record["image_1"], "")]
        yield title, row
    documents = [SceneDocuments(2, **shared)[i] for i in range(2)]
    row = []
    for document in documents:
        *before, last = document["texts"]
        row += [Panel(image, text) for image, text in zip(document["images"], before)]
        row[-1] = Panel(row[-1].image, f"{row[-1].text} / {last}")
    yield "documents", row
    clip = SceneClips(1, **shared, frames=COLUMNS)[0]
    row = [Panel(frame, "", boxes[boxes[:, 2] > 0]) for frame, boxes in zip(clip["frames"], clip["boxes"])]
    row[0] = Panel(row[0].image, f"{clip['text']}. {clip['question']} {clip['answers'][0]}", row[0].boxes)
    yield "a clip", row
    conversations = [SceneConversations(n, **shared)[i] for i in range(n)]
    texts = [" ".join(turn["value"].removeprefix("<image>\n") for turn in c["conversations"]) for c in conversations]
    yield "conversations", [Panel(c["image"], text) for c, text in zip(conversations, texts)]


def draw_page(split: Split, seed: int) -> matplotlib.figure.Figure:
    """The page as a figure."""
    rows = list(panels(split, seed))
    figure = matplotlib.figure.Figure(figsize=(2.3 * COLUMNS, 3.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), COLUMNS)
    for (title, row), line in zip(rows, axes):
        line[0].set_title(title, loc="left", fontsize=11, fontweight="bold")
        for panel, axis in zip(row, line):
            axis.imshow(panel.image)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel("\n".join(textwrap.wrap(panel.text, 38)), fontsize=7)
            for x, y, width, height in panel.boxes if panel.boxes is not None else ():
                axis.add_patch(
                    matplotlib.patches.Rectangle((x - 0.5, y - 0.5), width, height, fill=False, color="black")
                )
    figure.suptitle(f"scenes, split {split}, seed {seed}. {ATTRIBUTION}", fontsize=8)
    return figure


def main(file: tyro.conf.Positional[pathlib.Path], split: Split = "train", seed: int = 0) -> None:
    """file: the picture to write, .png or .pdf."""
    draw_page(split, seed).savefig(file, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
