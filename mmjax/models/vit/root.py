"""The ResNet before a hybrid ViT (vit_jax/models_resnet.py): BiT's convolutions, but normalisation after them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mmjax.nn.activation import relu
from mmjax.nn.convolution import conv, max_pool
from mmjax.types import Array, Float


@dataclasses.dataclass(frozen=True)
class RootConfig:
    """The config of a root. layers: units of each block; (): the stem alone (R+Ti/16). width: channels of the stem."""

    layers: tuple[int, ...] = (3, 4, 9)
    width: int = 64

    @property
    def stride(self) -> int:
        """The factor by which the root shrinks an image; also 4 without blocks."""
        return 4 * 2 ** max(len(self.layers) - 1, 0)


class StdConv(nn.Module):
    """Convolution by a kernel standardised at every call, over all but its last axis. Param: kernel, HWIO.

    Padding is TensorFlow's SAME: at stride 2 an even side gets one pixel less before than after.
    """

    features: int
    kernel_size: int
    strides: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b rows columns k"]:
        size = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), size)
        kernel = kernel - kernel.mean((0, 1, 2))
        kernel = kernel / (kernel.std((0, 1, 2)) + 1e-5)
        x = jnp.pad(x.astype(self.dtype), same_padding(x.shape, self.kernel_size, self.strides))
        return conv(x, kernel.astype(self.dtype), strides=self.strides)


def same_padding(shape: tuple[int, ...], size: int, stride: int) -> list[tuple[int, int]]:
    """The padding of [b, height, width, c] with which a window of `size` has ceil(side / stride) positions."""
    totals = [max((-(-side // stride) - 1) * stride + size - side, 0) for side in shape[1:3]]
    return [(0, 0), *((total // 2, total - total // 2) for total in totals), (0, 0)]


class Unit(nn.Module):
    """Bottleneck: 1x1, 3x3 with the stride, 1x1 to four times the width; ReLU after the sum."""

    width: int
    strides: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b rows columns k"]:
        def step(x: Array, name: str, features: int, size: int, strides: int = 1) -> Array:
            x = StdConv(features, size, strides, self.dtype, name=f"conv{name}")(x)
            return nn.GroupNorm(32, epsilon=1e-6, dtype=self.dtype, name=f"gn{name}")(x)

        shortcut = x
        if x.shape[-1] != 4 * self.width or self.strides != 1:
            shortcut = step(x, "_proj", 4 * self.width, 1, self.strides)
        y = relu(step(x, "1", self.width, 1))
        y = relu(step(y, "2", self.width, 3, self.strides))
        return relu(step(y, "3", 4 * self.width, 1) + shortcut)


class Root(nn.Module):
    """Paths: conv_root, gn_root, block{i}_unit{j}/{conv1,gn1,...,conv_proj,gn_proj}; i and j count from 1."""

    config: RootConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b height width 3"]) -> Float[Array, "b rows columns c"]:
        width = self.config.width
        x = StdConv(width, 7, 2, self.dtype, name="conv_root")(x)
        x = relu(nn.GroupNorm(32, epsilon=1e-6, dtype=self.dtype, name="gn_root")(x))
        # After the ReLU no value is below the zeros of the padding: they act as minus infinity.
        x = max_pool(jnp.pad(x, same_padding(x.shape, 3, 2)), 3, 2)
        for block, units in enumerate(self.config.layers, start=1):
            for unit in range(1, units + 1):
                strides = 2 if unit == 1 and block > 1 else 1
                x = Unit(width * 2 ** (block - 1), strides, self.dtype, name=f"block{block}_unit{unit}")(x)
        return x
