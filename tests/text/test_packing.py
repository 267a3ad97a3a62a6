"""Rows of ids and labels: which tokens of texts and conversations have labels."""

import json

import numpy as np
import pytest
from models.tiny_text import chat_tokenizer

from mmjax.errors import MmjaxError
from mmjax.text.packing import IGNORED, conversation_columns, pack_texts, read_conversations


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


TALK = [
    {"role": "user", "content": "name three fruits"},
    {"role": "assistant", "content": "sea, time"},
    {"role": "user", "content": "which?"},
    {"role": "assistant", "content": "blue"},
]


def test_texts_are_packed_end_to_end(tokenizer):
    texts = ["once upon a time", "the sea is blue", "yellow fruits"]
    columns = pack_texts(tokenizer, texts, 7)
    flat = [id for text in texts for id in [*tokenizer.tokenizer.encode(text).ids, tokenizer.eos[0]]]
    assert columns["input_ids"].ravel().tolist() == flat[: len(flat) // 7 * 7]
    np.testing.assert_array_equal(columns["labels"], columns["input_ids"])
    with pytest.raises(MmjaxError, match=r"length=500"):
        pack_texts(tokenizer, texts, 500)


def test_only_assistant_messages_are_trained_on(tokenizer):
    columns = conversation_columns(tokenizer, [TALK], 120)
    text = tokenizer.chat(TALK, add_generation_prompt=False)
    ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    assert columns["input_ids"][0, : len(ids)].tolist() == ids
    assert (columns["input_ids"][0, len(ids) :] == tokenizer.pad).all() and (
        columns["labels"][0, len(ids) :] == IGNORED
    ).all()
    learned = columns["input_ids"][0][columns["labels"][0] != IGNORED]
    assert tokenizer.decode(learned, skip_special_tokens=False) == "sea, time</s>blue</s>"
    assert (columns["labels"][0][columns["labels"][0] != IGNORED] == learned).all()


def test_a_conversation_without_trained_tokens_is_refused(tokenizer):
    with pytest.raises(MmjaxError, match=r"length=9.*name three"):
        conversation_columns(tokenizer, [TALK], 9)


def test_a_template_that_changes_earlier_messages_is_refused(tokenizer):
    last = "{% for m in messages %}<s>{{ m.content if loop.last else 'forgotten' }}</s>{% endfor %}"
    changed = type(tokenizer)(tokenizer.tokenizer, tokenizer.special, {"default": last})
    with pytest.raises(MmjaxError, match="message 1 differently"):
        conversation_columns(changed, [TALK], 120)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ('{"text": "x"}', "messages"),
        ('{"messages": [{"role": "user"}]}', "content"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "it has no assistant message"),
    ],
)
def test_invalid_lines_are_named(tmp_path, line, message):
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n" + line + "\n")
    with pytest.raises(MmjaxError, match=rf"talks\.jsonl, line 2.*{message}|{message}"):
        read_conversations(file)
    file.write_text(json.dumps({"messages": TALK}) + "\n\n")
    assert read_conversations(file) == [TALK]
    file.write_text("\n")
    with pytest.raises(MmjaxError, match="no conversations"):
        read_conversations(file)
