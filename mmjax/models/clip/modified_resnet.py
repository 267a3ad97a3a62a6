"""CLIP's residual network (openai/CLIP model.py:10-154): three stem convolutions, average pools for strides, and
attention for the last pool."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.nn.activation import relu
from mmjax.nn.attention import dot_product_attention
from mmjax.nn.batch_norm import BatchNorm
from mmjax.nn.convolution import Conv, avg_pool
from mmjax.nn.transformer import Dense
from mmjax.types import Array, Float

EXPANSION = 4
torch_conv = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""torch's default for convolutions: uniform within 1/sqrt(fan_in)."""


@dataclass(frozen=True)
class ModifiedResNetConfig:
    """layers: blocks a stage. width: channels after the stem. heads: of the pool; its width is 32 * width."""

    image_size: int = 224
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    width: int = 64
    heads: int = 32

    @property
    def features(self) -> int:
        """Channels of the last feature map."""
        return self.width * 8 * EXPANSION


class ModifiedResNet(nn.Module):
    """Images -> {"layer1" .. "layer4": maps at 1/4 .. 1/32 of the size, "embeds": [b, e], not of unit length}."""

    config: ModifiedResNetConfig
    embed_dim: int
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b height width 3"],
        train: bool = False,
        bn_groups: int = 1,
        axis_name: str | None = None,
    ) -> dict[str, Array]:
        config, dtype = self.config, self.dtype
        norm = Norms(train, bn_groups, axis_name, dtype)
        x = x.astype(dtype)
        for i, (features, strides) in enumerate(((config.width // 2, 2), (config.width // 2, 1), (config.width, 1)), 1):
            conv = Conv(features, 3, strides, 1, dtype=dtype, kernel_init=torch_conv, name=f"conv{i}")
            x = relu(norm(f"bn{i}")(conv(x)))
        x, maps = avg_pool(x, 2, 2), {}
        block = nn.remat(Bottleneck) if self.remat else Bottleneck
        for stage, count in enumerate(config.layers):
            for i in range(count):
                stride = 2 if stage and not i else 1
                x = block(config.width * 2**stage, stride, norm, name=f"layer{stage + 1}_{i}")(x)
            maps[f"layer{stage + 1}"] = x
        pool = AttentionPool(config.heads, self.embed_dim, config.image_size // 32, dtype, name="attnpool")
        return maps | {"embeds": pool(x)}


@dataclass(frozen=True)
class Norms:
    """How every norm of the network is to run; called with a name it is one."""

    train: bool
    groups: int
    axis_name: str | None
    dtype: Any

    def __call__(self, name: str, zero: bool = False) -> BatchNorm:
        return BatchNorm(
            use_running_average=not self.train,
            groups=self.groups,
            axis_name=self.axis_name,
            scale_init=nn.initializers.zeros if zero else nn.initializers.ones,
            dtype=self.dtype,
            name=name,
        )


class Bottleneck(nn.Module):
    """1x1, 3x3, average pool for the stride, 1x1; the shortcut pools too. No convolution has a stride."""

    planes: int
    stride: int
    norm: Norms

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b out_height out_width out"]:
        def conv(features: int, size: int, name: str) -> Conv:
            return Conv(features, size, padding=size // 2, dtype=self.norm.dtype, kernel_init=torch_conv, name=name)

        def shrink(y: Array) -> Array:
            return avg_pool(y, self.stride, self.stride) if self.stride > 1 else y

        out = self.planes * EXPANSION
        y = relu(self.norm("bn1")(conv(self.planes, 1, "conv1")(x)))
        y = relu(self.norm("bn2")(conv(self.planes, 3, "conv2")(y)))
        y = self.norm("bn3", zero=True)(conv(out, 1, "conv3")(shrink(y)))
        if self.stride > 1 or x.shape[-1] != out:
            x = self.norm("shortcut_bn")(conv(out, 1, "shortcut_conv")(shrink(x)))
        return relu(x + y)


class AttentionPool(nn.Module):
    """The mean of all places asks all places and itself (model.py:58-91). Params: positions, q, k, v, out."""

    heads: int
    embed_dim: int
    grid: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b e"]:
        width = x.shape[-1]
        if x.shape[1:3] != (self.grid, self.grid):
            side = 32 * self.grid
            raise MmjaxError(
                f"the pool's positions are for images of {side} x {side}, not {tuple(32 * s for s in x.shape[1:3])}"
            )
        drawn = nn.initializers.normal(width**-0.5)
        x = rearrange(x, "b h w c -> b (h w) c")
        x = jnp.concatenate([jnp.mean(x, 1, keepdims=True), x], 1)  # its position is added after the mean is taken
        x = x + self.param("positions", drawn, (self.grid**2 + 1, width)).astype(self.dtype)

        def project(name: str, value: Array) -> Array:
            dense = Dense(width, dtype=self.dtype, kernel_init=drawn, name=name)
            return rearrange(dense(value), "b n (h k) -> b n h k", h=self.heads)

        mixed = dot_product_attention(project("q", x[:, :1]), project("k", x), project("v", x))
        mixed = rearrange(mixed, "b 1 h k -> b (h k)")
        return Dense(self.embed_dim, dtype=self.dtype, kernel_init=drawn, name="out")(mixed)
