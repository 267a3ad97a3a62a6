"""The state of a training run between two steps: one pytree, donated, saved and hashed whole."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mmjax.types import Array, Float, Int, Params, PRNGKeyArray


def _empty() -> Any:
    return struct.field(default_factory=dict)


@struct.dataclass
class Carry:
    """The part of the state, beside parameters, that a method reads and returns.

    A refused update changes nothing of it. Where a batch is accumulated from micro-batches, the momentum
    parameters move once, before the first one; each field documents what else differs.

    Attributes:
        ema: momentum parameters: a subtree of the parameters, with the same paths. A method only reads them.
        queues: name -> `mmjax.training.queue.Queue`. Every micro-batch uses the keys from before the batch. The keys
            of all are written after the last one, in the batch's order: the content of the queue, and the gradient
            against it, do not depend on the number of micro-batches (MoCo, ALBEF: negatives are keys of earlier
            batches).
        stats: batch statistics (Flax's "batch_stats"), one subtree an encoder. They run through the micro-batches: each
            is a forward pass, as in PyTorch, and moves and counts by itself.
        hparams: name -> float32 scalar, the hyper-parameters to ablate; arrays, so that a change does not recompile. A
            method only reads them.
        extra: name -> any other state: averages of statistics, counters, images to be encoded again. Every
            micro-batch gets the value from before the batch and the last one's remains, so a counter counts batches.
    """

    ema: Params = _empty()
    queues: dict[str, Any] = _empty()
    stats: Params = _empty()
    hparams: dict[str, Float[Array, ""]] = _empty()
    extra: dict[str, Any] = _empty()


@struct.dataclass
class Skipped:
    """Updates refused because the loss or a gradient was not finite."""

    total: Int[Array, ""]
    consecutive: Int[Array, ""]


@struct.dataclass
class TrainState:
    """Named fields, one pytree. A field that a system does not use is an empty dict.

    Attributes:
        step: batches so far, including those whose update was refused: the one clock of a run. The learning rate,
            momentum and every other schedule are functions of it, as are the random numbers and the data's position, so
            a schedule ends with the run. Adam's bias correction counts the updates of its moments.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params
    queues: dict[str, Any]
    stats: Params
    hparams: dict[str, Float[Array, ""]]
    extra: dict[str, Any]
    rng: PRNGKeyArray
    skipped: Skipped

    @property
    def carry(self) -> Carry:
        return Carry(self.ema, self.queues, self.stats, self.hparams, self.extra)


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
        extra=carry.extra,
        rng=step_rng,
        skipped=Skipped(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
    )
