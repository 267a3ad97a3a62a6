"""Extractive question answering: windows over a context, and the best answer spans from logits (BERT on SQuAD).

From google-research/bert run_squad.py. Answers are cut out of the context by the character offsets of pieces.
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
        ids, types: ids and token types of the tokens.
        offsets: (start, end) of each token's characters in the context; None for tokens outside the context.
        central: whether a token has more context around it here than in any other window.
    """

    ids: list[int]
    types: list[int]
    offsets: list[tuple[int, int] | None]
    central: list[bool]


@dataclass(frozen=True)
class Answer:
    """text: context[start:end], "" for no answer. score: the sum of the logits of its first and last token."""

    text: str
    start: int
    end: int
    score: float


def windows(
    tokenizer: WordPieceTokenizer, question: str, context: str, length: int = 384, stride: int = 128, query: int = 64
) -> list[Window]:
    """Windows of a question with parts of its context that begin `stride` pieces apart and cover the whole context.

    length: maximum number of tokens of a window. query: maximum number of pieces of the question, truncated at its end.
    Raises MmjaxError for a context without pieces, or a length too small for a piece of context.
    """
    question_ids = tokenizer.pieces(question)[0][:query]
    encoding = tokenizer.tokenizer.encode(context, add_special_tokens=False)
    capacity = length - len(question_ids) - 3
    if not encoding.ids or capacity < 1 or stride < 1:
        raise MmjaxError(f"a context of {len(encoding.ids)} pieces, length={length}, stride={stride}: no window")
    total, start, parts = len(encoding.ids), 0, []
    while True:
        parts.append((start, min(capacity, total - start)))
        if start + capacity >= total:
            break
        start += min(capacity, stride)
    result = []
    for part, (start, size) in enumerate(parts):
        ids, types = tokenizer.with_special_tokens(question_ids, encoding.ids[start : start + size])
        before: list[None] = [None] * (len(question_ids) + 2)
        central = [_most_central(parts, start + i) == part for i in range(size)]
        offsets = [*before, *encoding.offsets[start : start + size], None]
        result.append(Window(ids, types, offsets, [False] * len(before) + central + [False]))
    return result


def _most_central(parts: Sequence[tuple[int, int]], piece: int) -> int:
    """The index of the part (start, size) in which this piece has most context on its shorter side; ties: the first."""

    def context(part: int) -> float:
        start, size = parts[part]
        inside = start <= piece < start + size
        return min(piece - start, start + size - 1 - piece) + 0.01 * size if inside else -1.0

    last = bisect.bisect_right(parts, piece, key=lambda part: part[0])
    return max(range(last), key=context)


def span_in(window: Window, start: int, end: int) -> tuple[int, int]:
    """The first and last token that overlap context[start:end], or (0, 0), [CLS], if part of it is not in the window.

    Windows without the answer are training examples without an answer (as in run_squad.py, which drops none).
    """
    inside = [i for i, offset in enumerate(window.offsets) if offset and offset[0] < end and start < offset[1]]
    if not inside:
        return 0, 0
    before, after = window.offsets[inside[0] - 1], window.offsets[inside[-1] + 1]
    first, last = window.offsets[inside[0]], window.offsets[inside[-1]]
    assert first is not None and last is not None
    # At the window's edge the answer may extend into a piece before or after it.
    whole = (before is not None or first[0] <= start) and (after is not None or end <= last[1])
    return (inside[0], inside[-1]) if whole else (0, 0)


@dataclass(frozen=True)
class QuestionWindows:
    """The windows of several questions, and the index of each window's question."""

    windows: tuple[Window, ...]
    question_indices: tuple[int, ...]


def answer_columns(
    questions: Sequence[Question],
    tokenizer: WordPieceTokenizer,
    length: int = 384,
    stride: int = 128,
    query: int = 64,
) -> tuple[QuestionWindows, dict[str, np.ndarray]]:
    """Windows of every question, and their arrays: "input_ids", "attention_mask", "token_type_ids", int32 [n, length],
    "start" and "end" [n]: the tokens of the first answer, 0 without one.

    Raises MmjaxError, naming the question, for a context without pieces.
    """
    parts: list[Window] = []
    question_indices: list[int] = []
    spans: list[tuple[int, int]] = []
    for number, question in enumerate(questions):
        try:
            question_windows = windows(tokenizer, question.question, question.context, length, stride, query)
        except MmjaxError as error:
            raise MmjaxError(f"question {question.id}: {error}") from error
        parts += question_windows
        question_indices += [number] * len(question_windows)
        if question.answers:
            text, start = question.answers[0]
            spans += [span_in(part, start, start + len(text)) for part in question_windows]
        else:
            spans += [(0, 0)] * len(question_windows)
    columns = tokenizer.batch([(part.ids, part.types) for part in parts], length)
    for column, name in enumerate(("start", "end")):
        columns[name] = np.array([span[column] for span in spans], np.int32)
    return QuestionWindows(tuple(parts), tuple(question_indices)), columns


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

    starts, ends: a logit for each token of each window; padding is ignored.
    longest: maximum number of pieces of an answer.
    null_threshold: if not None, "" is a candidate too (SQuAD 2.0). Its score is the smallest score of the windows at
        [CLS], and it ranks before an answer if it exceeds that answer's score by more than the threshold.
    """
    candidates: list[Answer] = []
    for part, start_logits, end_logits in zip(parts, starts, ends, strict=True):
        size = len(part.ids)
        firsts, lasts = (np.argsort(-row[:size], kind="stable")[:n_best] for row in (start_logits, end_logits))
        for first in firsts.tolist():
            for last in lasts.tolist():
                begin, end = part.offsets[first], part.offsets[last]
                if begin and end and part.central[first] and first <= last < first + longest:
                    text, score = context[begin[0] : end[1]], float(start_logits[first] + end_logits[last])
                    candidates.append(Answer(text, begin[0], end[1], score))
    candidates.sort(key=lambda answer: -answer.score)
    once: dict[str, Answer] = {}
    for answer in candidates:
        once.setdefault(answer.text, answer)
    best = list(once.values())[:n_best]
    if null_threshold is not None:
        null = min(float(row[0] + other[0]) for row, other in zip(starts, ends))
        before = sum(answer.score >= null - null_threshold for answer in best)
        best.insert(before, Answer("", 0, 0, null))
    return best
