"""SentencePiece's models through `tokenizers`: the ids of the sentencepiece library itself."""

import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.text.gguf_tokenizer import tokenizer_from_gguf
from mmjax.text.stop_strings import token_bytes
from mmjax.text.tokenizer import Tokenizer

spm = pytest.importorskip("sentencepiece")

CORPUS = [
    "the quick brown fox jumps over the lazy dog and the other foxes jumped over it",
    "a language model reads tokens, not letters: café, naïve, 日本語, and 1,024 numbers",
    "she sells sea shells by the sea shore; the shells she sells are sea shells",
    "to be or not to be, that is the question whether it is nobler in the mind to suffer",
]
TEXTS = [
    "the foxes sell shells",
    " two  spaces   here ",
    "",
    "café 日本 🙂 tab\tend\nline",
    "ﬁ ligature Ａ wide",
    "to be, that is 1,024!",
]


def train(folder, kind: str, **options) -> str:
    """A tiny model file; LLaMA's options for a BPE, T5's for a Unigram."""
    prefix = str(folder / kind)
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_prefix=prefix, model_type=kind, minloglevel=2, **options
    )
    return prefix + ".model"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    options = {"vocab_size": 391, "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"remove_extra_whitespaces": False, "split_digits": True, "user_defined_symbols": ["<image>"]}
    return train(tmp_path_factory.mktemp("bpe"), "bpe", **options)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    options = {"vocab_size": 131, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False}
    return train(tmp_path_factory.mktemp("unigram"), "unigram", **options)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_ids_are_sentencepieces(kind, request):
    file = request.getfixturevalue(kind)
    reference, tokenizer = spm.SentencePieceProcessor(model_file=file), Tokenizer.from_sentencepiece(file)
    assert tokenizer.vocab_size == reference.vocab_size()
    for text in TEXTS:
        expected = reference.encode(text)
        ids = tokenizer(text, add_special_tokens=False)[0][0].tolist()
        assert ids == expected, text
        whole = tokenizer(text)[0][0].tolist()
        assert whole == ([1, *expected] if kind == "llama" else [*expected, 1])
        decoded = reference.decode(expected).replace(" ⁇ ", "<unk>")
        assert tokenizer.decode(ids, skip_special_tokens=False) == decoded, text


def test_special_tokens(llama, t5):
    first, second = Tokenizer.from_sentencepiece(llama), Tokenizer.from_sentencepiece(t5)
    assert (first.bos, first.eos, first.unk, first.pad) == (1, (2,), 0, 2)
    assert (second.bos, second.eos, second.unk, second.pad) == (None, (1,), 2, 0)
    ids = first("a <image> b", add_special_tokens=False)[0][0]
    assert ids.tolist().count(first.tokenizer.token_to_id("<image>")) == 1
    assert "".join(part.decode() for part in (token_bytes(first.tokenizer)[id] for id in ids)) == " a <image>  b"


def test_saved_as_tokenizer_json_it_is_the_same(llama, tmp_path):
    tokenizer = Tokenizer.from_sentencepiece(llama)
    tokenizer.save(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(Tokenizer.from_file(tmp_path / "tokenizer.json")(TEXTS)[0], tokenizer(TEXTS)[0])


def test_the_same_pieces_in_a_gguf_file(llama):
    reference = spm.SentencePieceProcessor(model_file=llama)
    ids = range(reference.vocab_size())
    kinds = [(reference.is_unknown(i), reference.is_control(i), reference.is_byte(i)) for i in ids]
    types = [2 if unknown else 3 if control else 6 if byte else 1 for unknown, control, byte in kinds]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([reference.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 7,
    }
    tokenizer = tokenizer_from_gguf(metadata)
    for text in TEXTS:
        assert tokenizer(text)[0][0].tolist() == [1, *reference.encode(text)]
    assert (tokenizer.bos, tokenizer.eos) == (1, (2, 7))
    for key, value, message in [
        ("scores", [1.0], "391 tokens, 1 scores"),
        ("bos_token_id", 391, "bos_token_id is 391, of 391 tokens"),
        ("token_type", [1], "391 tokens, 391 different ones, 1 types"),
        ("model", "rwkv", "tokenizer.ggml.model is 'rwkv'"),
        ("tokens", None, "tokenizer.ggml.tokens should be an array"),
    ]:
        with pytest.raises(MmjaxError, match=f"x.gguf: .*{message}"):
            tokenizer_from_gguf(metadata | {f"tokenizer.ggml.{key}": value}, "x.gguf")


def test_invalid_models_are_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0b\xff\xff no proto")
    with pytest.raises(MmjaxError, match=r"tokenizer\.model: not a SentencePiece model"):
        Tokenizer.from_sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(MmjaxError, match=r"tokenizer\.model: not a SentencePiece model: it has no pieces"):
        Tokenizer.from_sentencepiece(tmp_path / "tokenizer.model")
    with pytest.raises(MmjaxError, match="no such file"):
        Tokenizer.from_sentencepiece(tmp_path / "spiece.model")
