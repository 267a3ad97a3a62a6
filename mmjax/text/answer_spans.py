"""Answers that are a piece of a text: windows over a context, and the best spans of their scores (BERT on SQuAD).

From google-research/bert run_squad.py. Answers are cut out of the context by the pieces' places in it.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mmjax.errors import MmjaxError
from mmjax.text.squad import Question
from mmjax.text.wordpiece import WordPieceTokenizer


@dataclass(frozen=True)
class Window:
    """[CLS] question [SEP] part of the context [SEP].

    Attributes:
        ids, types: of the tokens.
        places: token -> (start, end) of its characters in the context; None for what is not of the context.
        central: whether a token has more context around it here than in any other window.
    """

    ids: list[int]
    types: list[int]
    places: list[tuple[int, int] | None]
    central: list[bool]


@dataclass(frozen=True)
class Answer:
    """text: context[start:end], "" for none. score: the sum of its first and last token's logits."""

    text: str
    start: int
    end: int
    score: float


def windows(
    tokenizer: WordPieceTokenizer, question: str, context: str, length: int = 384, stride: int = 128, query: int = 64
) -> list[Window]:
    """A question with parts of its context, which begin `stride` pieces apart, until its end is covered.

    length: tokens of a window at most. query: pieces of the question at most; its end is cut.
    Raises MmjaxError for a context without pieces, or a length that leaves no room for one.
    """
    asked = tokenizer.pieces(question)[0][:query]
    encoding = tokenizer.tokenizer.encode(context, add_special_tokens=False)
    room = length - len(asked) - 3
    if not encoding.ids or room < 1 or stride < 1:
        raise MmjaxError(f"a context of {len(encoding.ids)} pieces, length={length}, stride={stride}: no window")
    total, start, parts = len(encoding.ids), 0, []
    while True:
        parts.append((start, min(room, total - start)))
        if start + room >= total:
            break
        start += min(room, stride)
    found = []
    for part, (start, size) in enumerate(parts):
        ids, types = tokenizer.row(asked, encoding.ids[start : start + size])
        before: list[None] = [None] * (len(asked) + 2)
        central = [_most_central(parts, start + i) == part for i in range(size)]
        places = [*before, *encoding.offsets[start : start + size], None]
        found.append(Window(ids, types, places, [False] * len(before) + central + [False]))
    return found


def _most_central(parts: Sequence[tuple[int, int]], piece: int) -> int:
    """Of the parts (start, size) with this piece the one with most context on its shorter side, the first of equals."""

    def context(part: int) -> float:
        start, size = parts[part]
        inside = start <= piece < start + size
        return min(piece - start, start + size - 1 - piece) + 0.01 * size if inside else -1.0

    last = bisect.bisect_right(parts, piece, key=lambda part: part[0])
    return max(range(last), key=context)


def span_in(window: Window, start: int, end: int) -> tuple[int, int]:
    """The first and last token that touch context[start:end], or (0, 0), [CLS], where some of it is not in the window.

    Chunks without the answer are learned too, as having none (run_squad.py, which drops none either).
    """
    inside = [i for i, place in enumerate(window.places) if place and place[0] < end and start < place[1]]
    if not inside:
        return 0, 0
    before, after = window.places[inside[0] - 1], window.places[inside[-1] + 1]
    first, last = window.places[inside[0]], window.places[inside[-1]]
    assert first is not None and last is not None
    # A piece next to the window's edge may have had another before or behind it that the answer touches as well.
    whole = (before is not None or first[0] <= start) and (after is not None or end <= last[1])
    return (inside[0], inside[-1]) if whole else (0, 0)


@dataclass(frozen=True)
class AskedWindows:
    """The windows of questions, and which question (a number) each is of."""

    windows: tuple[Window, ...]
    owners: tuple[int, ...]


def answer_columns(
    questions: Sequence[Question],
    tokenizer: WordPieceTokenizer,
    length: int = 384,
    stride: int = 128,
    query: int = 64,
) -> tuple[AskedWindows, dict[str, np.ndarray]]:
    """Windows of every question, and as arrays: "input_ids", "attention_mask", "token_type_ids", int32 [n, length],
    "start" and "end" [n]: the tokens of the first answer, 0 where there is none.

    Raises MmjaxError, naming the question, for a context without pieces.
    """
    parts: list[Window] = []
    owners: list[int] = []
    spans: list[tuple[int, int]] = []
    for number, question in enumerate(questions):
        try:
            own = windows(tokenizer, question.question, question.context, length, stride, query)
        except MmjaxError as error:
            raise MmjaxError(f"question {question.id}: {error}") from error
        parts += own
        owners += [number] * len(own)
        if question.answers:
            text, start = question.answers[0]
            spans += [span_in(part, start, start + len(text)) for part in own]
        else:
            spans += [(0, 0)] * len(own)
    columns = tokenizer.batch([(part.ids, part.types) for part in parts], length)
    for place, name in enumerate(("start", "end")):
        columns[name] = np.array([span[place] for span in spans], np.int32)
    return AskedWindows(tuple(parts), tuple(owners)), columns


def best_answers(
    context: str,
    parts: Sequence[Window],
    starts: Float[np.ndarray, "w l"],
    ends: Float[np.ndarray, "w l"],
    n_best: int = 20,
    longest: int = 30,
    null_threshold: float | None = None,
) -> list[Answer]:
    """The `n_best` answers, the best first, each text once.

    starts, ends: a logit for each token of each window; padding behind a window's tokens is not looked at.
    longest: pieces of an answer at most.
    null_threshold: where given, "" is an answer too (SQuAD 2.0). Its score is the smallest of the windows' at [CLS],
        and it goes before an answer where it is larger by more than this.
    """
    found: list[Answer] = []
    for part, start_logits, end_logits in zip(parts, starts, ends, strict=True):
        size = len(part.ids)
        firsts, lasts = (np.argsort(-row[:size], kind="stable")[:n_best] for row in (start_logits, end_logits))
        for first in firsts.tolist():
            for last in lasts.tolist():
                begin, end = part.places[first], part.places[last]
                if begin and end and part.central[first] and first <= last < first + longest:
                    text, score = context[begin[0] : end[1]], float(start_logits[first] + end_logits[last])
                    found.append(Answer(text, begin[0], end[1], score))
    found.sort(key=lambda answer: -answer.score)
    once: dict[str, Answer] = {}
    for answer in found:
        once.setdefault(answer.text, answer)
    kept = list(once.values())[:n_best]
    if null_threshold is not None:
        null = min(float(row[0] + other[0]) for row, other in zip(starts, ends))
        before = sum(answer.score >= null - null_threshold for answer in kept)
        kept.insert(before, Answer("", 0, 0, null))
    return kept
