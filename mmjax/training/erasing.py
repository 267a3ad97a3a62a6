"""Random erasing (arXiv 1708.04896): now and then a rectangle of an image is blank, on the device."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mmjax.training.augment import to_unit
from mmjax.types import Array, Batch, Bool, PRNGKeyArray

TRIES = 10
"""torchvision draws so many rectangles; if none is smaller than the image, nothing is erased."""


def erased_box(
    key: PRNGKeyArray,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> Bool[Array, "height width"]:
    """A random rectangle: torchvision's `RandomErasing.get_params`.

    size: (height, width) of the image. scale: share of its area. ratio: height / width, log-uniform.
    """
    height, width = size
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    area = height * width * jax.random.uniform(area_key, (TRIES,), minval=scale[0], maxval=scale[1])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = jnp.exp(jax.random.uniform(ratio_key, (TRIES,), minval=low, maxval=high))
    heights, widths = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    h, w = heights[first], widths[first]
    top = jnp.floor(jax.random.uniform(top_key) * (height - h + 1))
    left = jnp.floor(jax.random.uniform(left_key) * (width - w + 1))
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w)
    return inside & jnp.any(fits)


@dataclass(frozen=True)
class RandomErasing:
    """For `Augmented`: batch["image"] -> normalised float32, with probability `p` and a rectangle of the mean colour.

    mean, std: of the channels in [0, 1].
    """

    p: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, keys: Array, batch: Batch) -> Batch:
        def one(key: PRNGKeyArray, image: Array) -> Array:
            chance, place = jax.random.split(key)
            pixels = (to_unit(image) - jnp.asarray(self.mean)) / jnp.asarray(self.std)
            blank = erased_box(place, (image.shape[0], image.shape[1])) & jax.random.bernoulli(chance, self.p)
            return jnp.where(blank[..., None], 0.0, pixels)

        return {**batch, "image": jax.vmap(one)(keys, batch["image"])}
