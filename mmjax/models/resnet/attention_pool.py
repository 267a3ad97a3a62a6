"""The attention in place of the last pool of CLIP's residual network (openai/CLIP model.py:58-91)."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mmjax.nn.attention import dot_product_attention
from mmjax.nn.positions import interpolate
from mmjax.nn.transformer import Dense
from mmjax.types import Array, Float


@dataclass(frozen=True)
class AttentionPoolConfig:
    """width: of the output. grid: (rows, columns) of the maps that the position table is made for."""

    heads: int
    width: int
    grid: tuple[int, int]


class AttentionPool(nn.Module):
    """The mean of all positions attends to all positions and itself. Params: positions, q, k, v, out.

    Maps of another grid have the position table interpolated, as open_clip resizes its tables.
    """

    config: AttentionPoolConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b e"]:
        config, width, grid = self.config, x.shape[-1], (x.shape[1], x.shape[2])
        init = nn.initializers.normal(width**-0.5)
        rows, columns = config.grid
        positions = self.param("positions", init, (rows * columns + 1, width))
        positions = interpolate(positions, config.grid, grid, "bicubic_antialias", prefix=1)
        x = rearrange(x, "b h w c -> b (h w) c")
        x = jnp.concatenate([jnp.mean(x, 1, keepdims=True), x], 1)  # its position is added after the mean is taken
        x = x + positions.astype(self.dtype)

        def project(name: str, value: Array) -> Array:
            dense = Dense(width, dtype=self.dtype, kernel_init=init, name=name)
            return rearrange(dense(value), "b n (h k) -> b n h k", h=config.heads)

        mixed = dot_product_attention(project("q", x[:, :1]), project("k", x), project("v", x))
        mixed = rearrange(mixed, "b 1 h k -> b (h k)")
        return Dense(config.width, dtype=self.dtype, kernel_init=init, name="out")(mixed)
