"""CLIP's tokenizer: ids by hand, the public vocabulary against open_clip and transformers, training, files."""

import importlib.util
import json
import pathlib
import random
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
from parity.wheels import CACHE, wheel

from mmjax.errors import MmjaxError
from mmjax.text import clip_tokenizer
from mmjax.text.batches import list_of_strings
from mmjax.text.clip_tokenizer import CLIPTokenizer, byte_symbols, clean, train_clip_tokenizer

CAPTIONS = [f"a {size} {kind} on a {place}" for size in ("big", "small") for kind in ("cat", "dog", "bird")
            for place in ("mat", "map", "roof")]  # fmt: skip

TEXTS = [
    "a photo of a cat",
    "",
    "   ",
    "  Hello,   WORLD!!! it's 1234 o'clock\n\t&amp;amp;lt; cafe\u0301 naïve",
    "İstanbul ΣΑΣ ß ſ 'ſ KELVIN \u212a ²½Ⅷ٣४",
    "日本語のテキスト 😀👩‍👩‍👧‍👦 🏳️‍🌈 ಠ_ಠ हिन्दी ภาษาไทย العربية",
    "don't we'll I'VE I'M they're he'd 'tis ''s !'s a_b-c/d\\e|f",
    "x" * 200,
    "word " * 100,
    "\x00\x01\x1c\x85\xa0a \u200bzero\u200dwidth",
    "<b>html</b> &eacute; &#39; &lt;3 don’t “quote” ﬁre ＦＵＬＬ　ＷＩＤＴＨ",
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(23)
    ranges = [(32, 127), (160, 400), (0x370, 0x400), (0x900, 0x980), (0x3040, 0x30FF), (0x1F600, 0x1F640)]
    letters = [chr(code) for begin, end in ranges for code in range(begin, end)]
    ascii_letters = letters[:95]
    return [
        "".join(rng.choice(letters if rng.random() < 0.4 else ascii_letters) for _ in range(rng.randrange(1, 40)))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def open_clip() -> pathlib.Path:
    """The folder of open_clip's tokenizer and merges, out of its wheel."""
    folder = CACHE / "open_clip_files"
    if not (folder / "open_clip" / "tokenizer.py").is_file():
        with zipfile.ZipFile(wheel("open-clip-torch", "3.3.0")) as archive:
            for name in ("tokenizer.py", "bpe_simple_vocab_16e6.txt.gz"):
                archive.extract(f"open_clip/{name}", folder)
    return folder / "open_clip"


@pytest.fixture(scope="module")
def public(open_clip) -> CLIPTokenizer:
    return CLIPTokenizer.from_merges(open_clip / "bpe_simple_vocab_16e6.txt.gz")


@pytest.fixture(scope="module")
def small() -> CLIPTokenizer:
    return train_clip_tokenizer(CAPTIONS, 527, 13)


# ------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("text", ["a \ud83d cat", 3])
def test_what_is_no_text_is_named(text):
    with pytest.raises(MmjaxError, match="lone surrogate" if isinstance(text, str) else "not int: 3"):
        list_of_strings(["a cat", text])


def test_byte_symbols_are_gpt2s():
    table = byte_symbols()
    assert len(set(table.values())) == 256
    assert [table[byte] for byte in (33, 126, 161, 255, 0, 32, 173)] == ["!", "~", "¡", "ÿ", "Ā", "Ġ", "Ń"]
    assert list(table)[:3] == [33, 34, 35]
    assert list(table)[188:] == [*range(33), *range(127, 161), 173]


def test_merges_by_hand(tmp_path):
    file = tmp_path / "merges.txt"
    file.write_text("#version\n" + "a b\nab c</w>\nc d\n")
    tokenizer = CLIPTokenizer.from_merges(file, 7)
    first = 512
    start, end = first + 3, first + 4
    a, end_b, end_d = (list(byte_symbols().values()).index(letter) for letter in "abd")
    # "abc" takes merge 0, then 1; "cd" ends in d</w>, which merge 2 does not join.
    expected = [
        [start, first + 1, end, 0, 0, 0, 0],
        [start, first, end_b + 256, end, 0, 0, 0],
        [start, list(byte_symbols().values()).index("c"), end_d + 256, end, 0, 0, 0],
        [start, first + 1, first + 1, a + 256, first + 1, first + 1, end],  # the last "abc" is cut
        [start, end, 0, 0, 0, 0, 0],
    ]
    ids = tokenizer(["abc", "abb", " CD ", "ABC abc a abc &#97;bc abc", ""])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, expected)
    assert tokenizer.vocab_size == 517
    assert (tokenizer.start, tokenizer.end, tokenizer.pad) == (start, end, 0)
    with pytest.raises(MmjaxError, match="longer than context_length=7"):
        tokenizer(["abc", "abc abc a abc abc abc"], truncate=False)
    np.testing.assert_array_equal(tokenizer(["abc abc a abc abc"], truncate=False), expected[3:4])


def test_cleaning(monkeypatch):
    monkeypatch.setattr(clip_tokenizer, "_ftfy", None)
    assert clean("  A\u00a0 &amp;lt;b&amp;gt;\t“it’s”\n") == 'a <b> "it\'s"'
    assert clean("ﬁx ＦＵＬＬ cafe\u0301") == "fix full café"
    monkeypatch.setattr(clip_tokenizer, "_ftfy", lambda text: text + " Mended")
    assert clean("X") == "x mended"


def test_decoding_undoes_encoding(small):
    bytewise = train_clip_tokenizer([], 514, 50)
    for text in ("a big cat", "unseen zebra 42", "é😀 ok", "it's"):
        assert bytewise.decode(bytewise(text)[0]).replace(" ", "") == text.replace(" ", "")
    assert small.decode(small("a big cat")[0]) == "a big cat"
    assert small.decode([small.start, byte_index(0xE9), small.end, 5, 5]) == "\ufffd"
    with pytest.raises(MmjaxError, match="outside the vocabulary of 527"):
        small.decode([9999])


def byte_index(byte: int) -> int:
    return list(byte_symbols()).index(byte)


# ------------------------------------------------------------------------------------------------------------ training


def test_training_merges_the_most_frequent_pair_first(small):
    assert small.vocab_size == 527
    model = json.loads(small.tokenizer.to_str())["model"]
    # m a: 6 times in "mat", 6 in "map", 9 in "small"; the next, o n</w>, 18 times.
    assert model["merges"][:2] == [["m", "a"], ["o", "n</w>"]]
    assert (model["vocab"]["ma"], model["vocab"]["on</w>"]) == (512, 513)
    assert small(["a big cat on a mat"]).tolist()[0][-1] == 0


def test_training_is_a_function_of_its_texts(small, tmp_path):
    """In another process too: nothing depends on the order of a hash table."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_clip_tokenizer as t;"
        "t.train_clip_tokenizer(t.CAPTIONS, 527, 13).save(sys.argv[2])"
    )
    folder = pathlib.Path(__file__).parent
    path = f"import sys; sys.path.insert(0, {str(folder.parent)!r});"
    command = [sys.executable, "-c", path + script, str(folder), str(tmp_path / "again.json")]
    subprocess.run(command, check=True, timeout=120)
    small.save(tmp_path / "first.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "first.json").read_bytes()


def test_no_text_is_unknown(small):
    texts = ["Ω😀\x00", *random_texts(50)]
    ids = small(texts)
    assert all(small.end not in row[1 : list(row).index(small.end)] for row in ids)
    assert (ids[:, 0] == small.start).all() and (ids == small.end).sum() == len(texts)
    assert small.end == ids.max() == small.vocab_size - 1


def test_training_stops_where_pairs_run_out():
    assert train_clip_tokenizer(["ab"], 600, 5).vocab_size == 515
    assert train_clip_tokenizer([], 600, 5).vocab_size == 514
    with pytest.raises(MmjaxError, match="vocab_size=513"):
        train_clip_tokenizer(["ab"], 513)


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("padding", ["zero", "end"])
def test_a_saved_tokenizer_comes_back(tmp_path, small, padding):
    tokenizer = CLIPTokenizer(type(small.tokenizer).from_str(small.tokenizer.to_str()), 11, padding)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = CLIPTokenizer.from_file(tmp_path / "tokenizer.json")
    assert (again.context_length, again.padding, again.pad) == (11, padding, 0 if padding == "zero" else small.end)
    np.testing.assert_array_equal(again(CAPTIONS), tokenizer(CAPTIONS))
    assert again("&amp;")[0, 1:3].tolist() != again("& ")[0, 1:3].tolist() or padding == "zero"


def test_bad_files_are_named(tmp_path):
    broken, other = tmp_path / "broken.json", tmp_path / "other.json"
    broken.write_text("{")
    other.write_text(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
    )
    bad_merges = tmp_path / "merges.txt"
    bad_merges.write_text("header\na b c\n")
    not_gzip = tmp_path / "merges.txt.gz"
    not_gzip.write_bytes(b"a b\n")
    for call, message in (
        (lambda: CLIPTokenizer.from_file(broken), r"broken\.json: not a tokenizer\.json"),
        (lambda: CLIPTokenizer.from_file(other), r"other\.json: not a CLIP tokenizer"),
        (lambda: CLIPTokenizer.from_file(tmp_path / "none.json"), r"none\.json: no such file"),
        (lambda: CLIPTokenizer.from_merges(bad_merges), r"merges\.txt: merge 0"),
        (lambda: CLIPTokenizer.from_merges(not_gzip), r"merges\.txt\.gz: not a merges file"),
        (lambda: CLIPTokenizer.from_vocab(tmp_path / "vocab.json", bad_merges), r"vocab\.json"),
    ):
        with pytest.raises(MmjaxError, match=message):
            call()


def test_invalid_arguments_are_refused(small):
    with pytest.raises(MmjaxError, match="takes strings, not bytes"):
        small([b"cat"])
    with pytest.raises(MmjaxError, match="context_length=2"):
        CLIPTokenizer(small.tokenizer, 2)
    assert small([]).shape == (0, 13)


# ------------------------------------------------------------------------------------------------ the public vocabulary


def test_ids_of_the_public_vocabulary(public):
    assert (public.vocab_size, public.start, public.end) == (49408, 49406, 49407)
    vocabulary = public.tokenizer.get_vocab()
    assert [vocabulary[token] for token in ("!", '"', "!</w>", "in", "a</w>", "jekyll</w>")] == [
        0,
        1,
        256,
        512,
        320,
        49405,
    ]
    assert public("a photo of a cat")[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]


@pytest.mark.torch
def test_open_clips_tokenizer_agrees(open_clip, public, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("regex")
    if clip_tokenizer._ftfy is None:
        mender = types.ModuleType("ftfy")
        mender.fix_text = clip_tokenizer._mended  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "ftfy", mender)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the module sets it
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", open_clip / "tokenizer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reference = module.SimpleTokenizer()
    texts = TEXTS + random_texts(500)
    expected = reference(texts).numpy()
    np.testing.assert_array_equal(public(texts), expected)
    for row in expected:
        ids = [id for id in row[1:].tolist() if id]
        if len(ids) < 60 and 0 not in row[: len(ids) + 1]:
            assert public.decode(row) == reference.decode(ids[:-1]).strip()


@pytest.mark.torch
def test_transformers_tokenizer_agrees(tmp_path, open_clip, public):
    transformers = pytest.importorskip("transformers")
    model = json.loads(public.tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    reference = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    reference.save_pretrained(tmp_path / "theirs")
    texts = TEXTS + random_texts(500)
    expected = reference(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    for tokenizer in (
        CLIPTokenizer.from_vocab(tmp_path / "vocab.json", tmp_path / "merges.txt"),
        CLIPTokenizer.from_file(tmp_path / "theirs" / "tokenizer.json"),
    ):
        assert tokenizer.padding == "end"
        np.testing.assert_array_equal(tokenizer(texts), expected)

    public.save(tmp_path / "tokenizer.json")
    back = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for row, ids in zip(public(CAPTIONS), back(CAPTIONS)["input_ids"]):
        assert row.tolist() == ids + [0] * (77 - len(ids))
