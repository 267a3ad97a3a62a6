"""The base class of all evaluations: scores for `mmjax evaluate`, scores and pictures for the training loop."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.training.scores import Score
from mmjax.types import Params


@dataclasses.dataclass(frozen=True)
class Outcome:
    """scores: name -> Score. counts: name -> number of items. pictures: name -> uint8 [height, width, 3]."""

    scores: Mapping[str, Score]
    counts: Mapping[str, int]
    pictures: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScoredEvaluation(abc.ABC):
    """An `mmjax.training.experiment.Evaluation`. Its compiled functions live as long as the object.

    Attributes:
        name: prefix of its metrics' names.
        every: steps between runs in training; 0: the experiment's `eval_every`.
        final_step: the step (an experiment's `steps`) from which pictures, and intervals that are slow to compute, are
            added; None: always.
    """

    name: str
    every: int = 0
    final_step: int | None = None

    @abc.abstractmethod
    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        """All results of the protocol. state: a TrainState, or whatever the encode functions take."""

    def scores(self, params: Params, state: Any = None) -> dict[str, Score]:
        """name -> Score, with n, interval and chance."""
        return dict(self.evaluate(params, state, pictures=False).scores)

    def run(self, params: Params, state: Any) -> dict[str, Any]:
        """name -> Score, number of items or picture, for the training loop."""
        final = self.final_step is None or int(state.step) >= self.final_step
        outcome = self.evaluate(params, state, pictures=final)
        return dict(outcome.scores) | dict(outcome.counts) | dict(outcome.pictures)
