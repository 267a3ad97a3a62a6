"""Class labels: whether those of a source fit a classifier, checked before a run starts; and the names of classes."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.data.decoding import BadRecord
from mmjax.data.sources import Source
from mmjax.errors import MmjaxError

LABELS = "labels.json"
"""The file in a workdir that lists the names of the head's classes, in its order."""


def known_labels(source: Source) -> np.ndarray | None:
    """The labels of all records if a source has them without reading any: image folders and arrays in memory."""
    labels: Any = getattr(source, "labels", None)
    labels = getattr(source, "columns", {}).get("label") if labels is None else labels
    return None if labels is None else np.asarray(labels)


def check_labels(source: Source, classes: int) -> None:
    """Raises MmjaxError, naming a record: no label, one that is no whole number, or one outside 0 .. classes - 1.

    Looks at every label where the source knows them all, else at the first readable record's.
    """
    labels = known_labels(source)
    if labels is not None and len(labels) and hasattr(source, "classes") and not source.classes:  # type: ignore[attr-defined]
        labels = None  # a folder without sub-folders
    if labels is None:
        labels = np.asarray([_first_label(source)])
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise MmjaxError(f"{source.name}: labels should be whole numbers [n], not {labels.dtype} {list(labels.shape)}")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        first = int(wrong[0])
        raise MmjaxError(
            f"{source.name}: {len(wrong)} of {len(labels)} labels are not among the {classes} classes (0 to "
            f"{classes - 1}): {source.record_name(first)} has {labels[first]}"
        )


def _first_label(source: Source) -> Any:
    for index in range(len(source)):
        try:
            record = source[index]
        except BadRecord:
            continue
        if "label" not in record:
            raise MmjaxError(f"{source.record_name(index)} has no label: a classifier learns from labelled images")
        return record["label"]
    raise MmjaxError(f"{source.name}: no readable record")


def check_names(names: Sequence[str], source: object) -> None:
    """Raises MmjaxError for a name that no JSON file can contain: of a folder whose name is not UTF-8."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise MmjaxError(f"{source}: the class {os.fsencode(name)!r}: its name is not UTF-8; rename it") from None


def write_labels(names: Sequence[str], folder: pathlib.Path) -> None:
    """Writes `labels.json` into a workdir or a model's folder, where `mmjax.load` reads the names.

    Raises MmjaxError for a name that is not UTF-8.
    """
    check_names(names, folder / LABELS)
    (folder / LABELS).write_text(json.dumps(list(names), ensure_ascii=False, indent=1) + "\n")


def read_labels(folder: pathlib.Path) -> tuple[str, ...]:
    """The names in the `labels.json` of a folder; () without one. Raises MmjaxError if it is not a list of strings."""
    file = folder / LABELS
    if not file.is_file():
        return ()
    try:
        names = json.loads(file.read_text())
    except ValueError as error:
        raise MmjaxError(f"{file}: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise MmjaxError(f"{file} should be a list of names")
    return tuple(names)


def labels_to_hf(names: Sequence[str], n: int) -> dict[str, Any]:
    """The fields id2label and label2id of a config.json, for a head of n classes; {} for n = 0.

    Classes without names are LABEL_0, LABEL_1, ..., as transformers numbers them.
    """
    names = list(names) or [f"LABEL_{i}" for i in range(n)]
    id2label = {str(i): name for i, name in enumerate(names)}
    return {"id2label": id2label, "label2id": {name: i for i, name in enumerate(names)}} if n else {}


def labels_from_hf(config_json: Mapping[str, Any], n: int) -> tuple[str, ...]:
    """The names of n classes; () if id2label has not one for each, or only LABEL_0, LABEL_1, ..."""
    id2label = {str(i): str(name) for i, name in (config_json.get("id2label") or {}).items()}
    names = tuple(id2label.get(str(i), "") for i in range(n))
    return () if not all(names) or names == tuple(f"LABEL_{i}" for i in range(n)) else names
