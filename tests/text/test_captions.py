"""Cleaning as ALBEF and BLIP do it, each difference by an example and all by another transcription; and the ids."""

import random

import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.text.captions import (
    albef_caption,
    albef_question,
    blip_caption,
    blip_question,
    caption_columns,
    exchange_sides,
    vqa_answer_columns,
)
from mmjax.text.wordpiece import SPECIAL, WordPieceTokenizer

FOUR = (albef_caption, albef_question, blip_caption, blip_question)


@pytest.mark.parametrize(
    "text, expected",
    [
        # ALBEF's captions and questions, BLIP's captions and questions
        ("It's a, b?", ("its a b", "its a b", "it's a, b?", "it's a, b?")),
        ("a.b!c", ("abc", "abc", "a b c", "abc")),
        ("red-hot and/or", ("red hot and or", "red hot and or", "red-hot and/or", "red-hot and/or")),
        ("<person> waves", ("person waves", "<person> waves", "<person> waves", "<person> waves")),
        ("two  words", ("two words", "two  words", "two words", "two  words")),
        ("  ends  ", ("ends", "  ends", "ends", "  ends")),
        ("a\tb \n", ("a\tb", "a\tb \n", "a\tb", "a\tb \n")),
        ("a - b", ("a b", "a   b", "a - b", "a - b")),
        ('("#1": ~x;*)', ("1 x", "1 x", "1 x", "1 x")),
        ("[k] {e} @ $5 & 6% _x_ \u201cé\u201d", ("[k] {e} @ $5 & 6% _x_ \u201cé\u201d",) * 4),
        ("...", ("",) * 4),
    ],
)
def test_each_difference(text, expected):
    assert tuple(clean(text) for clean in FOUR) == expected


def test_number_of_words():
    text = " ".join(f"w{i}" for i in range(60))
    assert [len(clean(text).split()) for clean in FOUR] == [30, 30, 30, 50]
    assert albef_question(text, 50) == " ".join(text.split()[:50]) and len(blip_caption(text, 40).split()) == 40
    # The empty word between two spaces counts in questions alone.
    doubled = "a  b c"
    assert albef_question(doubled, 3) == "a  b" and blip_question(doubled, 3) == "a  b"
    assert albef_caption(doubled, 3) == blip_caption(doubled, 3) == "a b c"
    assert albef_caption("a\tb c", 1) == "a\tb"


def another_transcription(text, deleted, blanks, joins, words):
    """An independent transcription, character by character."""
    out = []
    for character in text.lower():
        if character in blanks:
            out.append(" ")
        elif character not in deleted:
            out.append(character)
    text = "".join(out)
    if not joins:
        while text.endswith(" "):
            text = text[:-1]
    else:
        if "-" in blanks:  # ALBEF's
            text = "person".join(text.split("<person>"))
        joined, index = "", 0
        while index < len(text):
            end = index
            while end < len(text) and text[end].isspace():
                end += 1
            joined += text[index] if end - index < 2 else " "
            index = max(end, index + 1)
        while joined.endswith("\n"):
            joined = joined[:-1]
        while joined[:1] == " ":
            joined = joined[1:]
        while joined[-1:] == " ":
            joined = joined[:-1]
        text = joined
    result, spaces = "", 0
    for character in text:
        spaces += character == " "
        if spaces == words:
            break
        result += character
    return result


def test_random_texts_against_another_transcription():
    rules = (
        (albef_caption, ",.'!?\"()*#:;~", "-/", True),
        (albef_question, ",.'!?\"()*#:;~", "-/", False),
        (blip_caption, "", '.!"()*#:;~', True),
        (blip_question, '.!"()*#:;~', "", False),
    )
    rng = random.Random(0)
    parts = [*"abAB ,.'!?\"()*#:;~-/<>[]&\t\n", "  ", "<person>", "<Person>", "É", "\u00a0", "word "]
    for _ in range(3000):
        text = "".join(rng.choices(parts, k=rng.randrange(40)))
        words = rng.randrange(1, 9)
        for clean, deleted, blanks, joins in rules:
            assert clean(text, words) == another_transcription(text, deleted, blanks, joins, words), repr(text)


def test_sides_are_exchanged_as_whole_words():
    cleaned = blip_caption("The LEFT image: a cup, left-handed. Leftmost is right, right is left")
    assert exchange_sides(cleaned) == "the right image a cup, left-handed leftmost is right, left is right"
    assert exchange_sides(exchange_sides(cleaned)) == cleaned
    assert exchange_sides("no  side") == "no  side"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join((*SPECIAL, "a", "red", "hen", "##s", "yes", "no")) + "\n")
    return WordPieceTokenizer.from_vocab(file)


def test_blips_texts_end_with_sep_and_albefs_do_not(tokenizer):
    texts = ["a red hen", "hens", "a a a a a a a"]
    a, red, hen, s = (tokenizer.tokenizer.token_to_id(name) for name in ("a", "red", "hen", "##s"))
    pad, cls, sep = tokenizer.pad, tokenizer.cls, tokenizer.sep
    albef, blip = (caption_columns(tokenizer, texts, 6, sep) for sep in (False, True))
    np.testing.assert_array_equal(
        albef["input_ids"], [[cls, a, red, hen, pad, pad], [cls, hen, s, pad, pad, pad], [cls, a, a, a, a, a]]
    )
    np.testing.assert_array_equal(
        blip["input_ids"], [[cls, a, red, hen, sep, pad], [cls, hen, s, sep, pad, pad], [cls, a, a, a, a, sep]]
    )
    assert albef["attention_mask"].sum(1).tolist() == [4, 3, 6] and blip["attention_mask"].sum(1).tolist() == [5, 4, 6]
    for columns in (albef, blip):
        assert set(columns) == {"input_ids", "attention_mask"}
        assert all(column.dtype == np.int32 for column in columns.values())
        np.testing.assert_array_equal(columns["input_ids"] != pad, columns["attention_mask"] == 1)
    assert caption_columns(tokenizer, ["a"], 2, False)["input_ids"].tolist() == [[cls, a]]
    for length, sep in ((1, False), (2, True)):
        with pytest.raises(MmjaxError, match=f"length={length}: too short"):
            caption_columns(tokenizer, ["a"], length, sep)


def test_answers_fill_their_slots_by_weight(tokenizer):
    yes, no, red = (tokenizer.tokenizer.token_to_id(name) for name in ("yes", "no", "red"))
    pad, cls, sep = tokenizer.pad, tokenizer.cls, tokenizer.sep
    columns = vqa_answer_columns(tokenizer, ["no", "yes", "red"], [0.3, 0.6, 0.1], 4, 4)
    np.testing.assert_array_equal(
        columns["answer_ids"], [[cls, yes, sep, pad], [cls, no, sep, pad], [cls, red, sep, pad], [cls, sep, pad, pad]]
    )
    np.testing.assert_array_equal(columns["answer_weights"], np.array([0.6, 0.3, 0.1, 0.0], np.float32))
    assert columns["answer_mask"].sum(1).tolist() == [3, 3, 3, 2]
    two = vqa_answer_columns(tokenizer, ["no", "yes", "red"], [0.3, 0.6, 0.1], 2, 4)
    np.testing.assert_array_equal(two["answer_ids"], columns["answer_ids"][:2])
    # ALBEF glues the end on: the same ids.
    glued = tokenizer.pieces(["yes[SEP]"])[0]
    assert [cls, *glued] == columns["answer_ids"][0, :3].tolist()
