"""Sentences whose words have tags: files of columns as CoNLL's shared tasks have them, and their rows of pieces.

EU NNP B-NP B-ORG
rejects VBZ B-VP O                 # a word a line, its tag in the last column; an empty line between sentences
"""

import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmjax.errors import MmjaxError
from mmjax.text.language_rows import IGNORED
from mmjax.text.wordpiece import WordPieceTokenizer

DOCUMENT = "-DOCSTART-"
"""The word of a line that begins a document and is none of it (CoNLL-2003)."""


@dataclass(frozen=True)
class TaggedWords:
    """A sentence.

    Attributes:
        words, tags: as many.
        place: file and line of its first word, for messages.
        group: what it was drawn with: its own number in the file, or what names the document that it is from.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...]
    place: str = ""
    group: str = ""


def read_columns(file: str | os.PathLike[str], word: int = 0, tag: int = -1) -> list[TaggedWords]:
    """The sentences of a file of columns with blanks or tabs between them.

    word, tag: numbers of columns, from 0, or from the end below 0.
    Raises MmjaxError naming file and line: a row without such a column, or another number of columns than the first.
    """
    try:
        lines = pathlib.Path(file).read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise MmjaxError(f"{file}: {error}") from error
    found: list[TaggedWords] = []
    words: list[tuple[str, str]] = []
    width, start = 0, 1
    for number, line in enumerate([*lines, ""], 1):
        row = line.split()
        if row and row[0] != DOCUMENT:
            width, start = width or len(row), start if words else number
            if len(row) != width or not all(-width <= column < width for column in (word, tag)) or width < 2:
                told = f"{len(row)} columns; want {max(width, 2)}, with the word in {word} and the tag in {tag}"
                raise MmjaxError(f"{file}, line {number}: {told}")
            words.append((row[word], row[tag]))
        elif words:
            own, tags = zip(*words)
            found.append(TaggedWords(own, tags, f"{file}, line {start}", str(len(found))))
            words = []
    if not found:
        raise MmjaxError(f"{file}: no word in it")
    return found


def tag_names(sentences: Sequence[TaggedWords]) -> tuple[str, ...]:
    """The different tags, "O" first, the others by name."""
    names = {tag for sentence in sentences for tag in sentence.tags}
    return tuple(sorted(names, key=lambda name: (name != "O", name)))


@dataclass(frozen=True)
class WordRow:
    """Words first to `last` of a sentence as a row: where each one's first piece is."""

    sentence: int
    first: int
    firsts: tuple[int, ...]


def word_rows(
    sentences: Sequence[Sequence[str]], tokenizer: WordPieceTokenizer, length: int
) -> tuple[list[WordRow], dict[str, np.ndarray]]:
    """Each sentence as [CLS] pieces [SEP], each word cut by itself; where a sentence has more than `length` tokens it
    goes on in another row, which begins with a word.

    Returns what the rows are of, and "input_ids", "attention_mask", "token_type_ids", int32 [n, length].
    A word without pieces (a control character) is unknown; the end of one longer than a row is cut.
    Raises MmjaxError for a sentence without words, or a length without room for a piece.
    """
    room = length - 2
    if room < 1 or not all(sentences):
        raise MmjaxError(f"length={length}, {len(sentences)} sentences: no room beside [CLS] and [SEP], or no words")
    flat = [word for words in sentences for word in words]
    cut = iter(tokenizer.pieces(flat) if flat else [])
    rows: list[WordRow] = []
    pieces: list[list[int]] = []
    for number, words in enumerate(sentences):
        firsts: list[int] = []
        row: list[int] = []
        begun = 0
        for place in range(len(words)):
            own = (next(cut) or [tokenizer.unknown])[:room]
            if len(row) + len(own) > room:
                rows.append(WordRow(number, begun, tuple(firsts)))
                pieces.append(row)
                firsts, row, begun = [], [], place
            firsts.append(len(row) + 1)
            row = row + own
        rows.append(WordRow(number, begun, tuple(firsts)))
        pieces.append(row)
    return rows, tokenizer.batch([tokenizer.row(row) for row in pieces], length)


def tagged_columns(
    sentences: Sequence[TaggedWords], tokenizer: WordPieceTokenizer, length: int, tags: Sequence[str]
) -> tuple[list[WordRow], dict[str, np.ndarray]]:
    """`word_rows`, with "labels", int32 [n, length]: at a word's first piece the number of its tag, elsewhere -100.

    Raises MmjaxError, naming the sentence, for a tag that is not among `tags`.
    """
    number = {name: index for index, name in enumerate(tags)}
    rows, columns = word_rows([sentence.words for sentence in sentences], tokenizer, length)
    labels = np.full(columns["input_ids"].shape, IGNORED, np.int32)
    for place, row in enumerate(rows):
        sentence = sentences[row.sentence]
        own = sentence.tags[row.first : row.first + len(row.firsts)]
        unknown = [tag for tag in own if tag not in number]
        if unknown:
            raise MmjaxError(f"{sentence.place}: the tag {unknown[0]!r} is not among {', '.join(tags)}")
        labels[place, list(row.firsts)] = [number[tag] for tag in own]
    return rows, columns | {"labels": labels}


def words_of(rows: Sequence[WordRow], values: np.ndarray, sentences: int) -> list[list[Any]]:
    """What stands at the first piece of each word: `values` [n, l] of the rows -> a list a sentence."""
    found: list[list[Any]] = [[] for _ in range(sentences)]
    for row, line in zip(rows, values, strict=True):
        found[row.sentence] += line[list(row.firsts)].tolist()
    return found
