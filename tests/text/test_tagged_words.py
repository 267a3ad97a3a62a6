"""Columns of words and tags: reading, the piece that carries a tag, sentences longer than a row."""

import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.text.tagged_words import TaggedWords, read_columns, tag_names, tagged_columns, word_sequences, words_of
from mmjax.text.training import train_wordpiece

FILE = "-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nPeter\tNNP\tB-NP\tB-PER\n"


def test_a_file_of_columns(tmp_path):
    file = tmp_path / "eng.train"
    file.write_text(FILE)
    sentences = read_columns(file)
    assert [(s.words, s.tags) for s in sentences] == [(("EU", "rejects"), ("B-ORG", "O")), (("Peter",), ("B-PER",))]
    assert sentences[0].location == f"{file}, line 3" and [s.group for s in sentences] == ["0", "1"]
    assert read_columns(file, tag=1)[1].tags == ("NNP",)
    assert tag_names(sentences) == ("O", "B-ORG", "B-PER")


@pytest.mark.parametrize(
    "text, tag, message",
    [
        ("a O\nb B-X extra\n", -1, "f.txt, line 2: 3 columns; expected 2"),
        ("a O\nb O\n", 3, "f.txt, line 1: 2 columns; .*the tag in 3"),
        ("\n\nalone\n", -1, "f.txt, line 3: 1 columns; expected 2"),
        ("-DOCSTART- O\n\n", -1, "f.txt: it has no words"),
    ],
)
def test_a_bad_line_is_refused(tmp_path, text, tag, message):
    (tmp_path / "f.txt").write_text(text)
    with pytest.raises(MmjaxError, match=message):
        read_columns(tmp_path / "f.txt", tag=tag)


def test_the_first_piece_of_a_word_has_its_tag_and_no_word_is_lost():
    tokenizer = train_wordpiece(["ab ab ab cd cd cd bdac"] * 2, 15)  # four letters, at both places, and "ab", "cd"
    sentence = ("ab", "ac", "cd", "\x00", "dbca", "ab")
    tags = tuple("012345")
    length = 7
    sequences, columns = tagged_columns(
        [TaggedWords(sentence, tags), TaggedWords(("cd",), ("5",))], tokenizer, length, tags
    )
    assert len(sequences) > 2 and columns["labels"].shape == (len(sequences), length)
    cut = [tokenizer.pieces(word)[0] or [tokenizer.unknown] for word in sentence]
    assert [len(pieces) for pieces in cut] == [1, 2, 1, 1, 4, 1]
    for sequence, ids, mask, labels in zip(
        sequences, columns["input_ids"], columns["attention_mask"], columns["labels"]
    ):
        words = (
            cut[sequence.first : sequence.first + len(sequence.firsts)]
            if sequence.sentence == 0
            else [tokenizer.pieces("cd")[0]]
        )
        flat = [piece for pieces in words for piece in pieces]
        assert ids[: mask.sum()].tolist() == [tokenizer.cls, *flat, tokenizer.sep]
        assert (labels >= 0).sum() == len(words) and np.all(labels[list(sequence.firsts)] >= 0)
        assert [ids[position] for position in sequence.firsts] == [pieces[0] for pieces in words]
    # What was put in comes out again, in order.
    assert words_of(sequences, columns["labels"], 2) == [[0, 1, 2, 3, 4, 5], [5]]
    with pytest.raises(MmjaxError, match="line 8: the tag 'B' is not among O"):
        tagged_columns([TaggedWords(("ab",), ("B",), "line 8")], tokenizer, 9, ("O",))
    with pytest.raises(MmjaxError, match="no words"):
        word_sequences([["ab"], []], tokenizer, 9)
