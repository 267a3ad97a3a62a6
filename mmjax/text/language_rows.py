"""Texts and conversations as rows of ids with labels, for models that tell the next token."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mmjax.errors import MmjaxError
from mmjax.text.chat_template import Message
from mmjax.text.tokenizer import Tokenizer

IGNORED = -100
"""The label of what is not to be learned."""

Rows = Mapping[str, Int[np.ndarray, "n l"]]
"""{"input_ids", "labels"}, int32."""


def packed(tokenizer: Tokenizer, texts: Iterable[str], length: int) -> Rows:
    """Texts one after another, an end between them, cut in rows of `length`; everything is learned, the rest left out.

    Raises MmjaxError: no end-of-text id, or less text than fills a row.
    """
    if not tokenizer.eos:
        raise MmjaxError("texts are packed with an end between them, and this tokenizer has no eos token")
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.tokenizer.encode(text).ids, tokenizer.eos[0]]
    rows = len(ids) // length
    if not rows:
        raise MmjaxError(f"{len(ids)} tokens of text do not fill a row of length={length}")
    table = np.array(ids[: rows * length], np.int32).reshape(rows, length)
    return {"input_ids": table, "labels": table.copy()}


def conversation_rows(tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], length: int) -> Rows:
    """A conversation a row, padded on the right or cut at `length`; only what the assistant says is learned.

    Which ids those are is told by where in the rendered text they stand, so that no part is encoded by itself.
    Raises MmjaxError, with the conversation: none of its answers is left, or the template renders an answer otherwise
    where more follows it.
    """
    if tokenizer.pad is None:
        raise MmjaxError("conversations are padded, and this tokenizer has neither a pad nor an eos token")
    ids = np.full((len(conversations), length), tokenizer.pad, np.int32)
    labels = np.full_like(ids, IGNORED)
    for place, messages in enumerate(conversations):
        text = tokenizer.chat(messages, add_generation_prompt=False)
        encoded = tokenizer.tokenizer.encode(text, add_special_tokens=False)
        row = np.array(encoded.ids, np.int32)
        starts = np.array([start for start, _ in encoded.offsets])
        learned = np.zeros(len(row), bool)
        for begin, end in _answers(tokenizer, messages, text):
            learned |= (starts >= begin) & (starts < end)
        if not learned[:length].any():
            raise MmjaxError(f"nothing of this conversation is learned within length={length}: {text[:200]!r}")
        kept = min(len(row), length)
        ids[place, :kept] = row[:kept]
        labels[place, :kept] = np.where(learned, row, IGNORED)[:kept]
    return {"input_ids": ids, "labels": labels}


def _answers(tokenizer: Tokenizer, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
    """Where the assistant's turns stand in the rendered text, what closes them included."""
    spans = []
    for turn, message in enumerate(messages):
        if message.get("role") == "assistant":
            before = tokenizer.chat(messages[:turn])
            after = tokenizer.chat(messages[: turn + 1], add_generation_prompt=False)
            if not text.startswith(after) or not after.startswith(before):
                raise MmjaxError(f"the chat template renders turn {turn} otherwise when more follows: {text[:200]!r}")
            spans.append((len(before), len(after)))
    return spans


def read_conversations(file: str | os.PathLike[str]) -> list[list[dict[str, Any]]]:
    """A .jsonl file, a conversation a line: {"messages": [{"role": "user", "content": "..."}, ...]}.

    Raises MmjaxError naming the file and the line.
    """
    path = pathlib.Path(file)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MmjaxError(f"{file}: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            roles = [str(message["role"]) for message in messages if isinstance(message["content"], str)]
        except (ValueError, KeyError, TypeError) as error:
            told = 'want {"messages": [{"role": ..., "content": ...}, ...]}'
            raise MmjaxError(f"{file}, line {number}: {told}: {error}") from error
        if "assistant" not in roles:
            raise MmjaxError(f"{file}, line {number}: the assistant says nothing in it")
        found.append(messages)
    if not found:
        raise MmjaxError(f"{file}: no conversation in it")
    return found
