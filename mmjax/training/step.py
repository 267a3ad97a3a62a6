"""The one train step. It knows no system."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.training.ema import update_ema
from mmjax.training.method import Method, check_scalars
from mmjax.training.optimizer import Optimizer
from mmjax.training.state import Carry, Skipped, TrainState
from mmjax.types import Array, Batch, Bool, Metrics, Params


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
        axis_name: the mapped axis over which gradients and metrics are averaged, if there is one.
        accumulate: micro-batches that the batch is cut in; gradients are averaged over them, the carry runs through.

    Returns:
        The next state and the batch's metrics. If the loss or a gradient is not finite the state comes back unchanged
        but for `step` (so that the next batch draws other random numbers) and the `skipped` counters.
    """
    rng = jax.random.fold_in(state.rng, state.step)
    ema = update_ema(state.ema, state.params, method.momentum(state.hparams, state.step)) if state.ema else state.ema
    trainable, frozen = optimizer.partition.split(state.params)

    def loss(trainable: Params, carry: Carry, batch: Batch, rng: Array) -> tuple[Array, tuple[Carry, Metrics]]:
        return method.loss(tree.merge(trainable, frozen), carry, batch, rng, axis_name)

    gradient = _accumulated(jax.value_and_grad(loss, has_aux=True), accumulate)
    (value, (carry, metrics)), grads = gradient(trainable, dataclasses.replace(state.carry, ema=ema), batch, rng)
    metrics = {"loss": value, **metrics}
    check_scalars(metrics)
    if axis_name is not None:
        grads, metrics = jax.lax.pmean((grads, metrics), axis_name)

    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

    def update() -> tuple[Params, Any]:
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable, state.hparams)
        moved: Any = optax.apply_updates(trainable, updates)
        return optimizer.partition.split(method.constrain(tree.merge(moved, frozen)))[0], opt_state

    moved, opt_state = _if_finite(finite, update, (trainable, state.opt_state))
    kept = _select(finite, carry, state.carry)
    skipped = Skipped(
        total=state.skipped.total + ~finite, consecutive=jnp.where(finite, 0, state.skipped.consecutive + 1)
    )
    metrics |= {"gradient_norm": norm, "skipped_updates": skipped.total.astype(jnp.float32)}
    new = dataclasses.replace(
        state,
        step=state.step + 1,
        params=tree.merge(moved, frozen),
        opt_state=opt_state,
        ema=kept.ema,
        queues=kept.queues,
        stats=kept.stats,
        hparams=kept.hparams,
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


def _accumulated(gradient, micro_batches: int):
    """The same gradient function, its batch cut in micro-batches that are run one after another."""
    if micro_batches == 1:
        return gradient

    def mean_gradient(trainable: Params, carry: Carry, batch: Batch, rng: Array):
        for name, leaf in batch.items():
            if leaf.shape[0] % micro_batches:
                raise MmjaxError(
                    f"batch[{name!r}] has {leaf.shape[0]} rows, not a multiple of accumulate={micro_batches}"
                )
        # Every k-th row: a batch that is sharded over devices stays spread over all of them in each micro-batch.
        parts = jax.tree.map(lambda leaf: rearrange(leaf, "(b k) ... -> k b ...", k=micro_batches), dict(batch))

        def body(carry: Carry, part: tuple[Array, Batch]):
            index, micro = part
            (value, (carry, metrics)), grads = gradient(trainable, carry, micro, jax.random.fold_in(rng, index))
            return carry, (value, metrics, grads)

        def add(total, part):
            carry, (value, metrics, grads) = body(total[0], part)
            return (carry, jax.tree.map(jnp.add, total[1], (value, metrics, grads))), None

        first = jax.tree.map(lambda leaf: leaf[0], parts)
        carry, sums = body(carry, (jnp.zeros((), jnp.int32), first))
        rest = (jnp.arange(1, micro_batches), jax.tree.map(lambda leaf: leaf[1:], parts))
        (carry, sums), _ = jax.lax.scan(add, (carry, sums), rest)
        value, metrics, grads = jax.tree.map(lambda leaf: leaf / micro_batches, sums)
        return (value, (carry, metrics)), grads

    return mean_gradient
