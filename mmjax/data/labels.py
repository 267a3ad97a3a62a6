"""Whether a source's records have class labels, and only those that a classifier knows; told before a run starts."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.data.decoding import BadRecord
from mmjax.data.sources import Source
from mmjax.errors import MmjaxError

LABELS = "labels.json"
"""The file in a workdir that lists the names of the head's classes, in its order."""


def known_labels(source: Source) -> np.ndarray | None:
    """The labels of all records where a source tells them without reading any: image folders and arrays in memory."""
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


def write_labels(names: Sequence[str], workdir: pathlib.Path) -> None:
    """Writes `labels.json` into a workdir, where `mmjax classify` finds the names."""
    (workdir / LABELS).write_text(json.dumps(list(names), ensure_ascii=False, indent=1) + "\n")
