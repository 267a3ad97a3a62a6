"""Segmentation of images: an image encoder, and a linear or a UPerNet-style head on its feature maps."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.models.dense.frozen import in_dtype
from mmjax.models.dense.pyramid import Backbone, Maps, Pyramid, feature_maps, resized
from mmjax.models.vit.network import ViTConfig
from mmjax.nn.activation import relu
from mmjax.nn.convolution import Conv
from mmjax.nn.dropout import Dropout
from mmjax.nn.norm import LayerNorm
from mmjax.nn.transformer import Dense
from mmjax.types import Array, Float


@dataclasses.dataclass(frozen=True)
class SegmentationConfig:
    """Attributes:
    backbone: without a head (num_classes=0).
    classes: of a pixel; the background is one of them.
    head: "linear", of all maps (DINOv2's linear evaluation), or "upernet" (arXiv 1807.10221).
    width, bins, dropout: of the UPerNet head: its channels, the sides of the pooled grids of the coarsest map, and the
        rate before the classifier.
    dtype: of the computation; logits are float32.
    """

    backbone: Backbone
    classes: int
    head: Literal["linear", "upernet"] = "linear"
    width: int = 256
    bins: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Raises MmjaxError for fields that are out of range."""
        if self.classes < 2:
            raise MmjaxError(f"classes={self.classes}: pixels have at least two, with the background")
        if self.head not in ("linear", "upernet"):
            raise MmjaxError(f"head={self.head!r}: linear or upernet")
        if self.backbone.num_classes:
            raise MmjaxError(f"backbone.num_classes={self.backbone.num_classes}: the encoder has no head here")


class LinearHead(nn.Module):
    """The sum over the maps of an affine layer behind a layer norm, at the finest resolution: float32 logits.

    That is one affine layer on all maps side by side, without ever resizing a feature.
    """

    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Maps, train: bool = False) -> Float[Array, "b rows columns c"]:
        del train  # it has no dropout
        size = maps[0].shape[1:3]
        total: Any = 0.0
        for i, x in enumerate(maps):
            x = LayerNorm(dtype=self.dtype, name=f"norm{i}")(x)
            init = nn.initializers.normal(0.01)
            x = Dense(self.classes, i == len(maps) - 1, self.dtype, init, name=f"logits{i}")(x)
            total = total + resized(x.astype(jnp.float32), *size)
        return total


class ConvBlock(nn.Module):
    """Convolution without bias, layer norm, ReLU. UPerNet's norm is of the batch; this one is the same at batch 1."""

    width: int
    size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height width d"]:
        x = Conv(self.width, self.size, padding=self.size // 2, dtype=self.dtype, name="conv")(x)
        return relu(LayerNorm(dtype=self.dtype, name="norm")(x))


class UPerHead(nn.Module):
    """Pooled context of the coarsest map, a top-down path, and all levels fused at the finest: float32 logits.

    Source: Xiao et al. 2018, as mmsegmentation's `UPerHead` has it, but for the norm (`ConvBlock`).
    """

    config: SegmentationConfig
    axis_name: str | None = None

    @nn.compact
    def __call__(self, maps: Maps, train: bool) -> Float[Array, "b rows columns c"]:
        c = self.config

        def block(size: int, name: str) -> ConvBlock:
            return ConvBlock(c.width, size, c.dtype, name=name)

        if isinstance(c.backbone, ViTConfig):
            maps = Pyramid(c.dtype, name="pyramid")(maps)
        coarse = maps[-1]
        height, width = coarse.shape[1:3]
        pooled = [resized(block(1, f"pool{n}")(bin_means(coarse, n)), height, width) for n in c.bins]
        path = [block(3, "context")(jnp.concatenate([coarse, *pooled], -1))]
        for i, x in reversed(list(enumerate(maps[:-1]))):
            path.insert(0, block(1, f"lateral{i}")(x) + resized(path[0], *x.shape[1:3]))
        size = path[0].shape[1:3]
        levels = [block(3, f"level{i}")(x) for i, x in enumerate(path[:-1])] + [path[-1]]
        x = block(3, "fuse")(jnp.concatenate([resized(x, *size) for x in levels], -1))
        x = Dropout(c.dropout, self.axis_name)(x, train)
        return Dense(c.classes, kernel_init=nn.initializers.normal(0.01), name="logits")(x.astype(jnp.float32))


def bin_means(x: Float[Array, "b _ _ c"], n: int) -> Float[Array, "b n n c"]:
    """Means of n x n cells, which overlap where n does not divide the size (torch's adaptive average pooling)."""
    for axis in (1, 2):
        x = jnp.moveaxis(jnp.tensordot(jnp.asarray(_cells(x.shape[axis], n), x.dtype), x, ((1,), (axis,))), 0, axis)
    return x


def _cells(size: int, n: int) -> Float[np.ndarray, "n size"]:
    matrix = np.zeros((n, size), np.float32)
    for i in range(n):
        start, end = i * size // n, -(-(i + 1) * size // n)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def head_of(config: SegmentationConfig, axis_name: str | None = None) -> LinearHead | UPerHead:
    """The module "head", called as (maps, train)."""
    if config.head == "linear":
        return LinearHead(config.classes, config.dtype, name="head")
    return UPerHead(config, axis_name, name="head")


class Segmenter(nn.Module):
    """Images -> float32 logits of each pixel's classes.

    Parameter paths: backbone/..., as of the encoder by itself, and head/... axis_name: the mapped axis that cuts the
    batch.
    """

    config: SegmentationConfig
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        pixels: Float[Array, "b height width 3"],
        train: bool = False,
        train_backbone: bool = False,
        bn_groups: int = 1,
    ) -> Float[Array, "b height width c"]:
        """train: with dropout in the head. train_backbone: with the encoder's own, and statistics of the batch."""
        c = self.config
        maps = feature_maps(in_dtype(c), pixels, train_backbone, bn_groups, self.axis_name)
        return resized(head_of(c, self.axis_name)(maps, train), *pixels.shape[1:3])
