"""From documents to pairs of segments for next-sentence prediction (google-research/bert create_pretraining_data.py).

A document is a list of sentences, a sentence a list of ids. Sampling is counter-based: the pairs of a document in a
pass are a function of (seed, pass, document), given the same set of documents.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mmjax.errors import MmjaxError
from mmjax.text.wordpiece import WordPieceTokenizer

Document = Sequence[Sequence[int]]


class Pair(NamedTuple):
    """Two segments, whether the second is from elsewhere (random), and the index of the first one's document."""

    a: list[int]
    b: list[int]
    random: bool
    document: int


def sentence_pairs(
    documents: Sequence[Document], length: int = 128, passes: int = 10, short: float = 0.1, seed: int = 0
) -> Iterator[Pair]:
    """The pairs of all documents, sampled anew in each of `passes` passes.

    length: maximum number of tokens of a pair, including three special tokens. short: the share of documents and passes
        whose pairs have a shorter target length.
    Raises MmjaxError: fewer than two documents, an empty one, or a length too small for two pieces.
    """
    if length < 5 or passes < 1 or not 0 <= short <= 1:
        raise MmjaxError(f"sentence pairs: length={length} (at least 5), passes={passes}, short={short}")
    if len(documents) < 2 or not all(document and all(document) for document in documents):
        raise MmjaxError(
            f"sentence pairs: need two documents or more ({len(documents)}) of sentences that are not empty"
        )
    for pass_index in range(passes):
        for index in range(len(documents)):
            yield from _pairs_of(documents, index, length - 3, short, np.random.default_rng((seed, pass_index, index)))


def _pairs_of(
    documents: Sequence[Document], index: int, capacity: int, short: float, rng: np.random.Generator
) -> Iterator[Pair]:
    document = documents[index]
    target = int(rng.integers(2, capacity + 1)) if rng.random() < short else capacity
    start = 0
    while start < len(document):
        end, size = start, 0
        while end < len(document) and size < target:
            size += len(document[end])
            end += 1
        # The last of several sentences begins the second segment at the latest.
        middle = start + 1 if end - start == 1 else start + int(rng.integers(1, end - start))
        a = _joined(document[start:middle])
        random = end - start == 1 or rng.random() < 0.5
        b = _elsewhere(documents, index, target - len(a), rng) if random else _joined(document[middle:end])
        yield Pair(*_truncated(a, b, capacity, rng), random, index)
        start = middle if random else end  # the sentences replaced by a random segment are used again


def _elsewhere(documents: Sequence[Document], index: int, target: int, rng: np.random.Generator) -> list[int]:
    """Consecutive sentences of another document from a random one on, up to `target` pieces, at least one sentence."""
    other = index
    for _ in range(10):
        other = int(rng.integers(len(documents)))
        if other != index:
            break
    start = int(rng.integers(len(documents[other])))
    pieces: list[int] = []
    for sentence in documents[other][start:]:
        pieces += sentence
        if len(pieces) >= target:
            break
    return pieces


def _truncated(a: list[int], b: list[int], capacity: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Drops the first or last piece, with equal probability, of the longer segment (the second if they are equal) until
    both fit."""
    ends = [[0, len(a)], [0, len(b)]]
    while sum(stop - start for start, stop in ends) > capacity:
        longer = ends[0] if ends[0][1] - ends[0][0] > ends[1][1] - ends[1][0] else ends[1]
        if rng.random() < 0.5:
            longer[0] += 1
        else:
            longer[1] -= 1
    return a[slice(*ends[0])], b[slice(*ends[1])]


def _joined(sentences: Document) -> list[int]:
    return [id for sentence in sentences for id in sentence]


def pair_columns(pairs: Sequence[Pair], tokenizer: WordPieceTokenizer, length: int) -> dict[str, np.ndarray]:
    """Pairs as arrays, int32: "input_ids", "attention_mask", "token_type_ids" [n, length], and [n] each "next_label",
    1 for a random second segment, and "document"."""
    columns = tokenizer.batch([tokenizer.with_special_tokens(pair.a, pair.b) for pair in pairs], length)
    columns["next_label"] = np.array([pair.random for pair in pairs], np.int32)
    return columns | {"document": np.array([pair.document for pair in pairs], np.int32)}
