"""VQA accuracy as the VQA challenge computes it (Antol et al. 2015), against ten human answers.

The rules are those of the official script at GT-Vision-Lab/VQA c4e6a0e, which ALBEF and LAVIS include, oddities
included: predictions are fully normalised, human answers only lose punctuation, and only if they are not all the same.
So a human answer "the dog", "two" or "Yes" is never matched.

    >>> normalised("The two dogs, sitting.")
    '2 dogs sitting'
    >>> [round(accuracy(matches, 10), 2) for matches in range(5)]
    [0.0, 0.3, 0.6, 0.9, 1.0]
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score, clustered_proportion
from mmjax.types import MmjaxError, Params

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
GROUPED_DIGITS = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
"""The script intends to keep periods between digits, but its look-behind is misspelt: digits before have no effect."""
PERIODS = 32
"""Maximum number of periods removed: the script passes a flag, `re.UNICODE`, where `sub` expects a count."""
ARTICLES = frozenset(("a", "an", "the"))
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}

ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm
    I've isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've
    shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
    there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
    you've
"""
TWO_APOSTROPHES = """
    couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""


def _contractions() -> dict[str, str]:
    """Words without one of their apostrophes -> the correct spelling. Those with a capital I never match a lower-cased
    word."""
    result = {word.replace("'", ""): word for word in ONE_APOSTROPHE.split()}
    for word in (*TWO_APOSTROPHES.split(), "y'all'd've"):
        for position in (match.start() for match in re.finditer("'", word)):
            result[word[:position] + word[position + 1 :]] = word
    # Three more of the script; its second is wrong, and is reproduced.
    for short in ("ow's'at", "'ows'at", "'ow'sat"):
        result[short] = "'ow's'at"
    return result | {"somebody'd": "somebodyd", "let's": "let's", "she's": "she's"}


CONTRACTIONS = _contractions()


@dataclasses.dataclass(frozen=True)
class HumanAnswers:
    """The human answers to a question.

    question: its id. image: the id of its image; intervals resample images. answer_type: "yes/no", "number", "other";
    question_type: its first words, such as "what is the"; "" if unknown.
    """

    question: int
    answers: tuple[str, ...]
    image: int | str = ""
    answer_type: str = ""
    question_type: str = ""


def without_punctuation(text: str) -> str:
    """Replaces each mark of `PUNCTUATION` by a space; deletes it if the text has it beside a space, or has a comma
    between digits anywhere. Then deletes periods, except before a digit."""
    grouped, marked = GROUPED_DIGITS.search(text) is not None, text
    for mark in PUNCTUATION:
        spaced = f"{mark} " in text or f" {mark}" in text
        marked = marked.replace(mark, "" if grouped or spaced else " ")
    return PERIOD.sub("", marked, count=PERIODS)


def normalised(text: str) -> str:
    """A prediction without punctuation and articles, in lower case, with numbers up to ten as digits."""
    bare = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBERS.get(word, word) for word in bare.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def comparable(answers: Sequence[str]) -> list[str]:
    """Human answers in the form with which a normalised prediction is compared."""
    return [without_punctuation(answer) for answer in answers] if len(set(answers)) > 1 else list(answers)


def accuracy(matches: int, n: int) -> float:
    """Accuracy, from 0 to 1, of a prediction that `matches` of n people gave: the mean, over leaving out each person,
    of min(1, matches among the others / 3). For ten people: 0, .3, .6, .9, and 1 from four on."""
    left_out_matches = min(1.0, max(matches - 1, 0) / 3)
    return (matches * left_out_matches + (n - matches) * min(1.0, matches / 3)) / n


def vqa_scores(predictions: Sequence[str], questions: Sequence[HumanAnswers]) -> dict[str, Score]:
    """ "accuracy" in percent, and that of each known answer type and question type: "accuracy_answer_yes_no",
    "accuracy_question_what_is_the" ...

    The script prints two decimals. Intervals resample images. Chance: the best constant answer.
    Raises MmjaxError if predictions and questions differ in number, there are none, or a question has fewer than two
    answers.
    """
    if not questions or len(predictions) != len(questions):
        raise MmjaxError(f"{len(predictions)} answers for {len(questions)} questions: expected one per question")
    values = np.empty(len(questions))
    guesses: dict[str, float] = collections.defaultdict(float)
    for index, (text, question) in enumerate(zip(predictions, questions)):
        n = len(question.answers)
        if n < 2:
            raise MmjaxError(f"question {question.question}: {n} answers; leaving one out needs two")
        counts = collections.Counter(comparable(question.answers))
        values[index] = accuracy(counts[normalised(text)], n)
        for answer, count in counts.items():
            guesses[answer] += accuracy(count, n)
    best = max((value for answer, value in guesses.items() if normalised(answer) == answer), default=0.0)
    scores = {"accuracy": _mean(values, questions, range(len(questions)), 100.0 * best / len(questions))}
    for prefix, kinds in (
        ("answer", [question.answer_type for question in questions]),
        ("question", [question.question_type for question in questions]),
    ):
        for kind in sorted({*kinds} - {""}):
            indices = [index for index, question_kind in enumerate(kinds) if question_kind == kind]
            name = re.sub(r"\W+", "_", kind).strip("_")
            scores[f"accuracy_{prefix}_{name}"] = _mean(values, questions, indices)
    return scores


def _mean(
    values: np.ndarray, questions: Sequence[HumanAnswers], indices: Iterable[int], chance: float | None = None
) -> Score:
    selected = list(indices)
    # A question without an image is a group by itself.
    groups = [str(questions[index].image) or f"question {questions[index].question}" for index in selected]
    _, group_index = np.unique(groups, return_inverse=True)
    # Rounded, so that sums of thirds do not depend on the questions' order: equal images are resampled together.
    sums = np.round(np.bincount(group_index, values[selected]), 12)
    return clustered_proportion(sums, np.bincount(group_index), chance)


def read_human_answers(file: str | os.PathLike[str]) -> list[HumanAnswers]:
    """The questions of an official annotation file: {"annotations": [{"question_id", "answers": [{"answer"}, ..],
    "image_id", "answer_type", "question_type"}, ..]}; the last three may be missing.

    Raises MmjaxError naming the file and the field: invalid JSON, a missing field or one of another type, or a
    duplicate id.
    """
    try:
        content = json.loads(pathlib.Path(file).read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise MmjaxError(f"{file}: {error}") from error
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list) or not annotations:
        raise MmjaxError(f"{file}: expected an object with a non-empty list 'annotations'")
    questions = [_question(row, f"{file}: annotations[{index}]") for index, row in enumerate(annotations)]
    _once(str(file), [question.question for question in questions])
    return questions


def _question(row: Any, location: str) -> HumanAnswers:
    row = row if isinstance(row, dict) else {}
    id, answers = row.get("question_id"), row.get("answers")
    texts_or_none = [answer.get("answer") if isinstance(answer, dict) else None for answer in answers or ()]
    texts = tuple(text for text in texts_or_none if isinstance(text, str))
    if not isinstance(id, int) or not texts or len(texts) < len(texts_or_none):
        raise MmjaxError(
            f"{location}: expected a number 'question_id' and a list 'answers' of objects with a string 'answer'"
        )
    return HumanAnswers(
        id, texts, row.get("image_id", ""), str(row.get("answer_type", "")), str(row.get("question_type", ""))
    )


def _once(name: str, ids: Sequence[int]) -> None:
    id, times = collections.Counter(ids).most_common(1)[0]
    if times > 1:
        raise MmjaxError(f"{name}: question_id {id} occurs {times} times")


def write_submission(file: str | os.PathLike[str], ids: Sequence[int], answers: Sequence[str]) -> None:
    """Writes the challenge server's format: [{"question_id": .., "answer": ..}, ..], answers unchanged.

    Raises MmjaxError if answers and ids differ in number, there are none, or an id occurs twice.
    """
    if not ids or len(answers) != len(ids):
        raise MmjaxError(f"{file}: {len(answers)} answers for {len(ids)} question ids: expected one per id")
    _once(str(file), ids)
    records = [{"question_id": int(id), "answer": answer} for id, answer in zip(ids, answers)]
    pathlib.Path(file).write_text(json.dumps(records) + "\n", "utf-8")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class VqaEvaluation(ScoredEvaluation):
    """`vqa_accuracy`, also for each answer type and question type.

    Attributes:
        answer: (params, state) -> an answer to each question, by ranking or by generation.
        questions: with human answers.
    """

    name: str = "vqa"
    answer: Callable[[Params, Any], Sequence[str]]
    questions: Sequence[HumanAnswers]

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        scores = vqa_scores(self.answer(params, state), self.questions)
        return Outcome({f"{self.name}_{name}": score for name, score in scores.items()}, {})
