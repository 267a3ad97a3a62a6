"""The one train step. It knows no system."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmjax import tree
from mmjax.training.accumulate import batch_gradient
from mmjax.training.ema import update_ema
from mmjax.training.method import Loss, Method
from mmjax.training.optimizer import Optimizer
from mmjax.training.queue import write
from mmjax.training.state import Carry, Skipped, TrainState
from mmjax.types import Array, Batch, Bool, Means, Metrics, Params


def train_step(
    method: Method,
    optimizer: Optimizer,
    state: TrainState,
    batch: Batch,
    axis_name: str | None = None,
    accumulate: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update: momentum parameters, loss, gradients, optimizer, carry.

    Args:
        batch: arrays [b, ...]; under `pmap` a device's share of the global batch.
        axis_name: the mapped axis over which the batch is cut, if there is one.
        accumulate: micro-batches that the batch is cut in; see `batch_gradient`, and `Carry` for what they share.

    Returns:
        The next state and the batch's metrics. If the loss or a gradient is not finite the state comes back unchanged
        but for `step` (so that the next batch draws other random numbers) and the `skipped` counters.
    """
    rng = jax.random.fold_in(state.rng, state.step)
    trainable, frozen = optimizer.partition.split(state.params)

    def moved_ema(ema: Params, params: Params) -> Params:
        return update_ema(ema, params, method.momentum(state.hparams, state.step)) if ema else ema

    def loss(trainable: Params, carry: Carry, batch: Batch, rng: Array) -> tuple[Loss, tuple[Carry, Means]]:
        return method.loss(tree.merge(trainable, frozen), carry, batch, rng, state.step, axis_name)

    before = dataclasses.replace(state.carry, ema=moved_ema(state.ema, state.params))
    grads, metrics, carry = batch_gradient(loss, trainable, before, batch, rng, axis_name, accumulate)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

    def update() -> tuple[Params, Any, Params]:
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable, state.hparams, state.step)
        moved: Any = optax.apply_updates(trainable, updates)
        moved = optimizer.partition.split(method.constrain(tree.merge(moved, frozen)))[0]
        # Once more from the old ones, which are donated: held since the forward pass they would be a second copy.
        return moved, opt_state, moved_ema(state.ema, jax.lax.optimization_barrier(state.params))

    moved, opt_state, ema = _if_finite(finite, update, (trainable, state.opt_state, state.ema))
    skipped = Skipped(
        total=state.skipped.total + ~finite, consecutive=jnp.where(finite, 0, state.skipped.consecutive + 1)
    )
    metrics |= {"gradient_norm": norm, "skipped_updates": skipped.total.astype(jnp.float32)}
    new = dataclasses.replace(
        state,
        step=state.step + 1,
        params=tree.merge(moved, frozen),
        opt_state=opt_state,
        ema=ema,
        queues={name: write(queue, finite) for name, queue in carry.queues.items()},
        stats=_select(finite, carry.stats, state.stats),
        extra=_select(finite, carry.extra, state.extra),
        skipped=skipped,
    )
    return new, metrics


def _if_finite(finite: Bool[Array, ""], update: Callable[[], Any], old: Any) -> Any:
    """`update()` where the condition holds, else `old`.

    On CPU a branch: selected leaf by leaf, XLA copies all of Adam's moments first and fills its caches with what it
    computes, which took 4.5 times as long. Elsewhere a selection: a branch would make a GPU's host wait for the loss.
    """
    return jax.lax.platform_dependent(
        cpu=lambda: jax.lax.cond(finite, update, lambda: old), default=lambda: _select(finite, update(), old)
    )


def _select(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` where the condition holds, else `old`; leaves that no step changes are passed on untouched."""
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(condition, a, b), new, old)
