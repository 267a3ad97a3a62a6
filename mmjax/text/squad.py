"""SQuAD's JSON format: questions about texts with extractive answers (v1.1, and v2.0 with unanswerable questions).

{"data": [{"title": .., "paragraphs": [{"context": .., "qas": [{"id": .., "question": .., "answers": [{"text": ..,
"answer_start": ..}, ..], "is_impossible": true}, ..]}, ..]}, ..]}
"""

import json
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmjax.errors import MmjaxError


@dataclass(frozen=True)
class Question:
    """answers: (text, index of its first character in the context) each; empty if unanswerable.

    group: questions of the same group are resampled together: the paragraph's path in the file, or any other source.
    """

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    group: str = ""


def read_squad(file: str | os.PathLike[str]) -> list[Question]:
    """All questions of a file, with all answers.

    Raises MmjaxError naming the file and the line (invalid JSON) or the question: a missing field or one of another
    type, or an answer that is not at its offset in the context.
    """
    try:
        content = json.loads(pathlib.Path(file).read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise MmjaxError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MmjaxError(f"{file}: {error}") from error
    questions = list(_questions(content, str(file)))
    if not questions:
        raise MmjaxError(f"{file}: it has no questions")
    return questions


def _questions(content: Any, file: str) -> Iterator[Question]:
    for a, article in enumerate(_field(content, "data", list, file)):
        for p, paragraph in enumerate(_field(article, "paragraphs", list, f"{file}: data[{a}]")):
            path = f"data[{a}].paragraphs[{p}]"
            context = _field(paragraph, "context", str, f"{file}: {path}")
            for q, item in enumerate(_field(paragraph, "qas", list, f"{file}: {path}")):
                location = f"{file}: {path}.qas[{q}]"
                id, question = (_field(item, name, str, location) for name in ("id", "question"))
                impossible = item.get("is_impossible", False)
                answer_list = [] if impossible else _field(item, "answers", list, location)
                answers = tuple(_answer(answer, context, f"{location} (id {id})") for answer in answer_list)
                if not answers and not impossible:
                    raise MmjaxError(f"{location} (id {id}): no answer, and is_impossible is not true")
                yield Question(id, question, context, answers, path)


def _answer(item: Any, context: str, location: str) -> tuple[str, int]:
    text, start = _field(item, "text", str, location), _field(item, "answer_start", int, location)
    at_start = context[max(start, 0) : max(start, 0) + len(text)]
    if not text.strip() or start < 0 or at_start != text:
        raise MmjaxError(f"{location}: the answer {text!r} is not at {start}, where the context has {at_start!r}")
    return text, start


def _field(item: Any, name: str, kind: type, location: str) -> Any:
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, kind):
        raise MmjaxError(f"{location}: expected {name!r}, a {kind.__name__}, not {type(value).__name__}")
    return value
