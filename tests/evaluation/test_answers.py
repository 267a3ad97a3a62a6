"""SQuAD's scores: its normaliser, the best of several references, questions without an answer."""

import pytest

from mmjax.errors import MmjaxError
from mmjax.evaluation.answers import answer_scores, matches, normalised, word_f1
from mmjax.text.squad import Question


def question(context, *answers, group="g"):
    return Question("q", "who?", context, tuple((text, 0) for text in answers), group)


def test_normalisation_and_matches():
    assert normalised("  The U.S.A.'s  an apple\n theme ") == "usas apple theme"
    assert word_f1("the red hen", "a red, red hen!") == pytest.approx(0.8)  # 2 of 2 and 2 of 3
    assert word_f1("The", "a") == 1 and word_f1("the", "hen") == 0 == word_f1("hen", "")
    assert matches("hen", ["the hen", "red hen"]) == (1, 1)
    assert matches("red hen", ["the hen", "a cow"]) == (0, pytest.approx(2 / 3))
    assert matches("", []) == (1, 1) and matches("x", []) == (0, 0)
    assert matches("", ["the"]) == (1, 1) and matches("", ["the", "hen"]) == (0, 0)


def test_scores_by_hand():
    questions = [question("hen x", "hen"), question("a b c d", "b c", "c", group="h"), question("cow")]
    scores = answer_scores(["the hen", "b", "cow"], questions)
    assert scores["exact_match"].value == pytest.approx(100 / 3)
    assert scores["f1"].value == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert scores["f1_answered"].value == pytest.approx(100 * (1 + 2 / 3) / 2) and scores["f1_answered"].n == 2
    assert scores["exact_match_unanswered"].value == 0
    # Guesses: "" gets 0, 0, 1; the whole context F1 2/3, 2 * 2 / (3 + 2) ("a" is an article) and 0.
    assert scores["exact_match"].chance == pytest.approx(100 / 3)
    assert scores["f1"].chance == pytest.approx(100 * (2 / 3 + 4 / 5) / 3)
    assert answer_scores(["hen", "c"], questions[:2]).keys() == {"exact_match", "f1"}
    with pytest.raises(MmjaxError, match="1 answers for 2 questions"):
        answer_scores(["hen"], questions[:2])


def test_intervals_resample_groups():
    """All questions of a group are right or wrong together: the interval is that of the groups."""
    questions = [question("x", "x", group=str(i // 50)) for i in range(200)]
    scores = answer_scores(["x"] * 100 + ["y"] * 100, questions)
    assert scores["exact_match"].low == 0 and scores["exact_match"].high == 100
