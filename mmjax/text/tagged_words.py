"""Sentences of tagged words: column files as in CoNLL's shared tasks, and their arrays of pieces.

EU NNP B-NP B-ORG
rejects VBZ B-VP O                 # one word per line, its tag in the last column; an empty line between sentences
"""

import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmjax.errors import MmjaxError
from mmjax.text.packing import IGNORED
from mmjax.text.wordpiece import WordPieceTokenizer

DOCUMENT = "-DOCSTART-"
"""The word of a line that marks the beginning of a document and is not part of it (CoNLL-2003)."""


@dataclass(frozen=True)
class TaggedWords:
    """A sentence.

    Attributes:
        words, tags: of equal length.
        location: file and line of its first word, for error messages.
        group: sentences of the same group are resampled together: the sentence's number in the file, or its document.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...]
    location: str = ""
    group: str = ""


def read_columns(file: str | os.PathLike[str], word: int = 0, tag: int = -1) -> list[TaggedWords]:
    """The sentences of a file of columns separated by blanks or tabs.

    word, tag: column numbers, from 0, or negative from the end.
    Raises MmjaxError naming file and line: a line without such a column, or with another number of columns than the
    first.
    """
    try:
        lines = pathlib.Path(file).read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise MmjaxError(f"{file}: {error}") from error
    sentences: list[TaggedWords] = []
    words: list[tuple[str, str]] = []
    width, start = 0, 1
    for number, line in enumerate([*lines, ""], 1):
        row = line.split()
        if row and row[0] != DOCUMENT:
            width, start = width or len(row), start if words else number
            if len(row) != width or not all(-width <= column < width for column in (word, tag)) or width < 2:
                message = f"{len(row)} columns; expected {max(width, 2)}, with the word in {word} and the tag in {tag}"
                raise MmjaxError(f"{file}, line {number}: {message}")
            words.append((row[word], row[tag]))
        elif words:
            sentence_words, tags = zip(*words)
            sentences.append(TaggedWords(sentence_words, tags, f"{file}, line {start}", str(len(sentences))))
            words = []
    if not sentences:
        raise MmjaxError(f"{file}: it has no words")
    return sentences


def tag_names(sentences: Sequence[TaggedWords]) -> tuple[str, ...]:
    """The distinct tags, "O" first, the others by name."""
    names = {tag for sentence in sentences for tag in sentence.tags}
    return tuple(sorted(names, key=lambda name: (name != "O", name)))


@dataclass(frozen=True)
class WordSequence:
    """Consecutive words of a sentence in one sequence.

    sentence: index of the sentence. first: index of its first word here. firsts: position of each word's first piece.
    """

    sentence: int
    first: int
    firsts: tuple[int, ...]


def word_sequences(
    sentences: Sequence[Sequence[str]], tokenizer: WordPieceTokenizer, length: int
) -> tuple[list[WordSequence], dict[str, np.ndarray]]:
    """Each sentence as [CLS] pieces [SEP], each word tokenised separately; a sentence of more than `length` tokens
    continues in another sequence, which begins with a word.

    Returns the words of each sequence, and "input_ids", "attention_mask", "token_type_ids", int32 [n, length].
    A word without pieces (a control character) is unknown; a word longer than a sequence is truncated.
    Raises MmjaxError for a sentence without words, or a length too small for a piece.
    """
    capacity = length - 2
    if capacity < 1 or not all(sentences):
        raise MmjaxError(
            f"length={length}, {len(sentences)} sentences: too short for a piece beside [CLS] and [SEP], or no words"
        )
    flat = [word for words in sentences for word in words]
    cut = iter(tokenizer.pieces(flat) if flat else [])
    sequences: list[WordSequence] = []
    pieces: list[list[int]] = []
    for number, words in enumerate(sentences):
        firsts: list[int] = []
        row: list[int] = []
        start = 0
        for position in range(len(words)):
            word_ids = (next(cut) or [tokenizer.unknown])[:capacity]
            if len(row) + len(word_ids) > capacity:
                sequences.append(WordSequence(number, start, tuple(firsts)))
                pieces.append(row)
                firsts, row, start = [], [], position
            firsts.append(len(row) + 1)
            row = row + word_ids
        sequences.append(WordSequence(number, start, tuple(firsts)))
        pieces.append(row)
    return sequences, tokenizer.batch([tokenizer.with_special_tokens(row) for row in pieces], length)


def tagged_columns(
    sentences: Sequence[TaggedWords], tokenizer: WordPieceTokenizer, length: int, tags: Sequence[str]
) -> tuple[list[WordSequence], dict[str, np.ndarray]]:
    """`word_sequences`, with "labels", int32 [n, length]: the index of a word's tag at its first piece, -100 elsewhere.

    Raises MmjaxError, naming the sentence, for a tag that is not among `tags`.
    """
    number = {name: index for index, name in enumerate(tags)}
    sequences, columns = word_sequences([sentence.words for sentence in sentences], tokenizer, length)
    labels = np.full(columns["input_ids"].shape, IGNORED, np.int32)
    for index, sequence in enumerate(sequences):
        sentence = sentences[sequence.sentence]
        sentence_tags = sentence.tags[sequence.first : sequence.first + len(sequence.firsts)]
        unknown = [tag for tag in sentence_tags if tag not in number]
        if unknown:
            raise MmjaxError(f"{sentence.location}: the tag {unknown[0]!r} is not among {', '.join(tags)}")
        labels[index, list(sequence.firsts)] = [number[tag] for tag in sentence_tags]
    return sequences, columns | {"labels": labels}


def words_of(sequences: Sequence[WordSequence], values: np.ndarray, sentences: int) -> list[list[Any]]:
    """The value at the first piece of each word: `values` [n, l] of the sequences -> one list per sentence."""
    result: list[list[Any]] = [[] for _ in range(sentences)]
    for sequence, line in zip(sequences, values, strict=True):
        result[sequence.sentence] += line[list(sequence.firsts)].tolist()
    return result
