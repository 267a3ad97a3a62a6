"""Images within prompts: rows of a table of visual features in place of the embeddings of placeholder ids."""

import jax.numpy as jnp

from mmjax.types import Array, Float, Int


def splice(x: Float[Array, "b l d"], features: Float[Array, "m d"], index: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    """x, with features[index] wherever index >= 0. The result has the dtype of x.

    Which row belongs to which position is integer arithmetic on the host, so that one gather serves several images in a
    prompt, prompts without images, tiles, and newlines between rows of patches.
    """
    rows = jnp.take(features, jnp.maximum(index, 0), axis=0, mode="clip").astype(x.dtype)
    return jnp.where((index >= 0)[..., None], rows, x)
