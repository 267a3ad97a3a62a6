"""WordPiece: the rules of Google's tokenizer, pairs, cutting, files, training."""

import json

import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.text.training import train_wordpiece
from mmjax.text.wordpiece import SPECIAL, WordPieceTokenizer, cut

PIECES = ("un", "##aff", "##able", "hen", "##s", "red", ",", "cafe", "中", "文", "a", "##b", ".", "'", "naive", "hello")


def vocab(tmp_path, pieces=PIECES, name="vocab.txt"):
    file = tmp_path / name
    file.write_text("\n".join((*SPECIAL, *pieces)) + "\n", encoding="utf-8")
    return file


def names(tokenizer, text):
    return [tokenizer.tokenizer.id_to_token(id) for id in tokenizer.pieces([text])[0]]


def test_the_rules_of_the_original(tmp_path):
    tokenizer = WordPieceTokenizer.from_vocab(vocab(tmp_path))
    cases = {
        "UNaffable hens": ["un", "##aff", "##able", "hen", "##s"],
        "Café,naïve": ["cafe", ",", "naive"],
        "red\u0000\ufffd\u200b\thens\u00a0a": ["red", "hen", "##s", "a"],
        "中文ab": ["中", "文", "a", "##b"],
        "hello." + "a" * 101 + " a": ["hello", ".", "[UNK]", "a"],
        "unaffablez": ["[UNK]"],
        "a [MASK] hen": ["a", "[MASK]", "hen"],
    }
    assert {text: names(tokenizer, text) for text in cases} == cases


def test_case_follows_the_vocabulary_or_the_config(tmp_path):
    cased = vocab(tmp_path, ("Red", "red", "é"))
    assert names(WordPieceTokenizer.from_vocab(cased), "Red é") == ["Red", "é"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    assert names(WordPieceTokenizer.from_vocab(cased), "Red") == ["red"]
    assert names(WordPieceTokenizer.from_vocab(cased, lower=False), "Red") == ["Red"]


def test_pairs_padding_and_lengths(tmp_path):
    tokenizer = WordPieceTokenizer.from_vocab(vocab(tmp_path))
    pad, cls, sep = tokenizer.pad, tokenizer.cls, tokenizer.sep
    a, b, hen, red = (tokenizer.tokenizer.token_to_id(name) for name in ("a", "##b", "hen", "red"))
    batch = tokenizer(["ab", "hen"], ["red red", "a"], multiple=5)
    np.testing.assert_array_equal(
        batch["input_ids"],
        [[cls, a, b, sep, red, red, sep, pad, pad, pad], [cls, hen, sep, a, sep, pad, pad, pad, pad, pad]],
    )
    np.testing.assert_array_equal(batch["token_type_ids"][0], [0, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(batch["attention_mask"].sum(1), [7, 5])
    assert tokenizer(["a a a a a"], length=4, multiple=16)["input_ids"].tolist() == [[cls, a, a, sep]]
    assert tokenizer.continuations().nonzero()[0].tolist() == [6, 7, 9, 16]
    for arguments, message in (((["a"], ["b", "a"]), "texts: 1, pairs: 2"), (([3],), "takes strings, not int")):
        with pytest.raises(MmjaxError, match=message):
            tokenizer(*arguments)
    with pytest.raises(MmjaxError, match="length=2: too short"):
        tokenizer("a", length=2)


def test_truncation_matches_the_original_loop():
    rng = np.random.default_rng(5)
    for _ in range(200):
        m, n, capacity = (int(x) for x in rng.integers(0, 14, 3))
        a, b = list(range(m)), list(range(n))
        truncated = cut(list(a), list(b), capacity)
        while len(a) + len(b) > capacity:
            (a if len(a) > len(b) else b).pop()
        assert truncated == (a, b)


def test_files_survive_and_bad_ones_are_named(tmp_path):
    tokenizer = WordPieceTokenizer.from_vocab(vocab(tmp_path))
    tokenizer.save(tmp_path / "tokenizer.json")
    again = WordPieceTokenizer.from_file(tmp_path / "tokenizer.json")
    text = "Unaffable hens, café"
    assert again.pieces([text]) == tokenizer.pieces([text])
    assert again.decode(again([text])["input_ids"][0]) == "unaffable hens, cafe"
    with pytest.raises(MmjaxError, match=r"twice\.txt: the piece 'red' occurs twice"):
        WordPieceTokenizer.from_vocab(vocab(tmp_path, ("red", "a", "red"), "twice.txt"))
    (tmp_path / "bare.txt").write_text("[PAD]\n[UNK]\na\n")
    with pytest.raises(MmjaxError, match=r"bare\.txt: .*lacks \[CLS\], \[SEP\], \[MASK\]"):
        WordPieceTokenizer.from_vocab(tmp_path / "bare.txt")
    with pytest.raises(MmjaxError, match=r"absent\.json: no such file"):
        WordPieceTokenizer.from_file(tmp_path / "absent.json")


def test_training_is_repeatable_and_covers_its_letters():
    texts = ["the red hens and the hen", "two hens redder than hens", "reddish thing"] * 3
    one, two = (train_wordpiece(texts, 41) for _ in range(2))
    assert one.tokenizer.to_str() == two.tokenizer.to_str()
    assert one.vocab_size == 41 and [one.pad, one.unknown, one.cls, one.sep, one.mask] == [0, 1, 2, 3, 4]
    assert all(one.unknown not in ids for ids in one.pieces(texts))
    assert "hen" in one.tokenizer.get_vocab() and names(one, "zebra") == ["[UNK]"]
    with pytest.raises(MmjaxError, match="5 special tokens"):
        train_wordpiece(texts, 5)


NASTY = [
    "Ünïcödé façade — “quotes” … don't",
    "東京は日本の首都です。한국어 텍스트",
    "İstanbul ǅ ﬁne ①²½",
    "tab\tnew\nline\r\u2028sep\u00adsoft\u200djoin\ue000",
    "a.b,c!d?e;f:g(h)[i]{j}<k>@l#m$n%o^p&q*r-s_t=u+v|w\\x/y~z`",
    "𝔘𝔫𝔦 😀 emoji 👩‍🚀",
]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lower", [True, False])
def test_transformers_cuts_the_same_pieces(tmp_path, lower):
    legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    letters = sorted({c for text in NASTY for c in text.lower() + text if not c.isspace()} | set("abcdefghijklm"))
    file = vocab(tmp_path, (*letters, *(f"##{c}" for c in letters), "##oco", "quotes", "##line"))
    reference = legacy.BertTokenizerLegacy(str(file), do_lower_case=lower)
    tokenizer = WordPieceTokenizer.from_vocab(file, lower=lower)
    for text in NASTY:
        assert names(tokenizer, text) == reference.tokenize(text), text
