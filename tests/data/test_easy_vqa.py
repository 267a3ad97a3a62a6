"""easy-VQA: the published counts, the kinds of its questions, and what is missing without the package."""

import collections

import numpy as np
import pytest

from mmjax.data import easy_vqa
from mmjax.data.easy_vqa import EasyVqa, easy_vqa_answers, question_kind
from mmjax.errors import MmjaxError

KINDS = {
    "is there a blue shape?": "presence",
    "does the image contain a circle?": "presence",
    "is there not a brown shape in the image?": "negation",
    "is no rectangle present?": "negation",
    "what is the color of the shape?": "colour",
    "what color is the circle?": "colour",
    "what is the blue shape?": "shape",
    "what shape is present?": "shape",
}


@pytest.mark.parametrize("text", KINDS)
def test_kinds_by_hand(text: str):
    assert question_kind(text) == KINDS[text]


def test_counts_are_those_of_the_readme_and_answers_fit_their_kind():
    pytest.importorskip("easy_vqa")
    train, test = EasyVqa("train"), EasyVqa("test")
    assert (len(train), len(test), len(easy_vqa_answers())) == (38575, 9673, 13)
    answers = collections.defaultdict(collections.Counter)
    for text, answer, _ in train.questions + test.questions:
        answers[question_kind(text)][answer] += 1
    shapes = {"circle", "rectangle", "triangle"}
    assert set(answers["presence"]) == set(answers["negation"]) == {"yes", "no"} and set(answers["shape"]) == shapes
    assert set(answers["colour"]) == set(easy_vqa_answers()) - shapes - {"yes", "no"}
    # "A shape" is there in few questions, "not a shape" in most.
    assert answers["presence"]["no"] > answers["presence"]["yes"] and answers["negation"]["yes"] > 9000
    assert sum(sum(answers[kind].values()) for kind in ("presence", "negation")) == 28407 + 7136


def test_records_show_the_image_that_the_question_is_about():
    pytest.importorskip("easy_vqa")
    test = EasyVqa("test")
    record = next(r for r in map(test.__getitem__, range(200)) if r["kind"] == "colour" and r["answers"] == ("red",))
    image = record["image"].astype(int)
    assert image.shape == (64, 64, 3) and record["answer_weights"] == (1.0,)
    # The shape differs from its background, the corner, in its colour.
    shape = image[np.abs(image - image[0, 0]).sum(-1) > 60]
    assert len(shape) > 20 and np.median(shape[:, 0]) > 150 and np.median(shape[:, 1:]) < 100
    assert test[3]["question_id"] == 3 and test.record_name(3) == "easy_vqa-test[3]"
    assert test.fingerprint != EasyVqa("train").fingerprint


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MmjaxError, match="part='val': train or test"):
        EasyVqa("val")  # type: ignore[arg-type]
    monkeypatch.setattr(easy_vqa.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MmjaxError, match=r'easy_vqa: pip install "mmjax\[demo\]"'):
        EasyVqa()
