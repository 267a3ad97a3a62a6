"""Referring expressions as ALBEF evaluates them (Grounding.py): RefCOCO+'s own files, and boxes of a detector.

pairs = ReferringList(["refcoco+_val.json", "refcoco+_test.json"], images)
references = read_references("refcoco+")                 # refs(unc).p and instances.json of the REFER tool
proposals = read_proposals("dets.json")                  # {image id: [[x, y, width, height, ...], ...]}
"""

import os
import pathlib
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mmjax.data.annotation_list import read_json
from mmjax.data.image_text import ImageTextList
from mmjax.data.sources import Record
from mmjax.errors import MmjaxError

File = str | os.PathLike[str]
REFERENCES = ("refs(unc).json", "refs(unc).p")


class Reference(NamedTuple):
    """An annotated object. box: (x, y, width, height). image: its id. size: the image's (height, width)."""

    split: str
    image: int
    box: tuple[float, float, float, float]
    size: tuple[int, int]


class ReferringList(ImageTextList):
    """`grounding_dataset.py`, entries {image, text, ref_id}; records {"image": bytes, "text": str, "ref_id": int}."""

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: "list: no ref_id", "list: no text", "file: missing", ..."""
        record, entry = super().__getitem__(index), self.record(index)
        return record | {"ref_id": self.field(index, entry, "ref_id", int), "text": self.text(index, entry, "text")}


def read_references(folder: File) -> dict[int, Reference]:
    """The references of a folder of the REFER tool, by ref_id.

    refs(unc).p is a pickle of lists, dicts, strings and numbers; whatever else it contains is refused, as no code of a
    file is run. refs(unc).json, the same as JSON, takes its place if it exists.
    Raises MmjaxError naming the file, and the entry where one does not fit.
    """
    root = pathlib.Path(folder)
    file = next((root / name for name in REFERENCES if (root / name).is_file()), None)
    if file is None:
        raise MmjaxError(f"{root}: none of {', '.join(REFERENCES)} in it")
    entries = read_json(file) if file.suffix == ".json" else _read_pickle(file)
    instances = read_json(root / "instances.json")
    try:
        boxes = {one["id"]: tuple(float(x) for x in one["bbox"]) for one in instances["annotations"]}
        sizes = {one["id"]: (int(one["height"]), int(one["width"])) for one in instances["images"]}
    except (KeyError, TypeError, ValueError) as error:
        raise MmjaxError(f"{root / 'instances.json'}: not COCO's images and annotations: {error!r}") from error
    references: dict[int, Reference] = {}
    for index, entry in enumerate(entries):
        try:
            x, y, width, height = boxes[entry["ann_id"]]
            image = int(entry["image_id"])
            references[int(entry["ref_id"])] = Reference(entry["split"], image, (x, y, width, height), sizes[image])
        except (KeyError, TypeError, ValueError) as error:
            raise MmjaxError(f"{file}[{index}] does not fit {root / 'instances.json'}: {error!r}") from error
    return references


def read_proposals(file: File) -> dict[int, Float[np.ndarray, "k 4"]]:
    """The boxes that a detector proposes for each image, by image id: {"id": [[x, y, width, height, ...], ...]}.

    Raises MmjaxError naming the file, and the image whose boxes are none.
    """
    content = read_json(pathlib.Path(file))
    if not isinstance(content, Mapping):
        raise MmjaxError(f"{file}: expected an object of boxes by image id, not {type(content).__name__}")
    proposals: dict[int, np.ndarray] = {}
    for key, boxes in content.items():
        try:
            array = np.array([box[:4] for box in boxes], np.float64).reshape(-1, 4)
            proposals[int(key)] = array
        except (TypeError, ValueError) as error:
            raise MmjaxError(f"{file}: boxes of image {key}: {error}") from error
        if not (array[:, 2:] > 0).all():
            raise MmjaxError(f"{file}: image {key} has a box without an area")
    return proposals


class _Plain(pickle.Unpickler):
    """Lists, dicts, strings and numbers alone: those need no look-up of a name."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it contains {module_name}.{global_name}")


def _read_pickle(file: pathlib.Path) -> Any:
    with file.open("rb") as stream:
        try:
            return _Plain(stream, encoding="latin1").load()
        except Exception as error:  # a damaged pickle raises errors of any kind
            raise MmjaxError(f"{file}: not a list of plain values: {error}") from error
