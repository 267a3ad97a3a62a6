"""The gradient of a batch, at once or from micro-batches: means are divided once, by the counts of the whole batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange

from mmjax.errors import MmjaxError
from mmjax.training.method import Loss, loss_terms, means
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Mean, Means, Metrics, Params, PRNGKeyArray

LossOf: TypeAlias = Callable[[Params, Carry, Batch, PRNGKeyArray], tuple[Loss, tuple[Carry, Means]]]
"""`Method.loss` of the trainable parameters, at one step of one run."""
Counts: TypeAlias = Mapping[str, Array]


def batch_gradient(
    loss: LossOf,
    params: Params,
    carry: Carry,
    batch: Batch,
    rng: PRNGKeyArray,
    axis_name: str | None = None,
    micro_batches: int = 1,
) -> tuple[Params, Metrics, Carry]:
    """(gradients, metrics with "loss", carry) of the global batch.

    What is minimised is the sum over the terms of the loss of total / count, both over all devices and micro-batches.
    Each part is differentiated by itself with the counts of all, and gradients are summed.

    Raises MmjaxError: micro_batches that do not divide the batch.
    """
    run = _at_once if micro_batches == 1 else _one_by_one
    grads, terms, metrics, carry = run(loss, params, carry, batch, rng, axis_name, micro_batches)
    grads, terms, metrics = _over_devices((grads, terms, metrics), axis_name)
    losses = {name: term.value for name, term in terms.items()}
    values = {"loss": sum(losses.values(), jnp.zeros(())), **{name: mean.value for name, mean in metrics.items()}}
    return grads, {**losses, **values}, carry


def _at_once(
    loss: LossOf, params: Params, carry: Carry, batch: Batch, rng: PRNGKeyArray, axis_name: str | None, _: int
) -> Any:
    def counts(terms: dict[str, Mean]) -> Counts:
        return _over_devices(_counts(terms), axis_name)

    return _differentiated(loss, params, carry, batch, rng, counts)


def _one_by_one(
    loss: LossOf,
    params: Params,
    carry: Carry,
    batch: Batch,
    rng: PRNGKeyArray,
    axis_name: str | None,
    micro_batches: int,
) -> Any:
    """A first pass over the micro-batches returns the counts alone. They depend on no parameter, so that the compiled
    program computes only them, and nothing of the network."""
    parts = jnp.arange(micro_batches), _cut(batch, micro_batches)

    def count(part: tuple[Array, Batch]) -> Counts:
        return _counts(loss_terms(loss(params, carry, part[1], jax.random.fold_in(rng, part[0]))[0]))

    counts = _over_devices(_summed(jax.lax.map(count, parts)), axis_name)

    def add(before: Any, part: tuple[Array, Batch]) -> tuple[Any, Any]:
        total, stats, _ = before
        key = jax.random.fold_in(rng, part[0])
        grads, terms, metrics, after = _differentiated(
            loss, params, dataclasses.replace(carry, stats=stats), part[1], key, lambda _: counts
        )
        incoming = {name: queue.incoming for name, queue in after.queues.items()}
        return (jax.tree.map(jnp.add, total, grads), after.stats, after.extra), (terms, metrics, incoming)

    start = jax.tree.map(jnp.zeros_like, params), carry.stats, carry.extra
    (grads, stats, extra), (terms, metrics, incoming) = jax.lax.scan(add, start, parts)
    incoming = jax.tree.map(lambda keys: rearrange(keys, "k b ... -> (b k) ..."), incoming)
    queues = {name: dataclasses.replace(queue, incoming=incoming[name]) for name, queue in carry.queues.items()}
    return grads, _summed(terms), _summed(metrics), dataclasses.replace(carry, stats=stats, extra=extra, queues=queues)


def _differentiated(
    loss: LossOf,
    params: Params,
    carry: Carry,
    batch: Batch,
    rng: PRNGKeyArray,
    counts: Callable[[dict[str, Mean]], Counts],
) -> tuple[Params, dict[str, Mean], dict[str, Mean], Carry]:
    """(gradients, terms of the loss, metrics, carry) of one part."""

    def objective(params: Params) -> tuple[Array, Any]:
        value, (after, metrics) = loss(params, carry, batch, rng)
        terms = loss_terms(value)
        over = counts(terms)
        minimised = sum((term.total / over[name] for name, term in terms.items()), jnp.zeros(()))
        return minimised, (terms, means(metrics), after)

    grads, (terms, metrics, after) = jax.grad(objective, has_aux=True)(params)
    return grads, terms, metrics, after


def _counts(terms: dict[str, Mean]) -> Counts:
    return {name: jax.lax.stop_gradient(term.count) for name, term in terms.items()}


def _over_devices(sums: Any, axis_name: str | None) -> Any:
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def _summed(parts: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.sum(leaf, 0), parts)


def _cut(batch: Batch, micro_batches: int) -> dict[str, Array]:
    for name, leaf in batch.items():
        if leaf.shape[0] % micro_batches:
            raise MmjaxError(f"batch[{name!r}] has {leaf.shape[0]} rows, not a multiple of accumulate={micro_batches}")
    # Every k-th row: a batch that is sharded over devices stays spread over all of them in each micro-batch.
    return {name: rearrange(leaf, "(b k) ... -> k b ...", k=micro_batches) for name, leaf in batch.items()}
