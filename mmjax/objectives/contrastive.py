"""Contrastive losses: CLIP's, SigLIP's, InfoNCE against a queue or within the batch; float32, scalars out.

Each takes `axis_name`, under which the batch is cut over devices: the result is then this device's share, whose mean
over devices, in value and in gradient, is the loss of the global batch (features are gathered with their gradient).
Each takes `blocks`: in how many runs of rows the matrix of logits is made; more than 1 never holds the whole of it,
forward or backward, at the price of computing each run of it twice. Values and gradients stay the same.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from mmjax.errors import MmjaxError
from mmjax.types import Array, Float

_product = functools.partial(jnp.matmul, precision="highest")
"""Float32 as it is written: by default TPUs multiply in bfloat16 and GPUs in TF32, which a scale of 100 blows up."""


def clip_loss(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    logit_scale: Float[Array, ""],
    axis_name: str | None = None,
    blocks: int = 1,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Mean of the cross-entropies of images against all texts and of texts against all images (CLIP, figure 3).

    Args:
        image, text: unit vectors; row i of one belongs to row i of the other.
        logit_scale: log of the factor on the cosines, the parameter as it is stored.
        label_smoothing: the share of a label that is spread evenly over the whole batch (arXiv 1512.00567, section 7).

    Both softmaxes come from one matrix: its rows' sums are this device's own, its columns' are added up over devices.
    """
    queries, texts = _scaled(image, logit_scale), _gathered(text, axis_name)

    def run(columns: Array, rows: Array) -> tuple[Array, Array]:
        logits = _product(rows, texts.T)
        return jnp.logaddexp(columns, _logsumexp(logits, 0)), _logsumexp(logits, 1)

    columns, rows = by_rows(run, jnp.full(texts.shape[0], -jnp.inf), queries, blocks)
    if axis_name is not None:
        columns = _logsumexp(jax.lax.all_gather(columns, axis_name), 0)
    positive = jnp.mean(jnp.sum(queries * text.astype(jnp.float32), -1))
    target = positive
    if label_smoothing:
        # The mean of all logits is the product of the means.
        mean_text = jnp.mean(texts, 0)
        mean_query = jnp.mean(queries, 0) if axis_name is None else jax.lax.pmean(jnp.mean(queries, 0), axis_name)
        target = (1 - label_smoothing) * positive + label_smoothing * _product(mean_query, mean_text)
    return (jnp.mean(rows) + jnp.mean(columns)) / 2 - target


def sigmoid_loss(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    axis_name: str | None = None,
    blocks: int = 1,
) -> Float[Array, ""]:
    """SigLIP (arXiv 2303.15343, algorithm 1): each pair a yes or no of its own; summed over texts, mean over images."""
    queries, texts = _scaled(image, logit_scale), _gathered(text, axis_name)

    def run(total: Array, rows: Array) -> tuple[Array, Array]:
        # -log sigmoid(-x) of every pair, as if all were negatives.
        return total + jnp.sum(jax.nn.softplus(_product(rows, texts.T) + logit_bias)), jnp.zeros(rows.shape[0])

    total, _ = by_rows(run, jnp.zeros(()), queries, blocks)
    # A pair that matches gives -log sigmoid(x) = -log sigmoid(-x) - x.
    positive = jnp.sum(queries * text.astype(jnp.float32), -1) + logit_bias
    return total / image.shape[0] - jnp.mean(positive)


def info_nce_logits(
    query: Float[Array, "b d"],
    key: Float[Array, "b d"],
    queue: Float[Array, "q d"],
    temperature: Float[Array, ""] | float,
) -> Float[Array, "b one_and_q"]:
    """MoCo's logits (arXiv 1911.05722, algorithm 1): a query's own key first, then the queue. The label is always 0."""
    query, key, queue = (x.astype(jnp.float32) for x in (query, key, queue))
    positive = jnp.sum(query * key, -1, keepdims=True)
    return jnp.concatenate([positive, _product(query, queue.T)], -1) / temperature


def info_nce(
    query: Float[Array, "b d"],
    key: Float[Array, "b d"],
    queue: Float[Array, "q d"],
    temperature: Float[Array, ""] | float,
    blocks: int = 1,
) -> Float[Array, ""]:
    """Mean cross-entropy of `info_nce_logits` with label 0. Keys and queue are the caller's to stop gradients of.

    The negatives are the queue's alone, so under a mapped axis nothing has to be gathered.
    """
    query, key, queue = (x.astype(jnp.float32) for x in (query / temperature, key, queue))
    positive = jnp.sum(query * key, -1)
    _, negative = by_rows(lambda c, rows: (c, _logsumexp(_product(rows, queue.T), 1)), jnp.zeros(()), query, blocks)
    return jnp.mean(jnp.logaddexp(positive, negative) - positive)


def in_batch_nce(
    query: Float[Array, "b d"],
    key: Float[Array, "b d"],
    temperature: Float[Array, ""] | float,
    axis_name: str | None = None,
    blocks: int = 1,
) -> Float[Array, ""]:
    """Mean cross-entropy of each query against all keys of the global batch, its own being right.

    MoCo v3 (arXiv 2104.02057, algorithm 1) multiplies it by 2 * temperature.
    """
    query = query.astype(jnp.float32) / temperature
    keys = _gathered(key, axis_name)
    _, rows = by_rows(lambda c, rows: (c, _logsumexp(_product(rows, keys.T), 1)), jnp.zeros(()), query, blocks)
    return jnp.mean(rows - jnp.sum(query * key.astype(jnp.float32), -1))


def mutual_information_bound(loss: Float[Array, ""], candidates: int) -> Float[Array, ""]:
    """log N - loss, in nats: what an InfoNCE loss among N candidates proves of mutual information (arXiv 1807.03748,
    section 2.3). It cannot exceed log N."""
    return math.log(candidates) - loss


def in_batch_accuracy(
    query: Float[Array, "b d"], key: Float[Array, "b d"], axis_name: str | None = None, blocks: int = 1
) -> Float[Array, ""]:
    """Share of queries, in [0, 1], that are nearer to their own key than to any other of the global batch.

    A tie is a miss, so features that have collapsed to one point score 0. Without a gradient.
    """
    query, key = jax.lax.stop_gradient((query.astype(jnp.float32), key.astype(jnp.float32)))
    keys = _gathered(key, axis_name)
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * query.shape[0]
    own = first + jnp.arange(query.shape[0])

    def run(carry: Array, rows: tuple[Array, Array]) -> tuple[Array, Array]:
        queries, own = rows
        scores = _product(queries, keys.T)
        mine = jnp.take_along_axis(scores, own[:, None], 1)
        return carry, jnp.sum(scores >= mine, 1) == 1

    return jnp.mean(by_rows(run, jnp.zeros(()), (query, own), blocks)[1].astype(jnp.float32))


def by_rows(run: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: Any, blocks: int) -> tuple[Any, Any]:
    """`run(carry, rows)` -> (carry, values of each row), one block of the rows after the other, recomputed in reverse.

    Values come out in the order of the rows. Raises MmjaxError if `blocks` does not divide the rows.
    """
    size = jax.tree.leaves(rows)[0].shape[0]
    if blocks < 1 or size % blocks:
        raise MmjaxError(f"blocks={blocks} does not divide a batch of {size} rows")
    if blocks == 1:
        return run(carry, rows)
    # Every k-th row: rows that a mesh spreads over devices stay spread in each part.
    parts = jax.tree.map(lambda x: rearrange(x, "(b k) ... -> k b ...", k=blocks), rows)
    carry, values = jax.lax.scan(jax.checkpoint(run, prevent_cse=False), carry, parts)
    return carry, jax.tree.map(lambda x: rearrange(x, "k b ... -> (b k) ..."), values)


def _scaled(x: Array, logit_scale: Array) -> Array:
    return x.astype(jnp.float32) * jnp.exp(logit_scale.astype(jnp.float32))


def _gathered(x: Array, axis_name: str | None) -> Array:
    """All devices' rows, in their order; the gradient goes back to the device that a row came from."""
    x = x.astype(jnp.float32)
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def _logsumexp(x: Array, axis: int) -> Array:
    return jax.nn.logsumexp(x, axis=axis)
