"""Pairs of segments: where they come from, how long they are, how many are random; and files of sentences."""

import argparse
import pathlib

import numpy as np
import pytest

from mmjax.data.stdlib_docs import stdlib_documents
from mmjax.errors import MmjaxError
from mmjax.text.documents import read_documents, split_sentences
from mmjax.text.sentence_pairs import pair_columns, sentence_pairs
from mmjax.text.training import train_wordpiece


def documents(count=13, seed=0):
    """Piece i of document d is d * 10,000 + i, which identifies the source of a segment."""
    rng = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        sizes, position, document = rng.integers(1, 19, rng.integers(1, 23)), 0, []
        for size in sizes.tolist():
            document.append([10_000 * number + position + i for i in range(size)])
            position += size
        documents.append(document)
    return documents


def test_segments_are_whole_and_random_ones_are_of_other_documents():
    pairs = list(sentence_pairs(documents(), length=37, passes=3, seed=1))
    assert len(pairs) > 200
    for pair in pairs:
        assert pair.a and pair.b and len(pair.a) + len(pair.b) <= 34
        assert {id // 10_000 for id in pair.a} == {pair.document} and len({id // 10_000 for id in pair.b}) == 1
        assert (np.diff(pair.a) == 1).all() and (np.diff(pair.b) == 1).all()
        if pair.random:
            assert pair.b[0] // 10_000 != pair.document
        else:
            assert pair.b[0] // 10_000 == pair.document and pair.b[0] > pair.a[-1]
    share = np.mean([pair.random for pair in pairs])
    assert 0.5 < share < 0.75  # single sentences at a document's end add to the half


def test_sentences_replaced_by_a_random_segment_are_used_again():
    """So in a pass every piece of a document is in some true segment, or was cut from its ends."""
    long = [[[i] for i in range(500)], [[9_999]]]
    pairs = [pair for pair in sentence_pairs(long, length=23, passes=1, short=0.0, seed=2) if pair.document == 0]
    used = np.concatenate([pair.a if pair.random else pair.a + pair.b for pair in pairs])
    np.testing.assert_array_equal(used, np.arange(500))


def test_short_targets_are_sampled_once_per_document_and_pass():
    long = [[[i] for i in range(300)], [[1000 + i] for i in range(300)]]
    aims = [
        [
            len(p.a) + len(p.b)
            for p in sentence_pairs(long, 53, 1, short=1.0, seed=seed)
            if p.document == 0 and not p.random
        ]
        for seed in range(5)
    ]
    for lengths in aims:  # all but the document's last
        assert len(set(lengths[:-1])) <= 1
    assert len({lengths[0] for lengths in aims if lengths}) > 1


def test_passes_differ_and_seeds_repeat():
    one, two = (list(sentence_pairs(documents(), 37, 2, seed=4)) for _ in range(2))
    assert one == two and one != list(sentence_pairs(documents(), 37, 2, seed=5))
    once = list(sentence_pairs(documents(), 37, 1, seed=4))
    assert one[: len(once)] == once and one[len(once) : 2 * len(once)] != once


def test_pairs_become_columns():
    tokenizer = train_wordpiece(["ab cd ef gh"], 30)
    pairs = list(sentence_pairs([[[5, 6], [7]], [[8], [9, 10, 11]]], length=11, passes=1, seed=0))
    columns = pair_columns(pairs, tokenizer, 11)
    for row, pair in enumerate(pairs):
        ids = [tokenizer.cls, *pair.a, tokenizer.sep, *pair.b, tokenizer.sep]
        assert columns["input_ids"][row].tolist() == ids + [tokenizer.pad] * (11 - len(ids))
        assert columns["token_type_ids"][row].sum() == len(pair.b) + 1
        assert columns["attention_mask"][row].sum() == len(ids)
        assert columns["next_label"][row] == pair.random and columns["document"][row] == pair.document


@pytest.mark.parametrize(
    "bad, message", [([[[1]]], "two documents"), ([[[1]], [[]]], "not empty"), ([[[1]], []], "not")]
)
def test_bad_documents_are_refused(bad, message):
    with pytest.raises(MmjaxError, match=message):
        list(sentence_pairs(bad, 37))


def test_text_files_are_documents(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("one hen.\ntwo hens.\n\n\nanother.\n")
    (tmp_path / "a.txt").write_text("  only one  \n")
    assert read_documents(tmp_path) == {
        "a.txt": ["only one"],
        "b/two.txt#0": ["one hen.", "two hens."],
        "b/two.txt#1": ["another."],
    }
    assert read_documents(tmp_path, prose=True)["b/two.txt"] == ["one hen. two hens.", "another."]
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(MmjaxError, match=r"c\.txt"):
        read_documents(tmp_path)
    with pytest.raises(MmjaxError, match=r"no \.txt file"):
        read_documents(tmp_path / "d")


def test_prose_is_cut_at_full_stops_before_capitals():
    text = 'It ran. "Did it?" It did (really!). And 3.5 hens, e.g. two,\nsat on it.\n\nno stop here\n\n1 more.'
    assert split_sentences(text) == [
        "It ran.",
        '"Did it?"',
        "It did (really!).",
        "And 3.5 hens, e.g. two, sat on it.",
        "no stop here",
        "1 more.",
    ]


def test_documentation_strings_are_read_and_not_imported(tmp_path):
    stdlib = pathlib.Path(argparse.__file__).parent
    for name in ("argparse.py", "pydoc_data/topics.py", "json/__init__.py", "this.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((stdlib / name).read_text("utf-8"), "utf-8")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text((stdlib / "argparse.py").read_text("utf-8"), "utf-8")
    (tmp_path / "broken.py").write_text('"""No. Not. This. One."""\ndef (:\nraise SystemExit')
    documents = stdlib_documents(tmp_path)
    topics = {name for name in documents if "#" in name}
    assert documents.keys() - topics == {"argparse.py", "json/__init__.py"} and "pydoc_data/topics.py#while" in topics
    assert documents["argparse.py"][0] == "Command-line parsing library"
    assert all(len(sentences) >= 4 and all(sentences) for sentences in documents.values())
