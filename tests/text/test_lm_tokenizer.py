"""Tokenizers of language models: ids, padding, files and chat templates, by hand and against transformers."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from mmjax.errors import MmjaxError
from mmjax.text.tokenizer import Tokenizer

TEXTS = ["Hello there, it's 2024!", "", "naïve café  — 日本語 🙂\n\ttabs", "<s>inside</s> <|im_start|>user", " a"]
CHATML = """{%- if tools %}
    {{- raise_exception('no tools here') }}
{%- endif %}
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
        {{- bos_token + '<|im_start|>system\nBe brief.<|im_end|>\n' }}
    {% endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {% generation %}
    {{- message.content if message.content is string else message.content | tojson(indent=2) }}
    {% endgeneration %}
    {{- '<|im_end|>' + '\n' -}}
    {% if message.extra is defined %}{{ message.extra | tojson }}{% continue %}{% endif %}
{% endfor %}
{%- set ns = namespace(x=1) %}
{% for i in range(3) %}{% set ns.x = ns.x + i %}{% if i == 1 %}{% break %}{% endif %}{% endfor %}
{{ ns.x }}{{ eos_token }}{{ wish | default('none') }}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
TALK = [
    {"role": "user", "content": 'Say <b>é</b> & "hi"', "extra": {"a": [1, None, "ü<"]}, "tool_calls": None},
    {"role": "assistant", "content": [{"type": "text", "text": "hi"}, {"type": "image", "image": np.zeros(3)}]},
]


def byte_bpe(special=("<s>", "</s>", "<pad>"), bos=True) -> tokenizers.Tokenizer:
    """101 merges over bytes, special tokens last; LLaMA's <s> in front."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + 101, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(["there is a cafe on the user's assistant, hello hello"] * 3, trainer)
    learner.add_special_tokens([AddedToken(token, special=True) for token in special])
    learner.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    if bos:
        tokens = [("<s>", learner.token_to_id("<s>"))]
        learner.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=tokens)
    return learner


@pytest.fixture
def tokenizer():
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    inner = byte_bpe()
    end = inner.token_to_id("<|im_end|>")
    return Tokenizer(inner, special, {"default": CHATML, "rag": "{{ documents[0].text }}"}, (end, 258))


def test_pads_on_either_side(tokenizer):
    ids, mask = tokenizer(TEXTS)
    assert ids.dtype == mask.dtype == np.int32 and ids.shape == mask.shape
    left, left_mask = tokenizer(TEXTS, padding_side="left")
    for row, row_mask, other, other_mask in zip(ids, mask, left, left_mask):
        n = row_mask.sum()
        assert row[0] == tokenizer.bos and (row[n:] == tokenizer.pad).all() and not row_mask[n:].any()
        np.testing.assert_array_equal(other[-n:], row[:n])
        assert other_mask[-n:].all() and not other_mask[:-n].any()
        assert tokenizer.decode(row) == tokenizer.decode(other)
    assert mask.sum(1).max() == ids.shape[1]
    one, _ = tokenizer("Hello", add_special_tokens=False)
    assert one[0, 0] != tokenizer.bos and tokenizer.decode(one[0]) == "Hello"
    assert tokenizer([])[0].shape == (0, 0)


def test_lengths_and_buckets(tokenizer):
    assert tokenizer(["a"], length=13)[0].shape == (1, 13)
    for buckets, expected in (((7, 3, 29), 3), ((29, 5), 5), ((1, 2), 2)):
        assert tokenizer("a", length=buckets)[0].shape == (1, expected)
    with pytest.raises(MmjaxError, match=r"length=3: a text of \d+ ids does not fit: 'naïve"):
        tokenizer(TEXTS, length=3)
    cut, mask = tokenizer(TEXTS, length=(2, 3), truncate=True)
    whole, _ = tokenizer(TEXTS)
    assert cut.shape == (5, 3)
    for row, row_mask, long in zip(cut, mask, whole):
        np.testing.assert_array_equal(row[row_mask == 1], long[: row_mask.sum()])
    with pytest.raises(MmjaxError, match="not even the special tokens fit"):
        tokenizer("a", length=0, truncate=True)


def test_ids_of_special_tokens(tokenizer):
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk) == (
        tokenizer.tokenizer.token_to_id("<s>"),
        (tokenizer.tokenizer.token_to_id("<|im_end|>"), 258),
        tokenizer.tokenizer.token_to_id("<pad>"),
        None,
    )
    bare = Tokenizer(byte_bpe())
    assert (bare.bos, bare.eos, bare.pad) == (None, (), None)
    with pytest.raises(MmjaxError, match="neither a pad nor an eos token"):
        bare(["a", "hello hello a"])
    assert Tokenizer(byte_bpe(), {"eos_token": "</s>"}).pad == bare.tokenizer.token_to_id("</s>")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: t(["a", 3]), "strings, not int: 3"),
        (lambda t: t("a", padding_side="middle"), "padding_side='middle'"),
        (lambda t: t.decode([1, -100]), "-100 is not an id"),
        (lambda t: t.chat(TALK, template="tool"), "no chat template 'tool': there are default, rag"),
        (lambda t: t.chat(TALK, tools=[{"name": "f"}]), "the chat template fails: TemplateError: no tools here"),
        (lambda t: t.chat(["hi"]), "messages: each is a dictionary"),
        (lambda t: t.chat([{"content": "no role"}]), "'dict object' has no attribute 'role'"),
        (lambda t: Tokenizer(byte_bpe()).chat(TALK), "no chat template at all"),
        (lambda t: Tokenizer(byte_bpe(), {"bos_token": "<bos>"}), "bos_token is '<bos>', which is not in"),
        (lambda t: Tokenizer(byte_bpe(), {}, {"default": "{% if %}"}).chat(TALK), "TemplateSyntaxError"),
        (lambda t: Tokenizer(byte_bpe(), {}, {"default": "{{ 1 / 0 }}"}).chat(TALK), "ZeroDivisionError"),
        (
            lambda t: Tokenizer(byte_bpe(), {}, {"default": "{{ ''.__class__.mro() }}"}).chat(TALK),
            "SecurityError",
        ),
        (lambda t: Tokenizer(byte_bpe(), {}, {"default": "{{ messages.append(1) }}"}).chat(TALK), "SecurityError"),
    ],
)
def test_bad_input_is_one_clear_error(tokenizer, call, message):
    with pytest.raises(MmjaxError, match=message.replace("(", r"\(")):
        call(tokenizer)


def test_a_saved_tokenizer_comes_back(tokenizer, tmp_path):
    file = tmp_path / "model" / "tokenizer.json"
    file.parent.mkdir()
    (file.parent / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 1}')
    # Files left by another tokenizer have no effect.
    (file.parent / "chat_template.jinja").write_text("old")
    (file.parent / "special_tokens_map.json").write_text('{"bos_token": "</s>"}')
    tokenizer.save(file)
    again = Tokenizer.from_file(file)
    assert (again.special, again.templates, again.eos) == (tokenizer.special, tokenizer.templates, tokenizer.eos)
    np.testing.assert_array_equal(again(TEXTS)[0], tokenizer(TEXTS)[0])
    assert again.chat(TALK) == tokenizer.chat(TALK)
    assert json.loads((file.parent / "generation_config.json").read_text())["temperature"] == 0.6


def test_reads_files_beside(tmp_path):
    """The older files of the hub: tokens as objects, eos in generation_config, templates in files of their own."""
    byte_bpe().save(str(tmp_path / "tokenizer.json"))
    bare = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert (bare.special, bare.templates, bare.eos) == ({}, {}, ())
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<s>", "lstrip": False}, "unk_token": "<unk>"})
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "chat_template": [{"name": "default", "template": "first"}]})
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with {{ tools | length }}")
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert loaded.special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert loaded.unk == bare.vocab_size == loaded.vocab_size - 1, "a token that the vocabulary lacked was added"
    assert loaded.eos == (7, 5)
    assert loaded.chat([]) == "first" and loaded.chat([], tools=[1, 2]) == "with 2"
    (tmp_path / "chat_template.jinja").write_text("second")
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").chat([]) == "second"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", "{", "tokenizer.json: not a tokenizer.json"),
        ("tokenizer_config.json", "[1", "tokenizer_config.json: its JSON cannot be read"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json: its JSON should be an object"),
        ("tokenizer_config.json", '{"bos_token": 3}', "a special token is neither a string"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"chat_template": [{"name": 1}]}', "is not text"),
        ("generation_config.json", '{"eos_token_id": "x"}', "generation_config.json: eos_token_id"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    byte_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MmjaxError, match=message):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    with pytest.raises(MmjaxError, match="no such file"):
        Tokenizer.from_file(tmp_path / "nowhere.json")


def write_vocab(folder, **config):
    """GPT-2's two files, with OPT's special tokens in the vocabulary."""
    model = json.loads(byte_bpe(bos=False).to_str())["model"]
    vocab = model["vocab"] | {"</s>": 357, "<pad>": 358}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_vocab_and_merges(tmp_path):
    write_vocab(tmp_path, bos_token="</s>", eos_token="</s>", pad_token="<pad>", add_bos_token=True)
    opt = Tokenizer.from_vocab(tmp_path / "vocab.json", tmp_path / "merges.txt")
    ids, mask = opt(TEXTS)
    assert (ids[:, 0] == 357).all() and (opt.bos, opt.eos, opt.pad) == (357, (357,), 358)
    plain = byte_bpe(special=(), bos=False)
    for text, row, row_mask in zip(TEXTS[:3], ids, mask):
        assert row[row_mask == 1][1:].tolist() == plain.encode(text).ids
        assert opt.decode(row) == text
    (tmp_path / "merges.txt").write_text("a b c d\n")
    with pytest.raises(MmjaxError, match=r"vocab.json, .*merges.txt: not the vocabulary and merges"):
        Tokenizer.from_vocab(tmp_path / "vocab.json", tmp_path / "merges.txt")


# ------------------------------------------------------------------------------------------------- against transformers


def same_as_transformers(tokenizer: Tokenizer, reference) -> None:
    for side in ("left", "right"):
        for special in (True, False):
            expected = reference(
                TEXTS, padding=True, padding_side=side, add_special_tokens=special, return_tensors="np"
            )
            ids, mask = tokenizer(TEXTS, side, add_special_tokens=special)
            np.testing.assert_array_equal(ids, expected["input_ids"])
            np.testing.assert_array_equal(mask, expected["attention_mask"])
    for skip in (True, False):
        assert [tokenizer.decode(row, skip) for row in ids] == reference.batch_decode(ids, skip_special_tokens=skip)
    assert (tokenizer.bos, tokenizer.pad, tokenizer.unk) == (
        reference.bos_token_id,
        reference.pad_token_id,
        reference.unk_token_id,
    )
    assert tokenizer.vocab_size == len(reference)


@pytest.mark.torch
def test_transformers_reads_what_we_save(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")

    tokenizer.save(tmp_path / "tokenizer.json")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    same_as_transformers(tokenizer, reference)
    for prompt in (True, False):
        expected = reference.apply_chat_template(TALK, tokenize=False, add_generation_prompt=prompt, wish="a bone")
        assert tokenizer.chat(TALK, prompt, wish="a bone") == expected
    documents = [{"title": "t", "text": "body"}]
    assert tokenizer.chat(TALK, template="rag", documents=documents) == "body"
    assert reference.apply_chat_template(TALK, chat_template="rag", documents=documents, tokenize=False) == "body"
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == list(tokenizer.eos)


@pytest.mark.torch
@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "there"},
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "add_bos_token": True, "add_eos_token": True},
        {"bos_token": "<s>", "pad_token": "<pad>", "add_bos_token": False},
        {
            "bos_token": "</s>",
            "pad_token": "<pad>",
            "added_tokens_decoder": {
                "363": {"content": "<b>", "special": False, "lstrip": True, "normalized": True},
                "362": {"content": "inside", "special": True},
            },
        },
    ],
)
def test_reads_what_transformers_reads(tmp_path, config):
    transformers = pytest.importorskip("transformers")

    byte_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    same_as_transformers(tokenizer, reference)
    assert tokenizer.chat(TALK) == reference.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)


@pytest.mark.torch
@pytest.mark.parametrize("add_bos", [True, False])
def test_reads_vocab_and_merges_as_transformers_does(tmp_path, add_bos):
    transformers = pytest.importorskip("transformers")

    named = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    write_vocab(tmp_path, tokenizer_class="GPT2Tokenizer", add_bos_token=add_bos, **named)
    tokenizer = Tokenizer.from_vocab(tmp_path / "vocab.json", tmp_path / "merges.txt")
    same_as_transformers(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path))
