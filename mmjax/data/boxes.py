"""Images with boxes: COCO's annotation files, scenes, and the transform that brings both to one size.

A box is x, y, width, height in pixels, float32.
"""

import hashlib
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from grain import transforms
from PIL import Image

from mmjax.data.annotation_list import File, read_json
from mmjax.data.image_folder import inside
from mmjax.data.preprocess import RESAMPLING, Resample
from mmjax.data.scenes.sources import SceneBoxes
from mmjax.data.sources import Record, read_bytes
from mmjax.data.transforms import rgb_image
from mmjax.errors import MmjaxError

PARTS = {"images": ("id", "file_name", "width", "height"), "annotations": ("image_id", "category_id", "bbox")}
PARTS["categories"] = ("id", "name")


class CocoBoxes:
    """Records {"image": bytes, "boxes": float32 [n, 4], "labels": int32 [n]} of a COCO file (instances_train2017.json).

    file: its annotations. images: the folder of its file names; by default the file's.
    Labels are indices in `classes`, the names of the categories in the order of the file. Crowds, and boxes without an
    area, are not in the records; `ground_truth` is the content of the file, for `mmjax.evaluation.detection`.

    Raises MmjaxError, naming the file and the field, for one that is missing or names an unknown image or category.
    """

    def __init__(self, file: File, images: File | None = None, name: str | None = None):
        path = pathlib.Path(file)
        if not path.is_file():
            raise MmjaxError(f"{path}: no such file")
        content = read_json(path)
        _check(content, path)
        self.folder = path.parent if images is None else pathlib.Path(images)
        self.name, self.ground_truth = name or path.name, content
        categories = {category["id"]: i for i, category in enumerate(content["categories"])}
        self.classes = tuple(category["name"] for category in content["categories"])
        index = {image["id"]: i for i, image in enumerate(content["images"])}
        boxes: list[list[Any]] = [[] for _ in index]
        for i, annotation in enumerate(content["annotations"]):
            # pycocotools wants both, which small files leave out.
            annotation.setdefault("id", i + 1)
            annotation.setdefault("iscrowd", 0)
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
            for field, known in (("image_id", index), ("category_id", categories)):
                if annotation[field] not in known:
                    raise MmjaxError(f"{path}: annotations[{i}]: unknown {field} {annotation[field]!r}")
            if not annotation["iscrowd"] and min(annotation["bbox"][2:]) > 0:
                entry = (*annotation["bbox"], categories[annotation["category_id"]])
                boxes[index[annotation["image_id"]]].append(entry)
        self.boxes = [np.array(each, np.float32).reshape(-1, 5) for each in boxes]

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: int) -> Record:
        data = read_bytes(inside(self.folder, self.ground_truth["images"][index]["file_name"]))
        table = self.boxes[index]
        return {"image": data, "boxes": table[:, :4], "labels": table[:, 4].astype(np.int32)}

    def record_name(self, index: int) -> str:
        return f"{self.name}: {self.ground_truth['images'][index]['file_name']}"

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr([image["file_name"] for image in self.ground_truth["images"]]).encode())
        for table in self.boxes:
            digest.update(table.tobytes())
        return digest.hexdigest()


def _check(content: Any, path: pathlib.Path) -> None:
    for part, fields in PARTS.items():
        entries = content.get(part) if isinstance(content, Mapping) else None
        if not isinstance(entries, list) or (part != "annotations" and not entries):
            raise MmjaxError(f"{path}: no {part}; expected COCO's images, annotations and categories")
        for i, entry in enumerate(entries):
            missing = [field for field in fields if not isinstance(entry, Mapping) or field not in entry]
            if missing:
                raise MmjaxError(f"{path}: {part}[{i}] has no {missing[0]}")
            if part == "annotations" and not (isinstance(entry["bbox"], list) and len(entry["bbox"]) == 4):
                raise MmjaxError(f"{path}: annotations[{i}]: bbox={entry['bbox']!r:.40} should be four numbers")


def scenes_as_coco(source: SceneBoxes) -> dict[str, Any]:
    """The boxes of all records of a source as the content of a COCO file."""
    annotations = []
    for index in range(len(source)):
        record = source[index]
        present = record["labels"] >= 0
        for box, label in zip(record["boxes"][present].tolist(), record["labels"][present].tolist()):
            annotation = {"id": len(annotations) + 1, "image_id": index, "category_id": label + 1, "bbox": box}
            annotations.append(annotation | {"area": box[2] * box[3], "iscrowd": 0})
    images = [
        {"id": i, "file_name": f"{i}.png", "width": source.size, "height": source.size} for i in range(len(source))
    ]
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(source.classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


@dataclass(frozen=True)
class ResizeWithBoxes(transforms.RandomMap):
    """`image`, `boxes`, `labels` -> uint8 [size, size, 3], float32 [most, 4], int32 [most]: the whole image, squashed.

    most: boxes of an image; the largest stay. Labels are filled up with -1. flip: mirrors half of the images.
    """

    size: int
    most: int = 100
    flip: bool = False
    resample: Resample = "bilinear"

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        picture = rgb_image(element["image"])
        image = np.asarray(picture.resize((self.size, self.size), Image.Resampling(RESAMPLING[self.resample])))
        scale = np.array([self.size / picture.width, self.size / picture.height] * 2, np.float32)
        present = np.asarray(element["labels"]) >= 0
        boxes, labels = element["boxes"][present] * scale, element["labels"][present]
        largest = np.sort(np.argsort(-boxes[:, 2:].prod(1), kind="stable")[: self.most])
        boxes, labels = boxes[largest], labels[largest]
        if self.flip and rng.random() < 0.5:
            image = np.ascontiguousarray(image[:, ::-1])
            boxes[:, 0] = self.size - boxes[:, 0] - boxes[:, 2]
        padded = np.zeros((self.most, 4), np.float32), np.full(self.most, -1, np.int32)
        padded[0][: len(boxes)], padded[1][: len(boxes)] = boxes, labels
        return element | {"image": image, "boxes": padded[0], "labels": padded[1]}
