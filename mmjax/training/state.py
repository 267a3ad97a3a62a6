"""What a training run is made of between two steps: one pytree, donated, saved and hashed whole."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mmjax.types import Array, Float, Int, Params, PRNGKeyArray


@struct.dataclass
class Carry:
    """The part of the state, beside parameters, that a method reads and returns.

    Attributes:
        ema: momentum parameters: a subtree of the parameters, with the same paths.
        queues: name -> `mmjax.training.queue.Queue`.
        stats: batch statistics (Flax's "batch_stats"), one subtree an encoder.
        hparams: name -> float32 scalar: what people ablate; arrays, so that a change does not recompile.
    """

    ema: Params
    queues: dict[str, Any]
    stats: Params
    hparams: dict[str, Float[Array, ""]]


@struct.dataclass
class Skipped:
    """Updates refused because the loss or a gradient was not finite."""

    total: Int[Array, ""]
    consecutive: Int[Array, ""]


@struct.dataclass
class TrainState:
    """Named fields, one pytree. What a system does not use is an empty dict."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params
    queues: dict[str, Any]
    stats: Params
    hparams: dict[str, Float[Array, ""]]
    rng: PRNGKeyArray
    skipped: Skipped

    @property
    def carry(self) -> Carry:
        return Carry(self.ema, self.queues, self.stats, self.hparams)


def create_state(method: Any, optimizer: Any, rng: PRNGKeyArray, batch: Any) -> TrainState:
    """The state before the first step.

    Args:
        method: a `mmjax.training.method.Method`.
        optimizer: a `mmjax.training.optimizer.Optimizer`.
        rng: the run's key; initialisation and steps draw from separate folds of it.
        batch: arrays (or ShapeDtypeStructs under `jax.eval_shape`) of the global batch's shapes.
    """
    init_rng, step_rng = jax.random.split(rng)
    params, carry = method.init(init_rng, batch)
    # A separate buffer for each leaf: the state is donated, and one buffer cannot be donated twice.
    ema = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), carry.ema)
    hparams = {name: jnp.asarray(value, jnp.float32) for name, value in carry.hparams.items()}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=ema,
        queues=carry.queues,
        stats=carry.stats,
        hparams=hparams,
        rng=step_rng,
        skipped=Skipped(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
    )
