"""Scenes as files in the published formats, for programs that read files and for data that stays as it is.

    write_scenes("scenes", 1000, "train")

    images/<i>.png         the scenes of captions, boxes, masks
    captions.json          [{"image", "caption": [short, long], "image_id"}]                      (ALBEF, BLIP)
    instances.json         COCO: images, annotations (bbox, area, category_id, iscrowd), categories
    masks/<i>.png          the class of each pixel, with its colour in the palette; 0 is background
    classes.txt            the classes of the masks, a line each
    referring.json         [{"image", "text", "image_id", "bbox"}]                                (RefCOCO+)
    questions.json         [{"dataset": "scenes", "image", "question", "question_id", "answer": [...]}]   (VQA)
    answers.json           the answers of questions.json                                          (VQA)
    statements.json        [{"images": [left, right], "sentence", "label": "True" or "False"}]    (NLVR2)
    conversations.json     [{"id", "image", "conversations": [...]}]                              (LLaVA)
Paths in the lists are below the folder.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mmjax.data.masks import palette
from mmjax.data.scenes.language import long_caption, short_caption
from mmjax.data.scenes.sources import (
    Labels,
    SceneConversations,
    SceneMasks,
    SceneQuestions,
    SceneReferring,
    SceneSource,
    SceneStatements,
    class_names,
)
from mmjax.data.scenes.splits import Split
from mmjax.data.scenes.sprites import CANVAS, SPRITES
from mmjax.errors import MmjaxError


def write_scenes(
    folder: str | os.PathLike[str],
    length: int,
    split: Split = "train",
    *,
    seed: int = 0,
    size: int = CANVAS,
    labels: Labels = "category",
) -> None:
    """Writes `length` records of each task. Raises MmjaxError for a folder that is not empty, and as `SceneSource`."""
    root = pathlib.Path(folder)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise MmjaxError(f"{root}: exists and is not an empty folder")
    masks = SceneMasks(length, split, seed=seed, size=size, labels=labels)
    for name in ("images", "masks", "referring", "questions", "statements", "conversations"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(masks.classes) + "\n")
    _write_lists(root, _scene_lists(root, masks))
    shared: dict[str, Any] = {"seed": seed, "size": size}
    _write_lists(root, _referring(root, SceneReferring(length, split, **shared)))
    _write_lists(root, _questions(root, SceneQuestions(length, split, **shared)))
    _write_lists(root, _statements(root, SceneStatements(length, split, **shared)))
    _write_lists(root, _conversations(root, SceneConversations(length, split, **shared)))


def _write_lists(root: pathlib.Path, lists: Mapping[str, Any]) -> None:
    for name, content in lists.items():
        (root / name).write_text(json.dumps(content, indent=0))


def _save(root: pathlib.Path, name: str, image: np.ndarray) -> str:
    Image.fromarray(image).save(root / name)
    return name


def _scene_lists(root: pathlib.Path, source: SceneMasks) -> dict[str, Any]:
    """Images, masks, captions and COCO's instances, all of the same scenes."""
    names = class_names(source.labels)
    captions: list[Any] = []
    images: list[Any] = []
    annotations: list[Any] = []
    for index in range(len(source)):
        scene = source.scene(index)
        picture = source.picture(scene)
        name = _save(root, f"images/{index}.png", picture.image)
        mask = Image.fromarray(source[index]["mask"], "P")
        mask.putpalette(palette(len(source.classes)).tobytes())
        mask.save(root / "masks" / f"{index}.png")
        captions.append({"image": name, "caption": [short_caption(scene), long_caption(scene)], "image_id": index})
        images.append({"id": index, "file_name": name, "width": source.size, "height": source.size})
        for k, (thing, box) in enumerate(zip(scene.things, picture.boxes().tolist())):
            sprite = SPRITES[thing.sprite]
            category = names.index(sprite.category if source.labels == "category" else sprite.name) + 1
            area = int(picture.mask(k).sum())
            annotation = {"id": len(annotations) + 1, "image_id": index, "category_id": category, "bbox": box}
            annotations.append(annotation | {"area": area, "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    return {"captions.json": captions, "instances.json": instances}


def _referring(root: pathlib.Path, source: SceneReferring) -> dict[str, Any]:
    entries = []
    for index in range(len(source)):
        record = source[index]
        name = _save(root, f"referring/{index}.png", record["image"])
        entries.append({"image": name, "text": record["text"], "image_id": index, "bbox": record["box"].tolist()})
    return {"referring.json": entries}


def _questions(root: pathlib.Path, source: SceneQuestions) -> dict[str, Any]:
    entries, answers = [], set()
    for index in range(len(source)):
        record = source[index]
        entry = {"dataset": "scenes", "image": _save(root, f"questions/{index}.png", record["image"])}
        entry |= {"question": record["text"], "question_id": index, "answer": list(record["answers"])}
        answers |= set(record["answers"])
        entries.append(entry | {"kind": record["kind"]})
    return {"questions.json": entries, "answers.json": sorted(answers)}


def _statements(root: pathlib.Path, source: SceneStatements) -> dict[str, Any]:
    entries = []
    for index in range(len(source)):
        record = source[index]
        images = [_save(root, f"statements/{index}-{side}.png", record[f"image_{side}"]) for side in range(2)]
        entries.append({"images": images, "sentence": record["text"], "label": str(bool(record["label"]))})
    return {"statements.json": entries}


def _conversations(root: pathlib.Path, source: SceneSource) -> dict[str, Any]:
    entries = []
    for index in range(len(source)):
        record = source[index]
        name = _save(root, f"conversations/{index}.png", record["image"])
        entries.append({"id": str(index), "image": name, "conversations": record["conversations"]})
    return {"conversations.json": entries}
