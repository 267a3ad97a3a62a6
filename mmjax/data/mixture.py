"""Batches of several sources at once: each step has so many examples of each, from a pipeline of its own.

    mixture = Mixture({"documents": Pipeline(documents, 32, ...), "pairs": Pipeline(pairs, 64, ...)})
    next(iter(mixture))        # {"documents_image": [32, ...], ..., "pairs_image": [64, ...], ...}

The shares of the sources are their batch sizes. Every source has its own epochs, shapes and bad records. The state is
that of all pipelines, so that a run resumes with the batch after its last one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmjax.data.pipeline import Pipeline
from mmjax.errors import MmjaxError


@dataclass(frozen=True)
class Mixture:
    """Pipelines by the name of their source. Raises MmjaxError for none, or one that does not repeat for ever."""

    pipelines: Mapping[str, Pipeline]

    def __post_init__(self) -> None:
        ending = [name for name, pipeline in self.pipelines.items() if pipeline.epochs is not None]
        if not self.pipelines or ending:
            raise MmjaxError(f"a mixture needs pipelines that repeat for ever; epochs is set in {ending or 'none'}")

    def __iter__(self) -> "MixtureIterator":
        return MixtureIterator(self)


class MixtureIterator:
    """The batches of a mixture; each field has the name of its source in front."""

    def __init__(self, mixture: Mixture):
        self._iterators = {name: iter(pipeline) for name, pipeline in mixture.pipelines.items()}

    def __iter__(self) -> "MixtureIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Raises TooManyBadRecords of a source; the state is then that before this batch."""
        state = self.get_state()
        try:
            batches = {name: next(iterator) for name, iterator in self._iterators.items()}
        except MmjaxError:
            self.set_state(state)
            raise
        return {f"{name}_{key}": value for name, batch in batches.items() for key, value in batch.items()}

    @property
    def skipped(self) -> list[str]:
        """The bad records so far, each with its reason."""
        return [record for iterator in self._iterators.values() for record in iterator.skipped]

    def get_state(self) -> dict[str, Any]:
        """The state for `set_state`, as JSON types."""
        return {name: iterator.get_state() for name, iterator in self._iterators.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resumes after the batch at which `state` was taken. Raises MmjaxError for one of other sources."""
        if state.keys() != self._iterators.keys():
            raise MmjaxError(f"this state is of the sources {sorted(state)}; there are {sorted(self._iterators)}")
        for name, iterator in self._iterators.items():
            iterator.set_state(state[name])

    def close(self) -> None:
        """Stops the workers; the next batch starts them again."""
        for iterator in self._iterators.values():
            iterator.close()
