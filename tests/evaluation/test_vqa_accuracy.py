"""The VQA challenge's normalisation and accuracy: by hand, against a transcription of its rules, and its files."""

import json
import random
import re

import pytest

from mmjax.errors import MmjaxError
from mmjax.evaluation.vqa import (
    CONTRACTIONS,
    HumanAnswers,
    VqaEvaluation,
    accuracy,
    comparable,
    normalised,
    read_human_answers,
    vqa_scores,
    without_punctuation,
    write_submission,
)

NORMALISED = {
    "The Dog.": "dog",
    "a  cat, a dog": "cat dog",
    "yes/no": "yes no",
    "T-shirt": "t shirt",
    "what?ever": "what ever",
    "a, b": "b",
    "none": "0",
    "Two dogs": "2 dogs",
    "1,000 - 2,000": "1000 2000",
    "black-and-white": "black and white",
    "black - white": "black white",
    "10:30": "10:30",
    "well...ok": "wellok",
    "$5 / 5%": "$5 5%",
    "don't know!": "don't know",
    "dont": "don't",
    "Im happy": "im happy",
    "couldntve couldn'tve couldnt've": "couldntve couldn't've couldn't've",
    "somebody'd": "somebodyd",
    "yall'd've twas": "y'all'd've 'twas",
    "\ttwo\nthe ": "2",
    "a": "",
    "3.": "3",
    "3.5": "3.5",
    "u.s.": "us",
    "." * 40 + "x": "." * 8 + "x",
}


@pytest.mark.parametrize("text", NORMALISED)
def test_normalisation_by_hand(text):
    assert normalised(text) == NORMALISED[text]


def test_contractions_match_the_script():
    """120 keys; the value is the key with one apostrophe more, but for six oddities; some words are not in it."""
    odd = {"somebody'd", "let's", "she's", "ow's'at", "'ows'at", "'ow'sat"}
    assert len(CONTRACTIONS) == 120
    for key, value in CONTRACTIONS.items():
        if key not in odd:
            assert value.replace("'", "") == key.replace("'", "") and value.count("'") == key.count("'") + 1
    assert not {"id", "ill", "well", "hell", "shell", "shed", "shes", "wed", "were", "lets"} & CONTRACTIONS.keys()


def transcribed(prediction, answers):
    """An independent transcription of the rules, answer by answer."""

    def strip(text):
        out = text
        for mark in [
            ";",
            "/",
            "[",
            "]",
            '"',
            "{",
            "}",
            "(",
            ")",
            "=",
            "+",
            "\\",
            "_",
            "-",
            ">",
            "<",
            "@",
            "`",
            ",",
            "?",
            "!",
        ]:
            beside = any(near in text for near in (mark + " ", " " + mark))
            out = "".join(out.split(mark)) if beside or re.findall("[0-9],[0-9]", text) else " ".join(out.split(mark))
        letters, removed = [], 0
        for index, letter in enumerate(out):
            if letter == "." and not out[index + 1 : index + 2].isdigit() and removed < 32:
                removed += 1
            else:
                letters.append(letter)
        return "".join(letters)

    words = []
    for word in strip(prediction.replace("\n", " ").replace("\t", " ").strip()).lower().split():
        word = {"none": "0", "zero": "0", "one": "1", "two": "2", "ten": "10"}.get(word, word)
        if word not in ("a", "an", "the"):
            words.append({"dont": "don't", "youre": "you're"}.get(word, word))
    normalised_prediction = " ".join(words)
    compared = [strip(answer) for answer in answers] if len(set(answers)) > 1 else answers
    shares = [
        min(1, sum(a == normalised_prediction for j, a in enumerate(compared) if j != i) / 3)
        for i in range(len(compared))
    ]
    return sum(shares) / len(shares)


def test_equals_a_transcription_on_random_answers():
    rng = random.Random(0)
    parts = [
        "dog",
        "two",
        "None",
        "the",
        "1,0",
        "3.5",
        "dont",
        "youre",
        "yes",
        " ",
        ", ",
        "-",
        "/",
        ".",
        "?",
        " (",
        ")",
        "\n",
    ]
    partial = 0
    for trial in range(2000):
        pool = ["".join(rng.choices(parts, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
        answers = rng.choices(pool, k=rng.choice([10, 10, 2, 5]))
        prediction = rng.choice([*pool, pool[0].upper(), f"the {pool[0]}!"])
        score = vqa_scores([prediction], [HumanAnswers(1, tuple(answers))])["accuracy"].value
        assert score == pytest.approx(100 * transcribed(prediction, answers)), (trial, prediction, answers)
        partial += 0 < score < 100
    assert partial > 100


def test_accuracy_by_matches():
    assert [round(accuracy(matches, 10), 12) for matches in range(6)] == [0, 0.3, 0.6, 0.9, 1, 1]
    assert accuracy(10, 10) == 1 and accuracy(2, 2) == pytest.approx(1 / 3) and accuracy(1, 2) == pytest.approx(1 / 6)


def test_human_answers_lose_punctuation_only_where_they_differ():
    assert comparable(["Yes!"] * 10) == ["Yes!"] * 10
    assert comparable(["Yes!", "the dog", "two"]) == ["Yes ", "the dog", "two"]
    assert without_punctuation("a.b-c") == "ab c"
    scores = vqa_scores(
        ["two", "t-shirt"], [HumanAnswers(1, ("two",) * 10), HumanAnswers(2, ("t-shirt",) * 9 + ("x",))]
    )
    assert scores["accuracy"].value == 50  # "2" is not "two"; both sides of "t shirt" lost the mark


QUESTIONS = [
    HumanAnswers(1, ("yes",) * 8 + ("no",) * 2, 7, "yes/no", "is the"),
    HumanAnswers(2, ("2",) * 2 + ("3",) * 8, 7, "number", "how many"),
    HumanAnswers(3, ("dog",) * 3 + ("cat",) * 7, 9, "other", "what is"),
    HumanAnswers(4, ("yes",) * 10, 9, "yes/no", "is the"),
]


def test_means_by_type_intervals_and_chance():
    scores = vqa_scores(["No", "two", "a dog", "yes."], QUESTIONS)
    assert scores["accuracy"].value == pytest.approx(100 * (0.6 + 0.6 + 0.9 + 1) / 4)
    assert scores["accuracy_answer_yes_no"].value == pytest.approx(80) and scores["accuracy_answer_yes_no"].n == 2
    assert scores["accuracy_question_how_many"].value == pytest.approx(60)
    assert list(scores)[1:4] == ["accuracy_answer_number", "accuracy_answer_other", "accuracy_answer_yes_no"]
    assert scores["accuracy"].chance == pytest.approx(50)  # "yes" to all
    # The two questions of an image are resampled together: means are those of 60, 95 or half of each.
    assert (scores["accuracy"].low, scores["accuracy"].high) == pytest.approx((60, 95))
    turned = vqa_scores(["yes.", "a dog", "two", "No"], QUESTIONS[::-1])
    assert turned["accuracy"] == scores["accuracy"]
    plain = vqa_scores(["yes"], [HumanAnswers(1, ("yes", "yes", "no"))])
    assert list(plain) == ["accuracy"]


def test_files(tmp_path):
    annotations = [
        {
            "question_id": question.question,
            "image_id": question.image,
            "answer_type": question.answer_type,
            "question_type": question.question_type,
            "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(question.answers)],
        }
        for question in QUESTIONS
    ]
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps({"annotations": annotations}))
    assert read_human_answers(file) == QUESTIONS
    write_submission(tmp_path / "out.json", [question.question for question in QUESTIONS], ["No", "2", "a dog", "é"])
    out = json.loads((tmp_path / "out.json").read_text())
    assert out[0] == {"question_id": 1, "answer": "No"} and len(out) == 4 and out[3]["answer"] == "é"

    for content, named in (
        ({"annotations": [annotations[0], annotations[0]]}, "question_id 1 occurs 2 times"),
        ({"annotations": [{"question_id": 1, "answers": ["yes"]}]}, "expected a number 'question_id'"),
        ({"annotations": []}, "a non-empty list 'annotations'"),
        ([], "annotations.json: expected an object"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(MmjaxError, match=named):
            read_human_answers(file)
    file.write_text("{")
    with pytest.raises(MmjaxError, match=r"annotations\.json: "):
        read_human_answers(file)
    with pytest.raises(MmjaxError, match="question_id 1 occurs 2 times"):
        write_submission(tmp_path / "out.json", [1, 1], ["a", "b"])
    with pytest.raises(MmjaxError, match="1 answers for 2 question ids"):
        write_submission(tmp_path / "out.json", [1, 2], ["a"])


def test_invalid_questions_are_refused():
    with pytest.raises(MmjaxError, match="1 answers for 4 questions"):
        vqa_scores(["yes"], QUESTIONS)
    with pytest.raises(MmjaxError, match="question 5: 1 answers"):
        vqa_scores(["yes"], [HumanAnswers(5, ("yes",))])


def test_evaluation():
    made = VqaEvaluation(answer=lambda params, state: [params] * 4, questions=QUESTIONS)
    scores = made.scores("yes")
    assert scores["vqa_accuracy"].value == scores["vqa_accuracy"].chance == pytest.approx(50)
    assert scores["vqa_accuracy_answer_yes_no"].value == 100
