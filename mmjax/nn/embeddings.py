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
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, image: Float[Array, "b height width c"]) -> Float[Array, "b rows columns d"]:
        """Pixels beyond the last whole patch are dropped, as by the convolution.

        Raises MmjaxError for an image smaller than a patch.
        """
        height, width, p = image.shape[1], image.shape[2], self.patch
        if min(height, width) < p:
            raise MmjaxError(f"an image of {height} x {width} pixels is smaller than a patch of {p} x {p}")
        whole = image[:, : height - height % p, : width - width % p]
        patches = rearrange(whole, "b (r p) (s q) c -> b r s (p q c)", p=p, q=p)
        dense = Dense(self.features, self.use_bias, self.dtype, self.kernel_init, self.bias_init, name="projection")
        return dense(patches)
