"""SQuAD's files, and where an answer is in windows of pieces."""

import json

import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.text.answer_spans import answer_columns, best_answers, span_in
from mmjax.text.squad import Question, read_squad
from mmjax.text.training import train_wordpiece

CONTEXT = "The red hen runs to the sea, and the puppy (brown, 1895) plays by it."


def squad(*entries, context=CONTEXT):
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(entries)}]}]}


def qa(text, start=None, **fields):
    at = CONTEXT.index(text) if start is None else start
    return {"id": "a1", "question": "who?", "answers": [{"text": text, "answer_start": at}]} | fields


def write(tmp_path, value):
    file = tmp_path / "dev.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


def test_both_versions_are_read(tmp_path):
    none = {"id": "a2", "question": "when?", "answers": [], "is_impossible": True, "plausible_answers": []}
    one, two = read_squad(write(tmp_path, squad(qa("red hen", is_impossible=False), none)))
    assert one == Question("a1", "who?", CONTEXT, (("red hen", 4),), "data[0].paragraphs[0]")
    assert two.answers == () and two.id == "a2"
    assert read_squad(write(tmp_path, squad(qa("puppy"))))[0].answers == (("puppy", 37),)


@pytest.mark.parametrize(
    "value, message",
    [
        ('{"data": [\n{]}', "dev.json, line 2: not JSON"),
        ([], "dev.json: expected 'data', a list"),
        (squad(), "it has no questions"),
        (squad(qa("red hen", 5)), r"qas\[0\] \(id a1\): the answer 'red hen' is not at 5, .*'ed hen '"),
        (squad(qa("red hen", -4)), "is not at -4"),
        (squad(qa("red", answers=[])), "no answer, and is_impossible is not true"),
        (squad(qa("red", question=None)), r"paragraphs\[0\].qas\[0\]: expected 'question', a str, not NoneType"),
        (squad(qa("red"), context=3), r"data\[0\].paragraphs\[0\]: expected 'context', a str, not int"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, value, message):
    with pytest.raises(MmjaxError, match=message):
        read_squad(write(tmp_path, value))
    with pytest.raises(MmjaxError, match=r"none\.json"):
        read_squad(tmp_path / "none.json")


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([CONTEXT, "who is it? when?"] * 2, 60)


@pytest.mark.parametrize("text", ["red hen", "puppy", "1895", "it", "The", "hen runs to the sea", "brown"])
def test_labels_mark_the_answer(tokenizer, text):
    """Logits that are high at the labels give the answer, whichever windows there are."""
    question = Question("q", "who?", CONTEXT, ((text, CONTEXT.rindex(text)),))
    for length, stride in ((80, 40), (37, 9)):
        windows, columns = answer_columns([question], tokenizer, length, stride)
        assert columns["input_ids"].shape == (len(windows.windows), length) and (length == 80) == (
            len(windows.windows) == 1
        )
        scores = np.zeros((2, *columns["input_ids"].shape))
        inside = columns["start"] > 0
        assert inside.any()
        for row in np.flatnonzero(inside):
            scores[0, row, columns["start"][row]] = scores[1, row, columns["end"][row]] = 9
            first, last = (windows.windows[row].offsets[columns[end][row]] for end in ("start", "end"))
            assert (first[0], last[1]) == (question.answers[0][1], question.answers[0][1] + len(text))
        assert best_answers(CONTEXT, windows.windows, *scores)[0].text == text
        np.testing.assert_array_equal(columns["end"][~inside], 0)


def test_a_window_with_a_part_of_the_answer_has_none(tokenizer):
    text = "hen runs to the sea, and the puppy"
    question = Question("q", "who?", CONTEXT, ((text, 8),))
    windows, columns = answer_columns([question, Question("n", "when?", CONTEXT, ())], tokenizer, 30, 7)
    for window, start, question_index in zip(windows.windows, columns["start"], windows.question_indices):
        offsets = [offset for offset in window.offsets if offset]
        covers = offsets[0][0] <= 8 and offsets[-1][1] >= 8 + len(text) and question_index == 0
        assert (start > 0) == covers
    assert set(windows.question_indices) == {0, 1} and span_in(windows.windows[0], 0, len(CONTEXT)) == (0, 0)


def test_an_answer_inside_a_piece_is_the_piece(tokenizer):
    windows, columns = answer_columns([Question("q", "who?", CONTEXT, (("u", CONTEXT.index("uppy")),))], tokenizer, 80)
    offset = windows.windows[0].offsets[columns["start"][0]]
    assert offset[0] <= CONTEXT.index("uppy") < offset[1] and columns["start"][0] == columns["end"][0]
    with pytest.raises(MmjaxError, match="question q: a context of 0 pieces"):
        answer_columns([Question("q", "who?", "  ", ())], tokenizer, 80)
