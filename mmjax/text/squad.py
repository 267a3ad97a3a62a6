"""Questions about texts whose answers are pieces of them, in SQuAD's JSON (v1.1, and v2.0 with questions without one).

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
    """answers: (text, its first character in the context) each; none: the context does not tell.

    group: what it was drawn with: the paragraph's number in the file, or whatever names where it is from.
    """

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    group: str = ""


def read_squad(file: str | os.PathLike[str]) -> list[Question]:
    """Every question of a file, with all its answers.

    Raises MmjaxError naming the file and the line (JSON that does not parse) or the question: a field that is missing
    or of another type, or an answer that does not stand where it should.
    """
    try:
        told = json.loads(pathlib.Path(file).read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise MmjaxError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MmjaxError(f"{file}: {error}") from error
    found = list(_questions(told, str(file)))
    if not found:
        raise MmjaxError(f"{file}: no question in it")
    return found


def _questions(told: Any, file: str) -> Iterator[Question]:
    for a, article in enumerate(_field(told, "data", list, file)):
        for p, paragraph in enumerate(_field(article, "paragraphs", list, f"{file}: data[{a}]")):
            place = f"data[{a}].paragraphs[{p}]"
            context = _field(paragraph, "context", str, f"{file}: {place}")
            for q, entry in enumerate(_field(paragraph, "qas", list, f"{file}: {place}")):
                here = f"{file}: {place}.qas[{q}]"
                id, question = (_field(entry, name, str, here) for name in ("id", "question"))
                impossible = entry.get("is_impossible", False)
                given = [] if impossible else _field(entry, "answers", list, here)
                answers = tuple(_answer(answer, context, f"{here} (id {id})") for answer in given)
                if not answers and not impossible:
                    raise MmjaxError(f"{here} (id {id}): no answer, and is_impossible is not true")
                yield Question(id, question, context, answers, place)


def _answer(told: Any, context: str, place: str) -> tuple[str, int]:
    text, start = _field(told, "text", str, place), _field(told, "answer_start", int, place)
    stands = context[max(start, 0) : max(start, 0) + len(text)]
    if not text.strip() or start < 0 or stands != text:
        raise MmjaxError(f"{place}: the answer {text!r} should stand at {start}, where the context has {stands!r}")
    return text, start


def _field(told: Any, name: str, kind: type, place: str) -> Any:
    value = told.get(name) if isinstance(told, dict) else None
    if not isinstance(value, kind):
        raise MmjaxError(f"{place}: want {name!r}, a {kind.__name__}, not {type(value).__name__}")
    return value
