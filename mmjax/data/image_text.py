"""Lists of images and texts in the published formats: COCO, Karpathy, BLIP, ALBEF, LLaVA (JSON, JSONL), CSV and TSV.

What is recognised, row by row:
    image           image, file_name, filename, filepath, image_path, img (in that order); below the `images` folder
    text, texts     caption, captions, text, title, sentences: a string, a list of strings, or Karpathy's [{"raw": ...}]
    everything else is handed on under its own name (conversations, question, answer, id, ...)
COCO's {"images": [...], "annotations": [...]} gives one record an image, with all its captions in `texts`.
"""

import csv
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.data.decoding import BadRecord, clean_caption
from mmjax.data.image_folder import inside
from mmjax.data.sources import Record, read_bytes
from mmjax.errors import MmjaxError

IMAGE_KEYS = ("image", "file_name", "filename", "filepath", "image_path", "img")
TEXT_KEYS = ("caption", "captions", "text", "title", "sentences")


class ImageTextList:
    """Records {"image": bytes, "text": str, "texts": (str, ...), ...} of an annotation file.

    file: .json, .jsonl, .csv or .tsv. images: the folder that its paths are below; by default the file's own.

    A JSONL file is read row by row when asked for; the others are parsed once in each process.
    Raises MmjaxError, naming the file: not there, not of these formats, empty.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        images: str | os.PathLike[str] | None = None,
        name: str | None = None,
    ):
        self.file = pathlib.Path(file)
        self.images = pathlib.Path(images) if images is not None else self.file.parent
        self.name = name or self.file.name
        self._rows: list[Any] | None = None
        self._offsets: np.ndarray | None = None
        if self.file.suffix not in (".json", ".jsonl", ".csv", ".tsv"):
            raise MmjaxError(f"{self.file}: an image-text list is a .json, .jsonl, .csv or .tsv file")
        if not self.file.is_file():
            raise MmjaxError(f"{self.file}: no such file")
        if self.file.suffix == ".jsonl":
            self._offsets, self.fingerprint = _line_offsets(self.file)
            self._length = len(self._offsets) - 1
        else:
            self.fingerprint = hashlib.sha256(self.file.read_bytes()).hexdigest()
            self._length = len(self._parsed())
        if not self._length:
            raise MmjaxError(f"{self.file}: no rows")

    def __getstate__(self) -> dict[str, Any]:
        # Workers parse the file themselves: that is faster than sending a million dicts through a pipe.
        return self.__dict__ | {"_rows": None}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        row = self._row(index)
        name = self._image_name(row)
        if name is None:
            raise BadRecord("list: no image named", self.record_name(index), f"keys {sorted(row)[:8]}")
        record: Record = {key: value for key, value in row.items() if key not in (*IMAGE_KEYS, *TEXT_KEYS)}
        texts = _texts(row, f"{self.record_name(index)} {name}")
        if texts:
            record |= {"text": texts[0], "texts": texts}
        return record | {"image": read_bytes(inside(self.images, name))}

    def record_name(self, index: int) -> str:
        return f"{self.file}[{index}]"

    def _row(self, index: int) -> Mapping[str, Any]:
        if self._offsets is None:
            row = self._parsed()[index]
        else:
            start, end = (int(offset) for offset in self._offsets[index : index + 2])
            with self.file.open("rb") as opened:
                opened.seek(start)
                row = _parse(opened.read(end - start), self.record_name(index))
        if not isinstance(row, Mapping):
            raise BadRecord("list: not an object", self.record_name(index), f"it is a {type(row).__name__}")
        return row

    def _parsed(self) -> list[Any]:
        if self._rows is None:
            self._rows = _csv_rows(self.file) if self.file.suffix in (".csv", ".tsv") else _json_rows(self.file)
        return self._rows

    @staticmethod
    def _image_name(row: Mapping[str, Any]) -> str | None:
        return next((row[key] for key in IMAGE_KEYS if isinstance(row.get(key), str) and row[key]), None)


def _line_offsets(file: pathlib.Path) -> tuple[np.ndarray, str]:
    """Where the lines begin (and the last one ends), without the empty ones; and the file's SHA-256."""
    digest, offsets, position = hashlib.sha256(), [], 0
    with file.open("rb") as opened:
        for line in opened:
            digest.update(line)
            if line.strip():
                offsets.append(position)
            position += len(line)
    return np.array([*offsets, position], np.int64), digest.hexdigest()


def _parse(line: bytes, name: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord("caption: not UTF-8", name, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise BadRecord("list: not JSON", name, str(error)) from error


def _json_rows(file: pathlib.Path) -> list[Any]:
    try:
        told = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MmjaxError(f"{file}: not JSON: {error}") from error
    if isinstance(told, list):
        return told
    if isinstance(told, dict) and isinstance(told.get("images"), list):
        return _coco_rows(told)
    kind = f"an object with {sorted(told)[:8]}" if isinstance(told, dict) else type(told).__name__
    raise MmjaxError(f"{file}: expected a list of rows or COCO's images and annotations, found {kind}")


def _coco_rows(told: Mapping[str, Any]) -> list[Any]:
    captions: dict[Any, list[str]] = {}
    for annotation in told.get("annotations", ()):
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    rows = []
    for image in told["images"]:
        texts = captions.get(image.get("id", image.get("cocoid")), image.get("sentences"))
        # Karpathy's files tell the folder apart from the name.
        name = os.path.join(image.get("filepath", ""), image.get("file_name") or image.get("filename", ""))
        rows.append({"image": name, "captions": texts} | {k: image[k] for k in ("id", "cocoid", "split") if k in image})
    return rows


def _csv_rows(file: pathlib.Path) -> list[Any]:
    # Undecodable bytes become lone surrogates, which `clean_caption` refuses row by row.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t" if file.suffix == ".tsv" else ","))
    return [{key: value for key, value in row.items() if key is not None} for row in rows]


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    told: Any = next((row[key] for key in TEXT_KEYS if row.get(key) is not None), None)
    if told is None:
        return ()
    several = told if isinstance(told, list | tuple) else [told]
    raw: list[Any] = [text.get("raw") if isinstance(text, Mapping) else text for text in several]
    if not raw:
        raise BadRecord("caption: empty", name)
    return tuple(clean_caption(text, name) for text in raw)
