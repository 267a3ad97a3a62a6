"""Byte-level BPE from GGUF metadata: how each pre-tokenizer cuts, special tokens, templates, errors."""

import json

import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers, trainers

from mmjax.errors import MmjaxError
from mmjax.text.gguf_tokenizer import tokenizer_from_gguf

TEXT = "We'LL pay 1,2345 for  cafés\r\n\n  now!! "


@pytest.fixture(scope="module")
def metadata():
    """Tokens and merges of a tiny byte BPE, a control token and one that a user defined."""
    learner = Inner(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=331, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(["we'll pay 12345 for cafés now, he'll pay 1234 now"] * 2, trainer)
    model = json.loads(learner.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<|end|>", "<image>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    }


@pytest.mark.parametrize(
    "name, pieces",
    [
        ("gpt-2", "We|'|LL| pay| 1|,|2345| for| | cafés|\r\n\n | now|!!| "),
        ("smollm", "We|'|LL| pay| |1|,|2|3|4|5| for| | cafés|\r\n\n | now|!!| "),
        ("qwen2", "We|'LL| pay| |1|,|2|3|4|5| for| | cafés|\r\n\n| | now|!!| "),
        ("llama-bpe", "We|'LL| pay| |1|,|234|5| for| | cafés|\r\n\n| | now|!!| "),
    ],
)
def test_pre_tokenizers(metadata, name, pieces):
    tokenizer = tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": name})
    cut = tokenizer.tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert "|".join(TEXT[start:end] for _, (start, end) in cut) == pieces
    assert tokenizer.decode(tokenizer(TEXT)[0][0]) == TEXT


def test_special_tokens_and_templates(metadata):
    more = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.eot_token_id": 6}
    more |= {
        "tokenizer.chat_template": "one",
        "tokenizer.chat_templates": ["rag"],
        "tokenizer.chat_template.rag": "two",
    }
    tokenizer = tokenizer_from_gguf(metadata | more)
    end = len(metadata["tokenizer.ggml.tokens"]) - 2
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk) == (5, (end, 6), end, None)
    ids = tokenizer("now<image><|end|>")[0][0]
    assert ids[0] == 5 and ids[-2:].tolist() == [end + 1, end]
    assert tokenizer.decode(ids[1:]) == "now<image>", "a control token is skipped, a user's is text"
    assert tokenizer.chat([]) == "one" and tokenizer.chat([], template="rag") == "two"


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("pre", "deepseek-coder", "tokenizer.ggml.pre is 'deepseek-coder'"),
        ("merges", ["a b c"], "is not a pair"),
        ("merges", ["zz yy"], "its merges do not fit its tokens"),
        ("merges", [1], "should be an array of texts"),
        ("merges", None, "tokenizer.ggml.merges should be an array"),
        ("model", None, "tokenizer.ggml.model is None"),
        ("eos_token_id", -1, "eos_token_id is -1, of"),
        ("tokens", ["a", "a"], "2 tokens, 1 different ones"),
    ],
)
def test_invalid_metadata_are_refused(metadata, key, value, message):
    with pytest.raises(MmjaxError, match=rf"x\.gguf: .*{message}"):
        tokenizer_from_gguf(metadata | {f"tokenizer.ggml.{key}": value}, "x.gguf")


@pytest.mark.torch
def test_qwen2_is_cut_as_transformers_cuts_it(metadata):
    transformers = pytest.importorskip("transformers")

    vocab = {token: id for id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    reference = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer = tokenizer_from_gguf(metadata)
    for text in (TEXT, "cafe\u0301 ½ ٣٤ 12\n\n\n3  \t x", "日本語。I'm HE'S\u00a0\u00a0a"):
        assert tokenizer(text)[0][0].tolist() == reference(text)["input_ids"]
