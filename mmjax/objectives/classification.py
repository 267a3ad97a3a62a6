"""Losses and accuracy of classifiers: one value per example, so that the caller chooses how to average.

>>> logits = jnp.array([[2.0, 0.0], [0.0, 1.0]])
>>> [f"{loss:.3f}" for loss in softmax_cross_entropy(logits, jnp.array([0, 0]))]
['0.127', '1.313']
>>> hits(logits, jnp.array([0, 0])).tolist()
[1.0, 0.0]
"""

import jax
import jax.numpy as jnp

from mmjax.types import Array, Float, Int


def soft_labels(labels: Int[Array, "b"], classes: int) -> Float[Array, "b c"]:
    """One-hot float32 rows of class indices; an index outside [0, classes) gives a row of zeros."""
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32)


def smooth(targets: Float[Array, "*b c"], smoothing: Float[Array, ""] | float) -> Float[Array, "*b c"]:
    """Label smoothing, (1 - s) t + s / c: spreads a share s of each row evenly (arXiv 1512.00567, section 7)."""
    return (1 - smoothing) * targets + smoothing / targets.shape[-1]


def softmax_cross_entropy(
    logits: Float[Array, "*b c"],
    targets: Int[Array, "*b"] | Float[Array, "*b c"],
    smoothing: Float[Array, ""] | float = 0.0,
) -> Float[Array, "*b"]:
    """-sum_c t_c log softmax(logits)_c, in float32 (torch's `CrossEntropyLoss(label_smoothing=...)`, before its mean).

    targets: class indices, which never become one-hot rows, or soft labels.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    if targets.ndim == logits.ndim:
        return -jnp.sum(smooth(targets, smoothing) * log_p, axis=-1)
    target_log_p = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return -((1 - smoothing) * target_log_p + smoothing * jnp.mean(log_p, axis=-1))


def sigmoid_cross_entropy(
    logits: Float[Array, "b c"],
    targets: Int[Array, "b"] | Float[Array, "b c"],
    smoothing: Float[Array, ""] | float = 0.0,
) -> Float[Array, "b"]:
    """Binary cross-entropy summed over classes (big_vision `utils.py`, sigmoid_xent; ViT on ImageNet-21k).

    targets: class indices, or a probability in [0, 1] for each class.
    """
    logits = logits.astype(jnp.float32)
    targets = targets if targets.ndim == logits.ndim else soft_labels(targets, logits.shape[-1])
    targets = smooth(targets, smoothing)
    return -jnp.sum(targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits), axis=-1)


def hits(logits: Float[Array, "b c"], targets: Int[Array, "b"] | Float[Array, "b c"], k: int = 1) -> Float[Array, "b"]:
    """1.0 where the label (the largest of soft labels) is among the k largest logits, else 0.0.

    Ties count against the label, so a constant output scores 0. With fewer than k classes everything is a hit.
    """
    labels = jnp.argmax(targets, axis=-1) if targets.ndim == logits.ndim else targets
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    others = jnp.sum(~(logits < label_logits), axis=-1) - 1  # written so that NaN is never a hit
    return (others < k).astype(jnp.float32)
