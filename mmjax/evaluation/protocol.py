"""What every evaluation of this folder shares: scores with intervals for `mmjax evaluate`, numbers for the loop."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.evaluation.report import Score, metrics
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
        final_step: the step at which intervals, chance and pictures join the numbers (an experiment's `steps`); None
            for every time.
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
        """name -> number or picture, for the training loop."""
        details = self.final_step is None or int(state.step) >= self.final_step
        outcome = self.evaluate(params, state, pictures=details)
        return metrics(outcome.scores, details) | dict(outcome.counts) | dict(outcome.pictures)
