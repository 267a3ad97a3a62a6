"""Texts, or pairs of texts, each with a class or a number: GLUE's tables and similar ones, from local files.

    read_labelled("SST-2/train.tsv")                                    # a header with "sentence" and "label"
    read_labelled("RTE/train.tsv", "sentence1", "label", "sentence2")
    read_labelled("CoLA/train.tsv", "3", "1")                           # no header: columns by number, from 0
    read_labelled("reviews.jsonl", "text", "stars")                     # one object per line

.tsv as in GLUE, where quotation marks have no meaning; .csv with the usual quotes; .jsonl.
"""

import csv
import io
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmjax.errors import MmjaxError
from mmjax.text.wordpiece import WordPieceTokenizer

File = str | os.PathLike[str]


@dataclass(frozen=True)
class LabelledText:
    """pair: the second text, "" if there is only one. label: as written. location: file and line."""

    text: str
    label: str
    pair: str = ""
    location: str = ""


def read_labelled(file: File, text: str = "sentence", label: str = "label", pair: str = "") -> list[LabelledText]:
    """The records of a file. text, label, pair: names of columns, or their numbers in a file without a header.

    Raises MmjaxError naming file and line: no such column, a record without it, an empty text or label, or not UTF-8.
    """
    path, names = pathlib.Path(file), [name for name in (text, label, pair) if name]
    try:
        content = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MmjaxError(f"{file}: {error}") from error
    readers = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl}
    if path.suffix not in readers:
        raise MmjaxError(f"{file}: expected a file name that ends in {', '.join(readers)}")
    records = []
    for number, row in readers[path.suffix](content, file, names):
        location = f"{file}, line {number}"
        empty = [name for name in names if not row[name].strip()]
        if empty:
            raise MmjaxError(f"{location}: column {empty[0]!r} is empty")
        records.append(LabelledText(row[text], row[label].strip(), row[pair] if pair else "", location))
    if not records:
        raise MmjaxError(f"{file}: it has no records")
    return records


Numbered = Iterator[tuple[int, Mapping[str, str]]]


def _tsv(content: str, file: File, names: Sequence[str]) -> Numbered:
    lines = enumerate(content.split("\n"), 1)
    cut = ((number, line.removesuffix("\r").split("\t")) for number, line in lines if line.strip())
    return _columns(cut, file, names)


def _csv(content: str, file: File, names: Sequence[str]) -> Numbered:
    def numbered() -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(io.StringIO(content, newline=""), strict=True)
        try:
            yield from ((reader.line_num, row) for row in reader if row)
        except csv.Error as error:
            raise MmjaxError(f"{file}, line {reader.line_num}: {error}") from error

    return _columns(numbered(), file, names)


def _columns(rows: Iterator[tuple[int, list[str]]], file: File, names: Sequence[str]) -> Numbered:
    if all(name.isdigit() for name in names):
        indices = {name: int(name) for name in names}
    else:
        header = next(rows, (1, []))[1]
        absent = [name for name in names if name not in header]
        if absent:
            raise MmjaxError(f"{file}, line 1: no column {absent[0]!r}; there are {', '.join(header)}")
        indices = {name: header.index(name) for name in names}
    for number, row in rows:
        if len(row) <= max(indices.values()):
            raise MmjaxError(f"{file}, line {number}: {len(row)} columns; expected {max(indices.values()) + 1} or more")
        yield number, {name: row[index] for name, index in indices.items()}


def _jsonl(content: str, file: File, names: Sequence[str]) -> Numbered:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                yield number, {name: str(row[name]) for name in names}
            except (ValueError, KeyError, TypeError) as error:
                expected = f"expected an object with {', '.join(names)}"
                raise MmjaxError(f"{file}, line {number}: {expected}: {type(error).__name__}: {error}") from error


def class_names(texts: Sequence[LabelledText]) -> tuple[str, ...]:
    """The distinct labels, sorted as integers if all are, else by name. Raises MmjaxError for fewer than two."""
    names = {text.label for text in texts}
    if len(names) < 2:
        raise MmjaxError(f"{texts[0].location}: all {len(texts)} texts are of one class, {texts[0].label!r}")
    numbered = all(name.isdigit() for name in names)
    return tuple(sorted(names, key=int) if numbered else sorted(names))


def classified_columns(
    texts: Sequence[LabelledText], tokenizer: WordPieceTokenizer, length: int, classes: Sequence[str]
) -> dict[str, np.ndarray]:
    """Columns "input_ids", "attention_mask", "token_type_ids", int32 [n, l], l at most `length`, and "label" [n]: the
    class index, or without `classes` the label as a float32 number.

    Raises MmjaxError, naming file and line: a label that is not a class, or not a finite number.
    """
    class_index = {name: index for index, name in enumerate(classes)}
    labels = []
    for text in texts:
        value: Any = class_index.get(text.label) if classes else _finite(text.label)
        if value is None:
            problem = f"not among {', '.join(classes)}" if classes else "not a number"
            raise MmjaxError(f"{text.location}: the label {text.label!r} is {problem}")
        labels.append(value)
    pairs = [text.pair for text in texts] if any(text.pair for text in texts) else None
    columns = tokenizer([text.text for text in texts], pairs, length)
    return columns | {"label": np.array(labels, np.int32 if classes else np.float32)}


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
