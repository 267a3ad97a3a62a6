"""Files that list images with their annotations, row by row: JSON, JSONL, CSV, TSV; several files may make one list.

An error in a file is a MmjaxError at the start; an error in one entry is a BadRecord on access.
"""

import abc
import bisect
import csv
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.data.decoding import BadRecord, clean_caption
from mmjax.data.image_folder import inside
from mmjax.data.sources import Record
from mmjax.errors import MmjaxError

File = str | os.PathLike[str]


class AnnotationFile:
    """One file. A JSONL file is read line by line on access; other files are parsed once in each process.

    Raises MmjaxError, naming the file, if it is missing, in no known format, or empty.
    """

    def __init__(self, file: File):
        self.file = pathlib.Path(file)
        self._parsed: list[Any] | None = None
        self._offsets: np.ndarray | None = None
        if self.file.suffix not in (".json", ".jsonl", ".csv", ".tsv"):
            raise MmjaxError(f"{self.file}: an annotation file is a .json, .jsonl, .csv or .tsv file")
        if not self.file.is_file():
            raise MmjaxError(f"{self.file}: no such file")
        if self.file.suffix == ".jsonl":
            self._offsets, self.fingerprint = _line_offsets(self.file)
            self._length = len(self._offsets) - 1
        else:
            self.fingerprint = hashlib.sha256(self.file.read_bytes()).hexdigest()
            self._length = len(self._rows())
        if not self._length:
            raise MmjaxError(f"{self.file}: no entries")

    def __getstate__(self) -> dict[str, Any]:
        # Workers parse the file themselves: that is faster than sending a million dicts through a pipe.
        return self.__dict__ | {"_parsed": None}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if self._offsets is None:
            record = self._rows()[index]
        else:
            start, end = (int(offset) for offset in self._offsets[index : index + 2])
            with self.file.open("rb") as stream:
                stream.seek(start)
                record = _parse(stream.read(end - start), self.record_name(index))
        if not isinstance(record, Mapping):
            raise BadRecord("list: not an object", self.record_name(index), f"it is a {type(record).__name__}")
        return record

    def record_name(self, index: int) -> str:
        return f"{self.file}[{index}]"

    def _rows(self) -> list[Any]:
        if self._parsed is None:
            self._parsed = _csv_rows(self.file) if self.file.suffix in (".csv", ".tsv") else _json_rows(self.file)
        return self._parsed


class AnnotationList(abc.ABC):
    """The entries of one file, or of several in sequence; subclasses turn an entry into a record.

    files: one or several. images: the folder of the entries' paths; by default each file's folder.
    name: for messages; by default the files'.
    """

    def __init__(self, files: File | Sequence[File], images: File | None = None, name: str | None = None):
        """Raises MmjaxError, naming the file: see `AnnotationFile`; and for no file at all."""
        paths = [files] if isinstance(files, str | os.PathLike) else list(files)
        if not paths:
            raise MmjaxError("a list of annotations needs a file")
        self.files = tuple(AnnotationFile(file) for file in paths)
        self.images = None if images is None else pathlib.Path(images)
        self.name = name or " + ".join(each.file.name for each in self.files)
        self._ends = list(itertools.accumulate(map(len, self.files)))

    @property
    def fingerprint(self) -> str:
        if len(self.files) == 1:
            return self.files[0].fingerprint
        return hashlib.sha256(" ".join(each.fingerprint for each in self.files).encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def record_name(self, index: int) -> str:
        file, position = self._locate(index)
        return file.record_name(position)

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record:
        """The record of an entry. Raises BadRecord."""

    def record(self, index: int) -> Mapping[str, Any]:
        """The entry at `index`, as in its file. Raises BadRecord "list: not an object", "list: not JSON"."""
        file, position = self._locate(index)
        return file[position]

    def records(self) -> Iterator[Mapping[str, Any]]:
        return (self.record(index) for index in range(len(self)))

    def field(self, index: int, record: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
        """`record[key]`. Raises BadRecord "list: no KEY", naming the record, where it is missing or of another type."""
        value = record.get(key)
        if not isinstance(value, kind):
            raise BadRecord(
                f"list: no {key}", self.record_name(index), f"it is {value!r:.40}; keys {sorted(record)[:8]}"
            )
        return value

    def text(self, index: int, record: Mapping[str, Any], key: str) -> str:
        """A text by the rules of `mmjax.data.decoding`. Raises BadRecord."""
        return clean_caption(self.field(index, record, key, str), self.record_name(index))

    @abc.abstractmethod
    def image_paths(self, index: int) -> tuple[pathlib.Path, ...]:
        """The files of an entry's images, which may be missing. Raises BadRecord where the entry names none."""

    def image_path(self, index: int, name: str, folder: pathlib.Path | None = None) -> pathlib.Path:
        """The file of an image, below `images` or `folder`. Raises BadRecord "file: outside the folder"."""
        return inside(folder or self.images or self._locate(index)[0].file.parent, name)

    def _locate(self, index: int) -> tuple[AnnotationFile, int]:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        return self.files[number], index - (self._ends[number - 1] if number else 0)


def check_images(source: AnnotationList, n: int | None = None) -> None:
    """Raises MmjaxError, with the first ones, if entries (the first n) name no image or one that does not exist."""
    missing: list[str] = []
    for index in range(len(source) if n is None else n):
        try:
            missing += [str(path) for path in source.image_paths(index) if not path.is_file()]
        except BadRecord as error:
            missing.append(str(error))
    if missing:
        several = f", {', '.join(dict.fromkeys(missing[1:3]))}, ..." if len(missing) > 2 else ""
        raise MmjaxError(f"{source.name}: {len(missing)} images are missing: {missing[0]}{several}")


def _line_offsets(file: pathlib.Path) -> tuple[np.ndarray, str]:
    """The offsets of the non-empty lines and of the end, and the file's SHA-256."""
    digest, offsets, position = hashlib.sha256(), [], 0
    with file.open("rb") as stream:
        for line in stream:
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


def read_json(file: pathlib.Path) -> Any:
    """The content of a JSON file. Raises MmjaxError naming it."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise MmjaxError(f"{file}: not JSON: {error}") from error


def _json_rows(file: pathlib.Path) -> list[Any]:
    content = read_json(file)
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return _coco_records(content)
    kind = f"an object with {sorted(content)[:8]}" if isinstance(content, dict) else type(content).__name__
    raise MmjaxError(f"{file}: expected a list of entries or COCO's images and annotations, not {kind}")


def _coco_records(content: Mapping[str, Any]) -> list[Any]:
    captions: dict[Any, list[str]] = {}
    for annotation in content.get("annotations", ()):
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    records = []
    for image in content["images"]:
        texts = captions.get(image.get("id", image.get("cocoid")), image.get("sentences"))
        # Karpathy's files have the folder apart from the name.
        name = os.path.join(image.get("filepath", ""), image.get("file_name") or image.get("filename", ""))
        records.append(
            {"image": name, "captions": texts} | {k: image[k] for k in ("id", "cocoid", "split") if k in image}
        )
    return records


def _csv_rows(file: pathlib.Path) -> list[Any]:
    # Undecodable bytes become lone surrogates, which `clean_caption` refuses row by row.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        records = list(csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ","))
    return [{key: value for key, value in record.items() if key is not None} for record in records]
