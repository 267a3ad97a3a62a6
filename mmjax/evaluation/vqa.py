"""Answers to questions about images as the VQA challenge scores them (Antol et al. 2015): against ten people's answers.

The rules are those of the official script at GT-Vision-Lab/VQA c4e6a0e, which ALBEF and LAVIS carry, oddities included:
predictions are normalised in full, people's answers lose punctuation alone, and only where they are not all the same.
So a person's "the dog", "two" or "Yes" is never matched.
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
"""The script means to spare a period between digits, but its look-behind is misspelt: digits before protect nothing."""
PERIODS = 32
"""So many periods are removed at most: the script gives a flag, `re.UNICODE`, where `sub` takes a count."""
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
    """Words that lack one apostrophe -> as they should be. Those with a capital I never meet a word in lower case."""
    found = {word.replace("'", ""): word for word in ONE_APOSTROPHE.split()}
    for word in (*TWO_APOSTROPHES.split(), "y'all'd've"):
        for place in (match.start() for match in re.finditer("'", word)):
            found[word[:place] + word[place + 1 :]] = word
    # The script's own three: the middle one is wrong in it, and stays so.
    for short in ("ow's'at", "'ows'at", "'ow'sat"):
        found[short] = "'ow's'at"
    return found | {"somebody'd": "somebodyd", "let's": "let's", "she's": "she's"}


CONTRACTIONS = _contractions()


@dataclasses.dataclass(frozen=True)
class HumanAnswers:
    """What people answered to a question.

    question: its id. image: that of its image; intervals resample images. answer_type: "yes/no", "number", "other";
    question_type: how it begins, "what is the"; "" where not given.
    """

    question: int
    answers: tuple[str, ...]
    image: int | str = ""
    answer_type: str = ""
    question_type: str = ""


def without_punctuation(text: str) -> str:
    """Each mark of `PUNCTUATION` becomes a space; it goes without one where the text has it beside a space, or a comma
    between digits anywhere. Then periods go, but those before a digit."""
    grouped, marked = GROUPED_DIGITS.search(text) is not None, text
    for mark in PUNCTUATION:
        spaced = f"{mark} " in text or f" {mark}" in text
        marked = marked.replace(mark, "" if grouped or spaced else " ")
    return PERIOD.sub("", marked, count=PERIODS)


def normalised(text: str) -> str:
    """A prediction as it is compared: without punctuation and articles, in lower case, numbers up to ten as digits."""
    bare = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBERS.get(word, word) for word in bare.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def comparable(answers: Sequence[str]) -> list[str]:
    """People's answers as a normalised prediction is compared with them."""
    return [without_punctuation(answer) for answer in answers] if len(set(answers)) > 1 else list(answers)


def accuracy(matches: int, n: int) -> float:
    """From 0 to 1, of a prediction that `matches` of n people gave: the mean, over leaving out each of them, of
    min(1, matches among the others / 3). Of ten: 0, .3, .6, .9, and 1 from four on."""
    left_out_matches = min(1.0, max(matches - 1, 0) / 3)
    return (matches * left_out_matches + (n - matches) * min(1.0, matches / 3)) / n


def vqa_scores(found: Sequence[str], questions: Sequence[HumanAnswers]) -> dict[str, Score]:
    """ "accuracy" in percent; where they are given also of each answer type and each question type:
    "accuracy_answer_yes_no", "accuracy_question_what_is_the" ...

    The script prints two decimals. Intervals resample images. Chance: one answer to all, the best there is.
    Raises MmjaxError for another number of answers than questions, none, or a question with fewer than two answers.
    """
    if not questions or len(found) != len(questions):
        raise MmjaxError(f"{len(found)} answers for {len(questions)} questions: want as many, and some")
    values = np.empty(len(questions))
    guesses: dict[str, float] = collections.defaultdict(float)
    for place, (text, question) in enumerate(zip(found, questions)):
        n = len(question.answers)
        if n < 2:
            raise MmjaxError(f"question {question.question}: {n} answers; leaving one out needs two")
        counts = collections.Counter(comparable(question.answers))
        values[place] = accuracy(counts[normalised(text)], n)
        for answer, count in counts.items():
            guesses[answer] += accuracy(count, n)
    best = max((value for answer, value in guesses.items() if normalised(answer) == answer), default=0.0)
    scores = {"accuracy": _mean(values, questions, range(len(questions)), 100.0 * best / len(questions))}
    for prefix, kinds in (
        ("answer", [question.answer_type for question in questions]),
        ("question", [question.question_type for question in questions]),
    ):
        for kind in sorted({*kinds} - {""}):
            rows = [row for row, own in enumerate(kinds) if own == kind]
            name = re.sub(r"\W+", "_", kind).strip("_")
            scores[f"accuracy_{prefix}_{name}"] = _mean(values, questions, rows)
    return scores


def _mean(
    values: np.ndarray, questions: Sequence[HumanAnswers], rows: Iterable[int], chance: float | None = None
) -> Score:
    chosen = list(rows)
    # A question without an image is drawn alone.
    drawn = [str(questions[row].image) or f"question {questions[row].question}" for row in chosen]
    _, places = np.unique(drawn, return_inverse=True)
    # Rounded, so that sums of thirds do not depend on the questions' order: images that are equal are drawn as one.
    sums = np.round(np.bincount(places, values[chosen]), 12)
    return clustered_proportion(sums, np.bincount(places), chance)


def read_human_answers(file: str | os.PathLike[str]) -> list[HumanAnswers]:
    """The questions of an official annotation file: {"annotations": [{"question_id", "answers": [{"answer"}, ..],
    "image_id", "answer_type", "question_type"}, ..]}; the last three may be missing.

    Raises MmjaxError naming the file and the place: not JSON, a field that is missing or of another type, an id twice.
    """
    try:
        told = json.loads(pathlib.Path(file).read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise MmjaxError(f"{file}: {error}") from error
    rows = told.get("annotations") if isinstance(told, dict) else None
    if not isinstance(rows, list) or not rows:
        raise MmjaxError(f"{file}: want an object with 'annotations', a list of some")
    found = [_question(row, f"{file}: annotations[{place}]") for place, row in enumerate(rows)]
    _once(str(file), [question.question for question in found])
    return found


def _question(row: Any, place: str) -> HumanAnswers:
    row = row if isinstance(row, dict) else {}
    id, answers = row.get("question_id"), row.get("answers")
    told = [answer.get("answer") if isinstance(answer, dict) else None for answer in answers or ()]
    texts = tuple(text for text in told if isinstance(text, str))
    if not isinstance(id, int) or not texts or len(texts) < len(told):
        raise MmjaxError(f"{place}: want 'question_id', a number, and 'answers', objects with a string 'answer'")
    return HumanAnswers(
        id, texts, row.get("image_id", ""), str(row.get("answer_type", "")), str(row.get("question_type", ""))
    )


def _once(name: str, ids: Sequence[int]) -> None:
    id, times = collections.Counter(ids).most_common(1)[0]
    if times > 1:
        raise MmjaxError(f"{name}: question_id {id} comes {times} times")


def write_submission(file: str | os.PathLike[str], ids: Sequence[int], found: Sequence[str]) -> None:
    """What the challenge's server takes: [{"question_id": .., "answer": ..}, ..], answers as they are.

    Raises MmjaxError for another number of answers than ids, none, or an id twice.
    """
    if not ids or len(found) != len(ids):
        raise MmjaxError(f"{file}: {len(found)} answers for {len(ids)} question ids: want as many, and some")
    _once(str(file), ids)
    rows = [{"question_id": int(id), "answer": answer} for id, answer in zip(ids, found)]
    pathlib.Path(file).write_text(json.dumps(rows) + "\n", "utf-8")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class VqaEvaluation(ScoredEvaluation):
    """`vqa_accuracy`, and the same of each type of answer and of question.

    Attributes:
        answer: (params, state) -> an answer to each question, by ranking or by generation.
        questions: with people's answers.
    """

    name: str = "vqa"
    answer: Callable[[Params, Any], Sequence[str]]
    questions: Sequence[HumanAnswers]

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        scores = vqa_scores(self.answer(params, state), self.questions)
        return Outcome({f"{self.name}_{name}": score for name, score in scores.items()}, {})
