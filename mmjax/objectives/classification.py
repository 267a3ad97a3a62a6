"""Losses and hits of classifiers: one value an example, so that the caller chooses how to average."""

import jax
import jax.numpy as jnp

from mmjax.types import Array, Float, Int


def soft_labels(labels: Int[Array, "b"], classes: int) -> Float[Array, "b c"]:
    """Class numbers -> float32 rows with a one; a number outside [0, classes) gives a row of zeros."""
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32)


def smooth(targets: Float[Array, "b c"], smoothing: Float[Array, ""] | float) -> Float[Array, "b c"]:
    """Moves a share of each row's mass to all classes alike: (1 - s) t + s / c (arXiv 1512.00567, section 7)."""
    return (1 - smoothing) * targets + smoothing / targets.shape[-1]


def softmax_cross_entropy(
    logits: Float[Array, "b c"],
    targets: Int[Array, "b"] | Float[Array, "b c"],
    smoothing: Float[Array, ""] | float = 0.0,
) -> Float[Array, "b"]:
    """-sum_c t_c log softmax(logits)_c, in float32 (torch's `CrossEntropyLoss(label_smoothing=...)`, before its mean).

    targets: class numbers, which never become one-hot rows, or soft labels.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    if targets.ndim == logits.ndim:
        return -jnp.sum(smooth(targets, smoothing) * log_p, axis=-1)
    told = jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
    return -((1 - smoothing) * told + smoothing * jnp.mean(log_p, axis=-1))


def sigmoid_cross_entropy(
    logits: Float[Array, "b c"],
    targets: Int[Array, "b"] | Float[Array, "b c"],
    smoothing: Float[Array, ""] | float = 0.0,
) -> Float[Array, "b"]:
    """Each class a question of its own, summed over them (big_vision `utils.py`, sigmoid_xent; ViT on ImageNet-21k).

    targets: class numbers, or for each class how true it is, in [0, 1].
    """
    logits = logits.astype(jnp.float32)
    targets = targets if targets.ndim == logits.ndim else soft_labels(targets, logits.shape[-1])
    targets = smooth(targets, smoothing)
    return -jnp.sum(targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits), axis=-1)


def hits(logits: Float[Array, "b c"], targets: Int[Array, "b"] | Float[Array, "b c"], k: int = 1) -> Float[Array, "b"]:
    """1.0 where the class (of soft labels the largest) is among the k largest logits, else 0.0.

    Classes that tie with it count against it, so a network that says nothing has no hits; with fewer than k classes
    all count.
    """
    labels = jnp.argmax(targets, axis=-1) if targets.ndim == logits.ndim else targets
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    others = jnp.sum(~(logits < own), axis=-1) - 1  # so written, NaN is never a hit
    return (others < k).astype(jnp.float32)
