"""The contract between a system and the one train step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax.numpy as jnp

from mmjax.training.rng import example_keys, named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray

Loss: TypeAlias = Mean | Float[Array, ""] | Means
"""The objective: a mean, or the sum of several named means, each of which is also a metric.

A scalar is the mean of a loss over equal parts of the batch, as `jnp.mean` of a value an example is. A `Mean` is for
counts that differ from part to part: tokens, masked words, pairs with a negative. The step adds totals and counts over
micro-batches and devices and divides once, so that any cut of a batch has the whole batch's gradient.
"""


class Method(Protocol):
    """A pretraining (or fine-tuning) method: the difference between systems.

    Implementations are frozen dataclasses without state. `loss` gets the whole batch, or under `pmap` a device's share
    of it and the name of the axis over which to gather; with accumulation, a micro-batch of it.
    """

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Initial parameters and carry; uses only shapes and dtypes of `batch`, so it runs under `jax.eval_shape`."""
        ...

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        """(the objective, (the carry after this batch, metrics)).

        step: batches before this one, `TrainState.step`: the clock of every schedule.
        The counts of a loss are functions of `batch`, `rng` and `step` alone: the step needs them before the network
        has run. The step takes `stats`, `queues` and `extra` from the returned carry; see `Carry`.
        """
        ...

    def momentum(self, hparams: dict[str, Float[Array, ""]], step: Int[Array, ""]) -> Float[Array, ""]:
        """The share of the old value that momentum parameters retain at this step; not called if there are none."""
        return hparams["momentum"]

    def constrain(self, params: Params) -> Params:
        """The parameters after an update, projected back into their range (a clamped temperature, for example)."""
        return params


Augment = Callable[[PRNGKeyArray, Batch], Batch]
"""(keys [b], batch) -> batch: compiled, and a function of each example's key alone."""


@dataclasses.dataclass(frozen=True)
class Augmented(Method):
    """A method with a device-side augmentation of its batches, compiled into the step.

    Attributes:
        method: the method that receives the augmented batch.
        augment: see `Augment`; each example has its own key, so that any split of the batch over devices agrees.
    """

    method: Method
    augment: Augment

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        return self.method.init(rng, self._augment(rng, batch, None))

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        return self.method.loss(params, carry, self._augment(rng, batch, axis_name), rng, step, axis_name)

    def momentum(self, hparams: dict[str, Float[Array, ""]], step: Int[Array, ""]) -> Float[Array, ""]:
        return self.method.momentum(hparams, step)

    def constrain(self, params: Params) -> Params:
        return self.method.constrain(params)

    def _augment(self, rng: PRNGKeyArray, batch: Batch, axis_name: str | None) -> Batch:
        size = next(iter(batch.values())).shape[0]
        return self.augment(example_keys(named(rng, "augment"), size, axis_name), batch)


def loss_terms(loss: Loss) -> dict[str, Mean]:
    """The named means whose sum is the objective; a single one is called "loss"."""
    return means(loss if isinstance(loss, Mapping) else {"loss": loss})


def loss_value(loss: Loss) -> Float[Array, ""]:
    """The scalar value of a `Loss` of a whole batch."""
    return sum((term.value for term in loss_terms(loss).values()), jnp.zeros(()))


def means(values: Mapping[str, Any]) -> dict[str, Mean]:
    """Scalars as means of one count each. Raises TypeError for arrays: a mean over devices is of scalars."""
    wrong = {name: value.shape for name, value in values.items() if not isinstance(value, Mean) and value.shape != ()}
    if wrong:
        raise TypeError(f"losses and metrics must be scalars or a Mean; these are not: {wrong}")
    return {
        name: value if isinstance(value, Mean) else Mean(value, jnp.ones((), jnp.float32))
        for name, value in values.items()
    }
