"""What every evaluation of this folder shares: scores for `mmjax evaluate`, scores and pictures for the loop."""

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
    """An `mmjax.training.experiment.Evaluation`. Its compiled functions live as long as the object does.

    Attributes:
        name: begins its metrics' names.
        every: steps between runs in training; 0 for the experiment's `eval_every`.
        final_step: the step at which pictures join the scores (an experiment's `steps`), and intervals that are slow to
            compute; None for every time.
    """

    name: str
    every: int = 0
    final_step: int | None = None

    @abc.abstractmethod
    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        """Everything that the protocol finds; `state` is a TrainState or whatever the encode functions take."""

    def scores(self, params: Params, state: Any = None) -> dict[str, Score]:
        """name -> Score, with n, interval and chance."""
        return dict(self.evaluate(params, state, pictures=False).scores)

    def run(self, params: Params, state: Any) -> dict[str, Any]:
        """name -> Score, number of items or picture, for the training loop."""
        final = self.final_step is None or int(state.step) >= self.final_step
        outcome = self.evaluate(params, state, pictures=final)
        return dict(outcome.scores) | dict(outcome.counts) | dict(outcome.pictures)
