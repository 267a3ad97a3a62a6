"""Embeddings of inputs."""

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.nn.transformer import Dense, Initializer
from mmjax.types import Array, Float


class PatchEmbed(nn.Module):
    """Non-overlapping patches -> vectors: a convolution with stride = kernel, written as reshape and matmul.

    Params: projection/kernel [patch * patch * c, features], rows in the order (row, column, channel); projection/bias.
    """

    features: int
    patch: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, image: Float[Array, "b height width c"]) -> Float[Array, "b rows columns d"]:
        """Raises MmjaxError for a side that the patch does not divide."""
        height, width, p = image.shape[1], image.shape[2], self.patch
        if height % p or width % p:
            raise MmjaxError(f"an image of {height} x {width} pixels cannot be cut into patches of {p} x {p}")
        patches = rearrange(image, "b (r p) (s q) c -> b r s (p q c)", p=p, q=p)
        return Dense(self.features, self.use_bias, self.dtype, self.kernel_init, name="projection")(patches)
