"""Losses of detectors: focal loss of classes, generalised intersection over union of boxes, and FCOS's centre-ness.

A box is given by its distances from a point inside it: left, top, right, bottom.

>>> box = jnp.array([1.0, 1.0, 1.0, 1.0])
>>> float(generalised_iou(box, box)), float(generalised_iou(box, 2 * box))
(1.0, 0.25)
>>> float(centre_ness(box)), float(centre_ness(jnp.array([1.0, 2.0, 4.0, 2.0])))
(1.0, 0.5)
"""

import jax
import jax.numpy as jnp

from mmjax.types import Array, Float


def sigmoid_focal(
    logits: Float[Array, "*b"], targets: Float[Array, "*b"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Array, "*b"]:
    """-a (1 - p)^gamma log p of the right one of two answers, a = alpha for target 1 (Lin et al. 2017), float32."""
    logits = logits.astype(jnp.float32)
    positive = targets * alpha * jax.nn.sigmoid(-logits) ** gamma * jax.nn.softplus(-logits)
    return positive + (1 - targets) * (1 - alpha) * jax.nn.sigmoid(logits) ** gamma * jax.nn.softplus(logits)


def generalised_iou(first: Float[Array, "*b 4"], second: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    """Of two boxes around one point (Rezatofighi et al. 2019), from -1 to 1; 0 where both have no area."""
    inner, outer = jnp.minimum(first, second), jnp.maximum(first, second)
    both, hull = _area(inner), _area(outer)
    union = _area(first) + _area(second) - both
    return both / jnp.maximum(union, 1e-6) - (hull - union) / jnp.maximum(hull, 1e-6)


def _area(distances: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    left, top, right, bottom = jnp.moveaxis(distances, -1, 0)
    return (left + right) * (top + bottom)


def centre_ness(distances: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    """1 at a box's centre, 0 at its border (Tian et al. 2019, equation 3); 0 outside."""
    left, top, right, bottom = jnp.moveaxis(jnp.maximum(distances, 0), -1, 0)
    ratios = [jnp.minimum(a, b) / jnp.maximum(jnp.maximum(a, b), 1e-6) for a, b in ((left, right), (top, bottom))]
    return jnp.sqrt(ratios[0] * ratios[1])
