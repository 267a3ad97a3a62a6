"""Training tokenizers: the learned vocabulary, that it depends on the texts alone, and the command line."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mmjax import cli
from mmjax.errors import MmjaxError
from mmjax.text.tokenizer import Tokenizer
from mmjax.text.training import KINDS, SPECIAL, corpus_files, train_tokenizer

WORDS = ("low", "lower", "lowest", "new", "newer", "newest", "wide", "wider", "widest")
WORDS += ("slow", "slowly", "slower", "show", "shower")


def corpus(n: int = 211) -> list[str]:
    rng = np.random.default_rng(7)
    lines = [" ".join(rng.choice(WORDS, 7)) for _ in range(n)]
    return [*lines, "Café Ünder, naïve! 日本語 1,024", "ﬁne  spaces   here"]


def learn(kind, vocab_size=331, special=()):
    if kind == "unigram":
        pytest.importorskip("sentencepiece")
    return train_tokenizer(iter(corpus()), kind, vocab_size, special)


PROGRAM = """
import hashlib, sys
from test_tokenizer_training import corpus
from mmjax.text.training import train_tokenizer
print(hashlib.sha256(train_tokenizer(corpus(), sys.argv[1], 331).tokenizer.to_str().encode()).hexdigest())
"""


@pytest.mark.parametrize("kind", KINDS)
def test_is_a_function_of_its_texts(kind, repository):
    """The result is the same in processes with another order of hash tables and another number of threads."""
    here = hashlib.sha256(learn(kind).tokenizer.to_str().encode()).hexdigest()
    paths = os.pathsep.join([os.fspath(repository), os.fspath(repository / "tests" / "text")])
    for seed in "12":
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        command = [sys.executable, "-c", PROGRAM, kind]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert child.stdout.strip() == here, child.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_come_first_and_are_never_cut(kind):
    tokenizer = learn(kind, special=["<image>", "<|im_end|>"])
    named = list(dict.fromkeys(SPECIAL[kind].values()))
    ids = [tokenizer.tokenizer.token_to_id(token) for token in [*named, "<image>", "<|im_end|>"]]
    assert ids == list(range(len(named) + 2))
    row = tokenizer("lower<image>newest<|im_end|>", add_special_tokens=False)[0][0].tolist()
    assert row.count(len(named)) == row.count(len(named) + 1) == 1
    assert tokenizer.vocab_size <= 331
    assert tokenizer.decode(tokenizer("slower newest wide")[0][0]) == "slower newest wide"


def test_word_piece():
    tokenizer = learn("wordpiece")
    vocabulary = tokenizer.tokenizer.get_vocab()
    assert {"low", "newest", "##er"} <= vocabulary.keys()
    row = tokenizer("CAFÉ lowest")[0][0]
    assert (row[0], row[-1]) == (vocabulary["[CLS]"], vocabulary["[SEP]"])
    assert tokenizer.decode(row) == "cafe lowest"
    assert tokenizer.unk in tokenizer("low ж low")[0][0]
    assert tokenizer.tokenizer.encode("日本", add_special_tokens=False).tokens == ["日", "本"]
    pair = tokenizer.tokenizer.encode("low", "new")
    assert pair.tokens == ["[CLS]", "low", "[SEP]", "new", "[SEP]"] and pair.type_ids == [0, 0, 0, 1, 1]
    # Symbols have the ids after the special tokens, those at the start of a word before the others.
    ordered = sorted(vocabulary, key=lambda token: vocabulary[token])[5:]
    symbols = [token for token in ordered if len(token.removeprefix("##")) == 1]
    assert ordered[: len(symbols)] == symbols and symbols == sorted(symbols, key=lambda s: (s.startswith("##"), s))


def test_word_piece_keeps_the_most_frequent_characters(monkeypatch):
    monkeypatch.setattr("mmjax.text.training.MAX_ALPHABET", 3)
    tokenizer = train_tokenizer(["ab ab ab ac ac ad"], "wordpiece", 23)
    assert tokenizer.tokenizer.encode("ab ac ad", add_special_tokens=False).tokens == ["ab", "ac", "[UNK]"]


def test_byte_bpe():
    tokenizer = learn("byte_bpe", 281)
    for text in (*corpus()[-2:], "🙂 ж \x00\n\ttab", ""):
        assert tokenizer.decode(tokenizer(text)[0][0]) == text
    merges = json.loads(tokenizer.tokenizer.to_str())["model"]["merges"]
    assert len(merges) == 281 - 256 - 2 and merges[0] == ["o", "w"]  # "ow" stands in 8 of the 14 words
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, (0,), 1)


def test_unigram_is_sentencepieces():
    spm = pytest.importorskip("sentencepiece")
    import io

    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=331, hard_vocab_limit=False, minloglevel=3
    )
    reference, tokenizer = spm.SentencePieceProcessor(model_proto=model.getvalue()), learn("unigram")
    for text in ("slower newest", "ﬁne  spaces ", "Café 日本語", "unseen: ж"):
        tokens = tokenizer.tokenizer.encode(text).tokens
        assert tokens[-1] == "</s>"
        known = [piece if reference.piece_to_id(piece) else "<unk>" for piece in reference.encode(text, out_type=str)]
        assert [tokenizer.tokenizer.id_to_token(id) for id in tokenizer(text)[0][0][:-1]] == known
    assert (tokenizer.pad, tokenizer.eos, tokenizer.unk) == (0, (1,), 2)


@pytest.mark.parametrize(
    "texts, kind, vocab_size, message",
    [
        (["a"], "bpe", 99, "kind='bpe': wordpiece, byte_bpe, unigram"),
        ([], "byte_bpe", 999, "no text"),
        ([" ", "\n"], "wordpiece", 999, "no text"),
        (["ab"], "byte_bpe", 257, "vocab_size=257: 2 special tokens and 256 single symbols"),
        (["ab"], "wordpiece", 6, "vocab_size=6: 5 special tokens and 3 single symbols"),
        (["ab cd"] * 9, "unigram", 5, "vocab_size=5: sentencepiece failed"),
    ],
)
def test_invalid_training_arguments_are_refused(texts, kind, vocab_size, message):
    if kind == "unigram":
        pytest.importorskip("sentencepiece")
    with pytest.raises(MmjaxError, match=message):
        train_tokenizer(texts, kind, vocab_size)


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_it(kind, tmp_path):
    transformers = pytest.importorskip("transformers")

    tokenizer = learn(kind, special=["<image>"])
    tokenizer.save(tmp_path / "tokenizer.json")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [*corpus()[-4:], "<image> lower"]
    expected = reference(texts, padding=True, return_tensors="np")
    ids, mask = tokenizer(texts)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    assert {name: str(token) for name, token in reference.special_tokens_map.items()} == dict(tokenizer.special)


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts" / "more").mkdir(parents=True)
    lines = corpus()
    (tmp_path / "texts" / "b.txt").write_text("\n".join(lines[:100]), "utf-8")
    (tmp_path / "texts" / "more" / "a.txt").write_text("\r\n\n".join(lines[100:]), "utf-8")
    (tmp_path / "texts" / "notes.md").write_text("not a corpus")
    return tmp_path / "texts"


@pytest.mark.parametrize("kind", KINDS)
def test_command_line(kind, folder, tmp_path, capsys):
    expected = learn(kind, special=["<image>"])
    out = os.fspath(tmp_path / "out" / "tokenizer.json")
    flags = ["--kind", kind, "--vocab_size", "331", "--out", out, "--special", "<image>"]
    assert cli.main(["tokenizer", "train", os.fspath(folder), *flags]) == 0
    written = Tokenizer.from_file(out)
    assert written.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    np.testing.assert_array_equal(written(corpus())[0], expected(corpus())[0])
    captured = capsys.readouterr()
    assert f"2 files -> {out}: {kind}, {expected.vocab_size} ids" in captured.out and not captured.err
    assert ("the texts have no more pieces" in captured.out) == (expected.vocab_size < 331)


def test_command_line_errors(folder, tmp_path, capsys):
    (tmp_path / "bad.txt").write_bytes(b"good\n\n\xff\n")
    (tmp_path / "empty").mkdir()
    for path, flags, message in [
        (tmp_path / "bad.txt", ["--kind", "byte_bpe"], "bad.txt:3: not UTF-8"),
        (tmp_path / "bad.txt", ["--kind", "wordpiece"], "bad.txt:3: not UTF-8"),
        (tmp_path / "empty", ["--kind", "wordpiece"], "empty: no .txt file in this folder"),
        (tmp_path / "nowhere", ["--kind", "wordpiece"], "nowhere: no such file or folder"),
        (folder, ["--kind", "wordpiece", "--out", "vocab.txt"], "--out vocab.txt"),
    ]:
        assert cli.main(["tokenizer", "train", os.fspath(path), "--vocab_size", "300", *flags]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert [file.name for file in corpus_files([folder, tmp_path / "bad.txt"])] == ["b.txt", "a.txt", "bad.txt"]


def test_a_bad_line_is_reported_with_sentencepiece_too(tmp_path, capsys):
    pytest.importorskip("sentencepiece")
    (tmp_path / "bad.txt").write_bytes(b"good\n\xff\n")
    flags = ["--kind", "unigram", "--vocab_size", "300"]
    assert cli.main(["tokenizer", "train", os.fspath(tmp_path / "bad.txt"), *flags]) == 2
    assert capsys.readouterr().err.startswith(f"mmjax tokenizer: {tmp_path / 'bad.txt'}:2: not UTF-8")
