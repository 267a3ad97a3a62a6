"""Random erasing (arXiv 1708.04896): with some probability a rectangle of an image is blank; on the device."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mmjax.training.augment import draw_box, to_unit
from mmjax.types import Array, Batch, Bool, PRNGKeyArray


def erased_box(
    key: PRNGKeyArray,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> Bool[Array, "height width"]:
    """The mask of a random rectangle, smaller than the image in both axes, or an empty mask.

    It is torchvision's `RandomErasing.get_params`.

    size: (height, width) of the image. scale: share of its area. ratio: height / width, log-uniform.
    """
    height, width = size
    width_by_height = (1 / ratio[1], 1 / ratio[0])
    (top, left, h, w), is_valid = draw_box(
        key, size, scale, width_by_height, lambda hs, ws: (hs < height) & (ws < width)
    )
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    return (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w) & is_valid


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
            apply_key, box_key = jax.random.split(key)
            pixels = (to_unit(image) - jnp.asarray(self.mean)) / jnp.asarray(self.std)
            blank = erased_box(box_key, (image.shape[0], image.shape[1])) & jax.random.bernoulli(apply_key, self.p)
            return jnp.where(blank[..., None], 0.0, pixels)

        return {**batch, "image": jax.vmap(one)(keys, batch["image"])}
