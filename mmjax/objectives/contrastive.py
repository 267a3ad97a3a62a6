"""Contrastive losses of CLIP and SigLIP, and InfoNCE against a queue or within the batch. All return float32 scalars.

axis_name: the mapped axis over which the batch is divided. The result is then this device's share, whose mean over
devices, in value and in gradient, is the loss of the global batch (features are gathered with their gradient).
blocks: the number of row blocks in which the logits matrix is computed. With more than 1 the whole matrix never exists,
forward or backward, and each block is computed twice. Values and gradients stay the same.

    >>> image, text = jnp.eye(3), jnp.eye(3)
    >>> print(f"{clip_loss(image, text, logit_scale=jnp.log(10.0)):.5f}")  # -log(e^10 / (e^10 + 2))
    0.00009
    >>> print(f"{info_nce(image, text, queue=-jnp.eye(3), temperature=0.5):.4f}")
    0.2539
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from mmjax.errors import MmjaxError
from mmjax.objectives.classification import softmax_cross_entropy
from mmjax.objectives.language import IGNORED
from mmjax.types import Array, Float, Int

_product = functools.partial(jnp.matmul, precision="highest")
"""True float32 products: by default TPUs multiply in bfloat16 and GPUs in TF32, and a logit scale of 100 amplifies
their errors."""


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
        logit_scale: log of the factor on the cosines, as the parameter is stored.
        label_smoothing: the share of a label that is spread evenly over the whole batch (arXiv 1512.00567, section 7).

    Both softmaxes come from one matrix: row sums are local to a device, column sums are added up over devices.
    """
    queries, texts = _scaled(image, logit_scale), _gathered(text, axis_name)

    def run(text_lse: Array, queries: Array) -> tuple[Array, Array]:
        logits = _product(queries, texts.T)
        return jnp.logaddexp(text_lse, _logsumexp(logits, 0)), _logsumexp(logits, 1)

    text_lse, image_lse = by_rows(run, jnp.full(texts.shape[0], -jnp.inf), queries, blocks)
    if axis_name is not None:
        text_lse = _logsumexp(jax.lax.all_gather(text_lse, axis_name), 0)
    positive = jnp.mean(jnp.sum(queries * text.astype(jnp.float32), -1))
    target = positive
    if label_smoothing:
        # The mean of all logits is the product of the means.
        mean_text = jnp.mean(texts, 0)
        mean_query = jnp.mean(queries, 0) if axis_name is None else jax.lax.pmean(jnp.mean(queries, 0), axis_name)
        target = (1 - label_smoothing) * positive + label_smoothing * _product(mean_query, mean_text)
    return (jnp.mean(image_lse) + jnp.mean(text_lse)) / 2 - target


def sigmoid_loss(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    axis_name: str | None = None,
    blocks: int = 1,
) -> Float[Array, ""]:
    """SigLIP's loss: binary cross-entropy of every pair, summed over texts, averaged over images.

    (arXiv 2303.15343, algorithm 1.) logit_bias: added to every logit; the other arguments are those of `clip_loss`.
    """
    queries, texts = _scaled(image, logit_scale), _gathered(text, axis_name)

    def run(total: Array, queries: Array) -> tuple[Array, Array]:
        # -log sigmoid(-x) of every pair, as if all were negatives.
        return total + jnp.sum(jax.nn.softplus(_product(queries, texts.T) + logit_bias)), jnp.zeros(len(queries))

    total, _ = by_rows(run, jnp.zeros(()), queries, blocks)
    # A matching pair gives -log sigmoid(x) = -log sigmoid(-x) - x.
    positive = jnp.sum(queries * text.astype(jnp.float32), -1) + logit_bias
    return total / image.shape[0] - jnp.mean(positive)


def info_nce_logits(
    query: Float[Array, "b d"],
    key: Float[Array, "b d"],
    queue: Float[Array, "q d"],
    temperature: Float[Array, ""] | float,
) -> Float[Array, "b one_and_q"]:
    """MoCo's logits (arXiv 1911.05722, algorithm 1): the positive key first, then the queue. The label is always 0."""
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
    """Mean cross-entropy of `info_nce_logits` with label 0. The caller stops the gradients of keys and queue.

    All negatives come from the queue, so under a mapped axis nothing has to be gathered.
    """
    query, key, queue = (x.astype(jnp.float32) for x in (query / temperature, key, queue))
    positive = jnp.sum(query * key, -1)
    _, negative = by_rows(lambda c, block: (c, _logsumexp(_product(block, queue.T), 1)), jnp.zeros(()), query, blocks)
    return jnp.mean(jnp.logaddexp(positive, negative) - positive)


def nearest_query_loss(
    image: Float[Array, "b q d"],
    text: Float[Array, "b d"],
    temperature: Float[Array, ""] | float,
    *,
    label_smoothing: float = 0.0,
    ids: Int[Array, "b"] | None = None,
    detached: bool = False,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Mean of the cross-entropies of images against all texts and of texts against all images, in which an image's
    nearest query counts for each text: BLIP-2 (arXiv 2301.12597, section 3.1; LAVIS blip2_qformer.py:129-171).

    Args:
        image, text: unit vectors; row i of one belongs to row i of the other.
        temperature: divides the cosines.
        label_smoothing: the share of a label that is spread evenly over the whole batch (0.1).
        ids: image id of each pair. All candidates of the same id are positives with equal shares (retrieval). None, or
            `IGNORED`: only the pair itself is positive.
        detached: candidates have no gradient, a row's own neither, as where the original gathers them from several
            processes: a direction then trains the encoder of its queries alone.
    """
    image, text = (x.astype(jnp.float32) for x in (image, text))
    images, texts = _gathered(image, axis_name), _gathered(text, axis_name)
    if detached:
        images, texts = jax.lax.stop_gradient((images, texts))
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(text)
    positive = (first + jnp.arange(len(text)))[:, None] == jnp.arange(len(texts))
    if ids is not None:
        candidates = ids if axis_name is None else jax.lax.all_gather(ids, axis_name, tiled=True)
        positive = positive | ((ids[:, None] == candidates) & (ids != IGNORED)[:, None])
    label = positive / jnp.sum(positive, axis=1, keepdims=True)
    target = (1 - label_smoothing) * label + label_smoothing / len(texts)
    of_images = jnp.max(jnp.einsum("bqd,md->bqm", image, texts, precision="highest"), axis=1) / temperature
    of_texts = jnp.max(jnp.einsum("bd,mqd->bmq", text, images, precision="highest"), axis=2) / temperature
    return jnp.mean(softmax_cross_entropy(of_images, target) + softmax_cross_entropy(of_texts, target)) / 2


def in_batch_nce(
    query: Float[Array, "b d"],
    key: Float[Array, "b d"],
    temperature: Float[Array, ""] | float,
    axis_name: str | None = None,
    blocks: int = 1,
) -> Float[Array, ""]:
    """Mean cross-entropy of each query against all keys of the global batch; key i is the positive of query i.

    MoCo v3 (arXiv 2104.02057, algorithm 1) multiplies it by 2 * temperature.
    """
    query = query.astype(jnp.float32) / temperature
    keys = _gathered(key, axis_name)
    _, lse = by_rows(lambda c, block: (c, _logsumexp(_product(block, keys.T), 1)), jnp.zeros(()), query, blocks)
    return jnp.mean(lse - jnp.sum(query * key.astype(jnp.float32), -1))


def mutual_information_bound(loss: Float[Array, ""], candidates: int) -> Float[Array, ""]:
    """log N - loss, in nats: InfoNCE's lower bound on mutual information with N candidates (arXiv 1807.03748,
    section 2.3). It cannot exceed log N."""
    return math.log(candidates) - loss


def in_batch_accuracy(
    query: Float[Array, "b d"], key: Float[Array, "b d"], axis_name: str | None = None, blocks: int = 1
) -> Float[Array, ""]:
    """Share of queries, in [0, 1], that are nearer to their positive key than to any other key of the global batch.

    A tie is a miss, so features that have collapsed to one point score 0. No gradient flows.
    """
    query, key = jax.lax.stop_gradient((query.astype(jnp.float32), key.astype(jnp.float32)))
    keys = _gathered(key, axis_name)
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * query.shape[0]
    labels = first + jnp.arange(query.shape[0])

    def run(carry: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
        queries, labels = block
        scores = _product(queries, keys.T)
        positive = jnp.take_along_axis(scores, labels[:, None], 1)
        return carry, jnp.sum(scores >= positive, 1) == 1

    return jnp.mean(by_rows(run, jnp.zeros(()), (query, labels), blocks)[1].astype(jnp.float32))


def by_rows(run: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: Any, blocks: int) -> tuple[Any, Any]:
    """Applies `run(carry, rows) -> (carry, values of each row)` to one block of rows after the other.

    The backward pass recomputes each block instead of storing it. Values come out in the order of the rows.
    Raises MmjaxError if `blocks` does not divide the number of rows.
    """
    size = jax.tree.leaves(rows)[0].shape[0]
    if blocks < 1 or size % blocks:
        raise MmjaxError(f"blocks={blocks} does not divide a batch of {size} rows")
    if blocks == 1:
        return run(carry, rows)
    # Every k-th row: rows that a mesh spreads over devices stay spread in each block.
    parts = jax.tree.map(lambda x: rearrange(x, "(b k) ... -> k b ...", k=blocks), rows)
    carry, values = jax.lax.scan(jax.checkpoint(run, prevent_cse=False), carry, parts)
    return carry, jax.tree.map(lambda x: rearrange(x, "k b ... -> (b k) ..."), values)


def _scaled(x: Array, logit_scale: Array) -> Array:
    return x.astype(jnp.float32) * jnp.exp(logit_scale.astype(jnp.float32))


def _gathered(x: Array, axis_name: str | None) -> Array:
    """The rows of all devices, in device order; the gradient goes back to the device of each row."""
    x = x.astype(jnp.float32)
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def _logsumexp(x: Array, axis: int) -> Array:
    return jax.nn.logsumexp(x, axis=axis)
