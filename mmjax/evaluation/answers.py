"""Answers against the right ones as SQuAD's scripts do (Rajpurkar et al. 2016, 2018): exact match and F1 of words."""

import collections
import dataclasses
import functools
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.evaluation.features import Encode, Extractor
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score, clustered_proportion
from mmjax.text.answer_spans import AskedWindows, best_answers
from mmjax.text.squad import Question
from mmjax.types import ArrayLike, MmjaxError, Params

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without (ASCII) punctuation and then articles, single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def word_f1(found: str, wanted: str) -> float:
    """From 0 to 1: F1 of the normalised words, as a bag; where either has none, whether both have none."""
    one, other = (collections.Counter(normalised(text).split()) for text in (found, wanted))
    if not one or not other:
        return float(one == other)
    return 2.0 * (one & other).total() / (one.total() + other.total())


def matches(found: str, wanted: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1), from 0 to 1: the best over the right answers. No right answer, or none that is a word: "" is.

    Answers without words beside others are left out, as in SQuAD 2.0's script.
    """
    right = [text for text in wanted if normalised(text)] or [""]
    exact = max(float(normalised(found) == normalised(text)) for text in right)
    return exact, max(word_f1(found, text) for text in right)


def answer_scores(found: Sequence[str], questions: Sequence[Question]) -> dict[str, Score]:
    """ "exact_match" and "f1" in percent; where some questions have no answer also of both kinds, "..._answered" and
    "..._unanswered".

    Intervals resample the questions' groups. Chance: one guess for all, the better of "" and the whole context.
    Raises MmjaxError for another number of answers than questions, or none.
    """
    if not questions or len(found) != len(questions):
        raise MmjaxError(f"{len(found)} answers for {len(questions)} questions: want as many, and some")
    values = _values(found, questions)
    guesses = (_values([""] * len(questions), questions), _values([q.context for q in questions], questions))
    answered = np.array([any(normalised(text) for text, _ in question.answers) for question in questions])
    kinds = {"": np.ones(len(questions), bool)}
    if not answered.all():
        kinds |= {"_answered": answered, "_unanswered": ~answered}
    scores = {}
    for kind, chosen in kinds.items():
        if chosen.any():
            _, places = np.unique([q.group for q, there in zip(questions, chosen) if there], return_inverse=True)
            for column, name in enumerate(("exact_match", "f1")):
                chance = None if kind else 100.0 * max(guess[:, column].mean() for guess in guesses)
                right = np.bincount(places, values[chosen, column])
                scores[name + kind] = clustered_proportion(right, np.bincount(places), chance)
    return scores


def _values(found: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
    pairs = zip(found, questions)
    return np.array([matches(text, [answer for answer, _ in question.answers]) for text, question in pairs])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AnswersEvaluation(ScoredEvaluation):
    """`answers_exact_match`, `answers_f1`, and where there are questions without an answer the same of either kind.

    Attributes:
        logits: (params, state, columns [b, ...]) -> [b, l, 2], of first and last tokens.
        columns: what it takes, [n, ...] each. asked: the windows that its rows are.
        questions: with their right answers.
        longest, null_threshold: see `best_answers`.
    """

    name: str = "answers"
    logits: Encode
    columns: Mapping[str, ArrayLike]
    asked: AskedWindows
    questions: Sequence[Question]
    longest: int = 30
    null_threshold: float | None = None
    batch_size: int = 64

    @functools.cached_property
    def _extractor(self) -> Extractor:
        return Extractor(self.logits, self.batch_size)

    @functools.cached_property
    def _windows(self) -> list[list[int]]:
        """The rows of each question."""
        rows: list[list[int]] = [[] for _ in self.questions]
        for row, owner in enumerate(self.asked.owners):
            rows[owner].append(row)
        return rows

    def answers(self, params: Params, state: Any) -> list[str]:
        """The best answer to each question; "" where it is none, or where no span fits."""
        scores = self._extractor(params, state, self.columns, self.name)
        texts = []
        for question, rows in zip(self.questions, self._windows):
            starts, ends = np.moveaxis(scores[rows], -1, 0)
            parts = [self.asked.windows[row] for row in rows]
            best = best_answers(question.context, parts, starts, ends, 20, self.longest, self.null_threshold)
            texts.append(best[0].text if best else "")
        return texts

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        scores = answer_scores(self.answers(params, state), self.questions)
        return Outcome({f"{self.name}_{name}": score for name, score in scores.items()}, {})
