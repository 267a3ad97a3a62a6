"""Margin losses of metric learning: the classic contrastive loss of pairs, and triplet losses mined within the batch.

    Hadsell, Chopra and LeCun 2006   pairs: "Dimensionality Reduction by Learning an Invariant Mapping"
    FaceNet, arXiv 1503.03832        triplets with a margin, semi-hard negatives
    arXiv 1703.07737                 batch-all and batch-hard mining, the soft margin

All values are float32, one per pair, triplet or anchor, so that the caller chooses how to average. Distances come from
differences, not from products of features: points near each other lose no digits, and no matrix unit rounds them to
bfloat16 or TF32. Where two points coincide, the distance has a gradient of zero instead of NaN.

    >>> features = jnp.array([[0.0, 0.0], [1.0, 0.0], [1.5, 0.0], [4.0, 0.0]])
    >>> triplets = batch_hard_triplets(features, jnp.array([0, 0, 1, 1]), margin=0.2)
    >>> [f"{loss:.1f}" for loss in triplets.losses]  # anchor 1: positive at 1.0, nearest negative at 0.5
    ['0.0', '0.7', '2.2', '0.0']
    >>> print(f"{triplet_mean(triplets).value:.3f}")
    0.725
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmjax.objectives.contrastive import by_rows
from mmjax.types import Array, Bool, Float, Int, Mean

NONE = 1e-30
"""A count that adds nothing to any other."""


class Triplets(NamedTuple):
    """Losses of the triplets mined for each anchor.

    Attributes:
        losses: sum over the anchor's triplets, float32; 0 where it has none.
        counts: number of the anchor's triplets, float32.
    """

    losses: Float[Array, "b"]
    counts: Float[Array, "b"]


def contrastive_loss(
    first: Float[Array, "*b d"],
    second: Float[Array, "*b d"],
    similar: Float[Array, "*b"] | Bool[Array, "*b"] | Int[Array, "*b"],
    margin: Float[Array, ""] | float = 1.0,
) -> Float[Array, "*b"]:
    """y d^2 + (1 - y) max(0, margin - d)^2 of each pair; d is the Euclidean distance (Hadsell et al. 2006, equation 4).

    Here y = 1 means that a pair is similar. The paper's Y is 1 for a dissimilar pair, and its loss has a factor of 1/2.

    Args:
        first, second: features of the pairs, of any scale.
        similar: y, 1 (or true) for a similar pair, 0 for a dissimilar one.
        margin: the distance from which on a dissimilar pair costs nothing.
    """
    square = _squared_distance(first, second)
    y = similar.astype(jnp.float32)
    return y * square + (1 - y) * jnp.square(jax.nn.relu(margin - _root(square)))


def triplet_loss(
    anchor: Float[Array, "*b d"],
    positive: Float[Array, "*b d"],
    negative: Float[Array, "*b d"],
    margin: Float[Array, ""] | float | None = 1.0,
    squared: bool = False,
) -> Float[Array, "*b"]:
    """max(0, d(anchor, positive) - d(anchor, negative) + margin) of each triplet.

    As torch's `TripletMarginLoss(eps=0)` before its mean.

    Args:
        anchor, positive, negative: features; row i of each belongs to triplet i.
        margin: the distance by which the negative must be farther. None: the soft margin log(1 + exp(difference)) of
            arXiv 1703.07737, section 2, which never stops pulling.
        squared: d is the squared Euclidean distance, as in FaceNet.
    """
    near, far = (_distance(_squared_distance(anchor, x), squared) for x in (positive, negative))
    return _hinge(near - far, margin)


def batch_all_triplets(
    features: Float[Array, "b d"],
    labels: Int[Array, "b"],
    margin: Float[Array, ""] | float | None = 0.2,
    squared: bool = False,
    active_only: bool = True,
    axis_name: str | None = None,
    blocks: int = 1,
) -> Triplets:
    """Every (anchor, positive, negative) of the global batch (arXiv 1703.07737, equation 6).

    Args:
        features: of this device's part of the batch.
        labels: class or identity of each row; rows of one label are positives of each other.
        margin, squared: see `triplet_loss`.
        active_only: counts only triplets with a loss above 0, which the paper found to train better, since satisfied
            triplets soon outnumber the others.
        axis_name: mapped axis over which the batch is cut; positives and negatives are gathered with their gradient.
        blocks: number of parts in which anchors are processed; memory is [b / blocks, m, m] for a global batch of m.

    Raises MmjaxError if `blocks` does not divide the rows.
    """

    def mine(distance: Array, positive: Array, negative: Array) -> Triplets:
        valid = positive[:, :, None] & negative[:, None, :]
        losses = jnp.where(valid, _hinge(distance[:, :, None] - distance[:, None, :], margin), 0.0)
        counted = valid & (losses > 0) if active_only else valid
        return Triplets(jnp.sum(losses, (1, 2)), jnp.sum(counted, (1, 2), dtype=jnp.float32))

    return _over_anchors(mine, features, labels, squared, axis_name, blocks)


def batch_hard_triplets(
    features: Float[Array, "b d"],
    labels: Int[Array, "b"],
    margin: Float[Array, ""] | float | None = 0.2,
    squared: bool = False,
    axis_name: str | None = None,
    blocks: int = 1,
) -> Triplets:
    """One triplet per anchor: its farthest positive and its nearest negative (arXiv 1703.07737, equation 5).

    An anchor without a positive or without a negative has no triplet. The arguments are those of `batch_all_triplets`.
    """

    def mine(distance: Array, positive: Array, negative: Array) -> Triplets:
        valid = jnp.any(positive, 1) & jnp.any(negative, 1)
        farthest = jnp.max(jnp.where(positive, distance, -jnp.inf), 1)
        nearest = jnp.min(jnp.where(negative, distance, jnp.inf), 1)
        losses = _hinge(jnp.where(valid, farthest, 0.0) - jnp.where(valid, nearest, 0.0), margin)
        return Triplets(jnp.where(valid, losses, 0.0), valid.astype(jnp.float32))

    return _over_anchors(mine, features, labels, squared, axis_name, blocks)


def semi_hard_triplets(
    features: Float[Array, "b d"],
    labels: Int[Array, "b"],
    margin: Float[Array, ""] | float | None = 0.2,
    squared: bool = True,
    axis_name: str | None = None,
    blocks: int = 1,
) -> Triplets:
    """One triplet per pair of an anchor and a positive: the nearest negative that is farther than the positive.

    (FaceNet, arXiv 1503.03832, section 3.2; margin 0.2 and squared distances of unit vectors are the paper's.) Where
    every negative is nearer than the positive, the farthest of them takes its place, as in TensorFlow's
    `triplet_semihard_loss`. The arguments are those of `batch_all_triplets`.
    """

    def mine(distance: Array, positive: Array, negative: Array) -> Triplets:
        valid = positive & jnp.any(negative, 1, keepdims=True)
        farther = negative[:, None, :] & (distance[:, None, :] > distance[:, :, None])
        semi_hard = jnp.min(jnp.where(farther, distance[:, None, :], jnp.inf), 2)
        farthest = jnp.max(jnp.where(negative, distance, -jnp.inf), 1, keepdims=True)
        chosen = jnp.where(jnp.any(farther, 2), semi_hard, farthest)
        losses = _hinge(jnp.where(valid, distance, 0.0) - jnp.where(valid, chosen, 0.0), margin)
        return Triplets(jnp.sum(jnp.where(valid, losses, 0.0), 1), jnp.sum(valid, 1, dtype=jnp.float32))

    return _over_anchors(mine, features, labels, squared, axis_name, blocks)


def triplet_mean(triplets: Triplets) -> Mean:
    """Mean loss over the counted triplets of this device's anchors.

    A batch without a triplet has a loss and a gradient of zero: its count is `NONE` instead of 0, which would make the
    mean NaN and the update refused.
    """
    count = jax.lax.stop_gradient(jnp.maximum(jnp.sum(triplets.counts), NONE))
    return Mean(jnp.sum(triplets.losses), count)


def _over_anchors(
    mine: Callable[[Array, Array, Array], Triplets],
    features: Array,
    labels: Array,
    squared: bool,
    axis_name: str | None,
    blocks: int,
) -> Triplets:
    """Calls `mine(distance, positive, negative)`, each [anchors, m], for blocks of this device's rows as anchors."""
    features = features.astype(jnp.float32)
    candidates, all_labels, first = features, labels, 0
    if axis_name is not None:
        candidates, all_labels = (jax.lax.all_gather(x, axis_name, tiled=True) for x in (features, labels))
        first = jax.lax.axis_index(axis_name) * len(features)
    positions = jnp.arange(len(all_labels))

    def run(carry: Array, anchors: tuple[Array, Array, Array]) -> tuple[Array, Triplets]:
        rows, label, position = anchors
        same = label[:, None] == all_labels
        positive = same & (position[:, None] != positions)
        distance = _distance(_squared_distance(rows[:, None], candidates[None]), squared)
        return carry, mine(distance, positive, ~same)

    anchors = features, labels, first + jnp.arange(len(features))
    return by_rows(run, jnp.zeros(()), anchors, blocks)[1]


def _squared_distance(x: Array, y: Array) -> Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)), -1)


def _root(square: Array) -> Array:
    """The square root, with a gradient of zero at zero."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _distance(square: Array, squared: bool) -> Array:
    return square if squared else _root(square)


def _hinge(difference: Array, margin: Array | float | None) -> Array:
    return jax.nn.softplus(difference) if margin is None else jax.nn.relu(difference + margin)
