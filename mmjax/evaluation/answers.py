"""Extractive answers scored as by SQuAD's scripts (Rajpurkar et al. 2016, 2018): exact match and F1 of words.

>>> normalised("The Eiffel Tower, Paris")
'eiffel tower paris'
>>> print(f"{word_f1('in the Eiffel Tower', 'Eiffel Tower'):.2f}")
0.80
"""

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
from mmjax.text.answer_spans import QuestionWindows, best_answers
from mmjax.text.squad import Question
from mmjax.types import ArrayLike, MmjaxError, Params

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, then without articles; single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def word_f1(prediction: str, reference: str) -> float:
    """F1 of the normalised words as bags, from 0 to 1; if either text has no words, 1 if neither has, else 0."""
    one, other = (collections.Counter(normalised(text).split()) for text in (prediction, reference))
    if not one or not other:
        return float(one == other)
    return 2.0 * (one & other).total() / (one.total() + other.total())


def matches(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1), from 0 to 1: the best over the references. Without any reference that has words, "" is right.

    References without words are ignored beside others, as in SQuAD 2.0's script.
    """
    valid = [text for text in references if normalised(text)] or [""]
    exact = max(float(normalised(prediction) == normalised(text)) for text in valid)
    return exact, max(word_f1(prediction, text) for text in valid)


def answer_scores(predictions: Sequence[str], questions: Sequence[Question]) -> dict[str, Score]:
    """ "exact_match" and "f1" in percent; if some questions have no answer, also for each kind of question as
    "..._answered" and "..._unanswered".

    Intervals resample the questions' groups. Chance: a constant guess, the better of "" and the whole context.
    Raises MmjaxError if there are no questions, or predictions and questions differ in number.
    """
    if not questions or len(predictions) != len(questions):
        raise MmjaxError(f"{len(predictions)} answers for {len(questions)} questions: expected one per question")
    values = _values(predictions, questions)
    guesses = (_values([""] * len(questions), questions), _values([q.context for q in questions], questions))
    answered = np.array([any(normalised(text) for text, _ in question.answers) for question in questions])
    kinds = {"": np.ones(len(questions), bool)}
    if not answered.all():
        kinds |= {"_answered": answered, "_unanswered": ~answered}
    scores = {}
    for kind, selected in kinds.items():
        if selected.any():
            _, groups = np.unique(
                [q.group for q, included in zip(questions, selected) if included], return_inverse=True
            )
            for column, name in enumerate(("exact_match", "f1")):
                chance = None if kind else 100.0 * max(guess[:, column].mean() for guess in guesses)
                right = np.bincount(groups, values[selected, column])
                scores[name + kind] = clustered_proportion(right, np.bincount(groups), chance)
    return scores


def _values(predictions: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
    pairs = zip(predictions, questions)
    return np.array([matches(text, [answer for answer, _ in question.answers]) for text, question in pairs])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AnswersEvaluation(ScoredEvaluation):
    """`answers_exact_match` and `answers_f1`; with unanswerable questions also for each kind of question.

    Attributes:
        logits: (params, state, columns [b, ...]) -> [b, l, 2], logits of first and last tokens.
        columns: inputs of `logits`, [n, ...] each. windows: the window of each row.
        questions: with their reference answers.
        longest, null_threshold: see `best_answers`.
    """

    name: str = "answers"
    logits: Encode
    columns: Mapping[str, ArrayLike]
    windows: QuestionWindows
    questions: Sequence[Question]
    longest: int = 30
    null_threshold: float | None = None
    batch_size: int = 64

    @functools.cached_property
    def _extractor(self) -> Extractor:
        return Extractor(self.logits, self.batch_size)

    @functools.cached_property
    def _windows_of_questions(self) -> list[list[int]]:
        """The window indices of each question."""
        indices: list[list[int]] = [[] for _ in self.questions]
        for index, question in enumerate(self.windows.question_indices):
            indices[question].append(index)
        return indices

    def answers(self, params: Params, state: Any) -> list[str]:
        """The best answer to each question; "" for no answer, or where no span is valid."""
        scores = self._extractor(params, state, self.columns, self.name)
        texts = []
        for question, indices in zip(self.questions, self._windows_of_questions):
            starts, ends = np.moveaxis(scores[indices], -1, 0)
            parts = [self.windows.windows[index] for index in indices]
            best = best_answers(question.context, parts, starts, ends, 20, self.longest, self.null_threshold)
            texts.append(best[0].text if best else "")
        return texts

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        scores = answer_scores(self.answers(params, state), self.questions)
        return Outcome({f"{self.name}_{name}": score for name, score in scores.items()}, {})
