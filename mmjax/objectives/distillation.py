"""Knowledge distillation (Hinton, Vinyals and Dean 2015, arXiv 1503.02531): a student learns a teacher's soft labels.

A teacher's probabilities also show how much a cat looks like a dog, which the label "cat" does not:

    >>> [f"{p:.2f}" for p in soft_labels_of(jnp.array([1.0, 0.0]))]  # a teacher's logits of cat and dog
    ['0.73', '0.27']
    >>> [f"{p:.2f}" for p in soft_labels_of(jnp.array([1.0, 0.0]), temperature=4.0)]
    ['0.56', '0.44']

All losses are float32, one per example (or token), so that the caller chooses how to average. No gradient reaches a
teacher.
"""

import jax
import jax.numpy as jnp

from mmjax.types import Array, Float, Int


def soft_labels_of(logits: Float[Array, "*b c"], temperature: Float[Array, ""] | float = 1.0) -> Float[Array, "*b c"]:
    """softmax(logits / temperature), without a gradient; a higher temperature is nearer to uniform."""
    return jax.nn.softmax(jax.lax.stop_gradient(logits.astype(jnp.float32)) / temperature)


def soft_cross_entropy(
    student: Float[Array, "*b c"], teacher: Float[Array, "*b c"], temperature: Float[Array, ""] | float = 1.0
) -> Float[Array, "*b"]:
    """-sum_c q_c log p_c, where p and q are softmaxes of the student's and teacher's logits over the temperature.

    Its minimum is the entropy of q, its gradient that of `soft_divergence`. ALBEF and BLIP distil with it, at
    temperature 1.
    """
    log_p = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return -jnp.sum(soft_labels_of(teacher, temperature) * log_p, axis=-1)


def soft_divergence(
    student: Float[Array, "*b c"], teacher: Float[Array, "*b c"], temperature: Float[Array, ""] | float = 1.0
) -> Float[Array, "*b"]:
    """KL(q || p) of the same distributions: 0 where student and teacher agree."""
    entropy = soft_cross_entropy(jax.lax.stop_gradient(teacher), teacher, temperature)
    return soft_cross_entropy(student, teacher, temperature) - entropy


def distillation_loss(
    student: Float[Array, "*b c"],
    teacher: Float[Array, "*b c"],
    labels: Int[Array, "*b"],
    temperature: Float[Array, ""] | float = 4.0,
    alpha: Float[Array, ""] | float = 0.9,
) -> Float[Array, "*b"]:
    """(1 - alpha) * cross-entropy of the labels + alpha * temperature^2 * KL(teacher || student) (section 2).

    Args:
        student, teacher: logits, before any temperature.
        labels: class indices; outside [0, c) the value is NaN, which a train step refuses.
        temperature: divides both in the soft part. Its gradients shrink with 1 / temperature^2: hence the factor.
        alpha: share of the soft part: 0 learns from the labels only, 1 from the teacher only.
    """
    soft = temperature**2 * soft_divergence(student, teacher, temperature)
    return alpha * soft + (1 - alpha) * _label_cross_entropy(student, labels)


def distilled_cross_entropy(
    student: Float[Array, "*b c"],
    teacher: Float[Array, "*b c"],
    labels: Int[Array, "*b"],
    alpha: Float[Array, ""] | float,
) -> Float[Array, "*b"]:
    """(1 - alpha) * cross-entropy of the labels + alpha * `soft_cross_entropy`, at temperature 1.

    ALBEF's momentum distillation (arXiv 2107.07651, section 3.3), for classes (models/model_ve.py, model_nlvr.py) and,
    in `language`, for tokens. Its gradient is that of `distillation_loss` at temperature 1; its value is larger by
    alpha times the teacher's entropy. A label outside [0, c) gives NaN.
    """
    return (1 - alpha) * _label_cross_entropy(student, labels) + alpha * soft_cross_entropy(student, teacher)


def _label_cross_entropy(logits: Array, labels: Array) -> Array:
    """-log softmax(logits) at the label; NaN where the label is outside [0, c)."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    valid = (labels >= 0) & (labels < log_p.shape[-1])
    label_log_p = jnp.take_along_axis(log_p, jnp.where(valid, labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(valid, label_log_p, jnp.nan)
