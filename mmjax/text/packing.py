"""Texts and conversations as arrays of ids with labels, for causal language models."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mmjax.errors import MmjaxError
from mmjax.text.chat_template import Message
from mmjax.text.image_prompts import encode_with_offsets
from mmjax.text.tokenizer import Tokenizer

IGNORED = -100
"""The label of tokens that are not trained on."""

Columns = Mapping[str, Int[np.ndarray, "n l"]]
"""{"input_ids", "labels"}, int32."""


def pack_texts(tokenizer: Tokenizer, texts: Iterable[str], length: int) -> Columns:
    """Concatenates texts with an eos between them and splits them into sequences of `length`; the remainder is dropped.

    All tokens are trained on. Raises MmjaxError: no end-of-text id, or less text than one sequence.
    """
    if not tokenizer.eos:
        raise MmjaxError("texts are packed with an end between them, and this tokenizer has no eos token")
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.tokenizer.encode(text).ids, tokenizer.eos[0]]
    count = len(ids) // length
    if not count:
        raise MmjaxError(f"{len(ids)} tokens of text do not fill a sequence of length={length}")
    table = np.array(ids[: count * length], np.int32).reshape(count, length)
    return {"input_ids": table, "labels": table.copy()}


def conversation_columns(tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], length: int) -> Columns:
    """One conversation per sequence, padded on the right or truncated to `length`; see `labelled_conversation`.

    Raises MmjaxError, with the conversation: no assistant message within `length`, or the template renders a message
    differently when more follow.
    """
    if tokenizer.pad is None:
        raise MmjaxError("conversations are padded, and this tokenizer has neither a pad nor an eos token")
    ids = np.full((len(conversations), length), tokenizer.pad, np.int32)
    labels = np.full_like(ids, IGNORED)
    for index, messages in enumerate(conversations):
        row, learned = labelled_conversation(tokenizer, messages)
        if (learned[:length] == IGNORED).all():
            text = tokenizer.chat(messages, add_generation_prompt=False)
            raise MmjaxError(f"no assistant message of this conversation within length={length}: {text[:200]!r}")
        size = min(len(row), length)
        ids[index, :size] = row[:size]
        labels[index, :size] = learned[:size]
    return {"input_ids": ids, "labels": labels}


def labelled_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], placeholder: int | None = None, add_special_tokens: bool = False
) -> tuple[Int[np.ndarray, "l"], Int[np.ndarray, "l"]]:
    """(ids, labels) of a conversation in the tokenizer's chat template; only assistant messages are trained on.

    Their ids are identified by character offsets in the rendered text, so that no part is encoded separately. Each ends
    with the eos after it: the template's text behind that is never generated, and has no label.

    placeholder: the id of each `<image>`; None: there are no images. add_special_tokens: whether the tokenizer adds its
    own around the text. Raises MmjaxError: the template renders a message differently when more follow.
    """
    text = tokenizer.chat(messages, add_generation_prompt=False)
    if placeholder is None:
        encoded = tokenizer.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        ids, offsets = encoded.ids, [start for start, _ in encoded.offsets]
    else:
        ids, offsets = encode_with_offsets(tokenizer, text, placeholder, add_special_tokens)
    row, starts = np.array(ids, np.int32), np.array(offsets)
    labels = np.full_like(row, IGNORED)
    for begin, end in _answers(tokenizer, messages, text):
        learned = np.flatnonzero((starts >= begin) & (starts < end))
        ends = np.flatnonzero(np.isin(row[learned], tokenizer.eos))
        learned = learned[: ends[-1] + 1] if len(ends) else learned
        labels[learned] = row[learned]
    return row, labels


def _answers(tokenizer: Tokenizer, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
    """(start, end) of the assistant's messages in the rendered text, including their closing tokens."""
    spans = []
    for index, message in enumerate(messages):
        if message.get("role") == "assistant":
            before = tokenizer.chat(messages[:index])
            after = tokenizer.chat(messages[: index + 1], add_generation_prompt=False)
            if not text.startswith(after) or not after.startswith(before):
                raise MmjaxError(
                    f"the chat template renders message {index} differently when more follow: {text[:200]!r}"
                )
            spans.append((len(before), len(after)))
    return spans


def read_conversations(file: str | os.PathLike[str]) -> list[list[dict[str, Any]]]:
    """Reads a .jsonl file with one conversation per line: {"messages": [{"role": "user", "content": "..."}, ...]}.

    Raises MmjaxError naming the file and the line.
    """
    path = pathlib.Path(file)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MmjaxError(f"{file}: {error}") from error
    conversations = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            roles = [str(message["role"]) for message in messages if isinstance(message["content"], str)]
        except (ValueError, KeyError, TypeError) as error:
            expected = 'expected {"messages": [{"role": ..., "content": ...}, ...]}'
            raise MmjaxError(f"{file}, line {number}: {expected}: {error}") from error
        if "assistant" not in roles:
            raise MmjaxError(f"{file}, line {number}: it has no assistant message")
        conversations.append(messages)
    if not conversations:
        raise MmjaxError(f"{file}: it has no conversations")
    return conversations
