"""What a step of an experiment would train: the norm of each parameter's first gradient."""

from typing import Any

import jax
import jax.numpy as jnp

from mmjax import tree
from mmjax.training.accumulate import batch_gradient
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer
from mmjax.training.state import Carry, TrainState
from mmjax.types import Array, Batch, Metrics, Params


def gradient_norms(
    method: Method, optimizer: Optimizer, state: TrainState, batch: Batch, accumulate: int = 1
) -> tuple[dict[str, Any], Metrics]:
    """(the norm of the gradient of each trainable parameter, the metrics of the step) of a batch on one device.

    accumulate: micro-batches, as of `train_step`.
    """
    rng = jax.random.fold_in(state.rng, state.step)
    trainable, frozen = optimizer.partition.split(state.params)

    def loss(trainable: Params, carry: Carry, batch: Batch, rng: Array) -> Any:
        return method.loss(tree.merge(trainable, frozen), carry, batch, rng, state.step, None)

    grads, metrics, _ = batch_gradient(loss, trainable, state.carry, batch, rng, None, accumulate)
    return jax.tree.map(lambda leaf: jnp.linalg.norm(leaf.astype(jnp.float32).ravel()), grads), metrics
