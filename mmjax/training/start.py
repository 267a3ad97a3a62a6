"""The state before the first step of an experiment: its shapes, and its leaves, fresh or from `init_from`."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.training.experiment import ExperimentConfig, LoadWeights
from mmjax.training.initialize import initialize_from, origins_of, replaced_leaves
from mmjax.training.lift import initialise
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer
from mmjax.training.state import TrainState, create_state


@dataclasses.dataclass(frozen=True)
class Start:
    """The first state of `config`, for global batches of these shapes."""

    config: ExperimentConfig
    method: Method
    optimizer: Optimizer
    batch_shapes: Mapping[str, jax.ShapeDtypeStruct]

    @functools.cached_property
    def template(self) -> TrainState:
        """The shapes of the state."""
        return jax.eval_shape(self._create, self._rng)

    def state(self, load_weights: LoadWeights) -> tuple[TrainState, dict[str, str], str | None]:
        """(the host state, the source of each parameter, a sentence that reports `init_from`; None without one).

        Raises MmjaxError for weights that do not fit, see `initialize_from`.
        """
        source = ", ".join(self.config.init_sources())
        if not source:
            return initialise(self._create, self._rng), {}, None
        weights = self.config.initial_weights(load_weights)
        host = initialise(self._create, self._rng, replaced_leaves(self.template, weights))
        origins = origins_of(host.params, weights, source)
        partition, constrain = self.optimizer.partition, self.method.constrain
        host, report = initialize_from(host, weights, source, partition, constrain)
        return host, origins, report

    @property
    def _rng(self) -> Any:
        return jax.random.key(self.config.seed)

    def _create(self, rng: Any) -> TrainState:
        batch = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in self.batch_shapes.items()}
        return create_state(self.method, self.optimizer, rng, batch)
