"""The contract between a system and the one train step."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from mmjax.training.rng import example_keys, named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Metrics, Params, PRNGKeyArray


class Method(Protocol):
    """A pretraining (or fine-tuning) method: what distinguishes the systems from each other.

    Implementations are frozen dataclasses without state. `loss` sees the whole batch, or under `pmap` a device's share
    of it and the name of the axis over which to gather.
    """

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Fresh parameters and carry; reads only shapes and dtypes of `batch`, so it runs under `jax.eval_shape`."""
        ...

    def loss(
        self, params: Params, carry: Carry, batch: Batch, rng: PRNGKeyArray, axis_name: str | None = None
    ) -> tuple[Float[Array, ""], tuple[Carry, Metrics]]:
        """The scalar to be minimised, the carry after this batch, and scalar metrics (means over the batch)."""
        ...

    def momentum(self, hparams: dict[str, Float[Array, ""]], step: Int[Array, ""]) -> Float[Array, ""]:
        """The share of the old value that the momentum parameters keep at this step; asked only if there are any."""
        return hparams["momentum"]

    def constrain(self, params: Params) -> Params:
        """The parameters after an update, moved back to where they may be (a clamped temperature, say)."""
        return params


Augment = Callable[[PRNGKeyArray, Batch], Batch]
"""(keys [b], batch) -> batch: compiled, and a function of each example's own key alone."""


@dataclasses.dataclass(frozen=True)
class Augmented(Method):
    """A method that sees its batches through a device-side augmentation, compiled into the step.

    Attributes:
        method: the method that receives the augmented batch.
        augment: see `Augment`; each example has its own key, so that any split of the batch over devices agrees.
    """

    method: Method
    augment: Augment

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        return self.method.init(rng, self._augment(rng, batch, None))

    def loss(
        self, params: Params, carry: Carry, batch: Batch, rng: PRNGKeyArray, axis_name: str | None = None
    ) -> tuple[Float[Array, ""], tuple[Carry, Metrics]]:
        return self.method.loss(params, carry, self._augment(rng, batch, axis_name), rng, axis_name)

    def momentum(self, hparams: dict[str, Float[Array, ""]], step: Int[Array, ""]) -> Float[Array, ""]:
        return self.method.momentum(hparams, step)

    def constrain(self, params: Params) -> Params:
        return self.method.constrain(params)

    def _augment(self, rng: PRNGKeyArray, batch: Batch, axis_name: str | None) -> Batch:
        size = next(iter(batch.values())).shape[0]
        return self.augment(example_keys(named(rng, "augment"), size, axis_name), batch)


def check_scalars(metrics: dict[str, Any]) -> None:
    """Raises a TypeError if a metric is not a scalar: means over devices would silently be wrong."""
    wrong = {name: value.shape for name, value in metrics.items() if value.shape != ()}
    if wrong:
        raise TypeError(f"metrics must be scalars; these are not: {wrong}")
