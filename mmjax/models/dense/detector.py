"""Detection of things: an image encoder, a pyramid, and FCOS's head on each level (Tian et al. 2019).

A ResNet's last three maps get a feature pyramid (Lin et al. 2017); a ViT's last map the simple pyramid of ViTDet (Li et
al. 2022), at a quarter, a half, once and twice the patches' stride. Norms are layer norms, the same at batch 1.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.models.dense.frozen import in_dtype
from mmjax.models.dense.network import ConvBlock
from mmjax.models.dense.pyramid import LEVELS, Backbone, Maps, Pyramid, feature_maps, resized
from mmjax.models.resnet.network import ResNetConfig, geometries
from mmjax.models.vit.network import ViTConfig
from mmjax.nn.activation import relu
from mmjax.nn.convolution import Conv
from mmjax.types import Array, Float

PRIOR = 0.01
"""The probability that each class's bias begins with, so that the many empty points do not swamp the first steps."""


@dataclasses.dataclass(frozen=True)
class DetectionConfig:
    """Attributes:
    backbone: without a head (num_classes=0).
    classes: of things; there is no background among them.
    width, convs: channels of the pyramid, and 3x3 convolutions of each of the head's two towers.
    coarse: levels behind the encoder's, each at twice the stride (FCOS: 2, P6 and P7; for large images).
    dtype: of the computation; outputs are float32.
    """

    backbone: Backbone
    classes: int
    width: int = 256
    convs: int = 4
    coarse: int = 2
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Raises MmjaxError for fields that are out of range."""
        if self.classes < 1:
            raise MmjaxError(f"classes={self.classes}: a detector has at least one")
        if self.backbone.num_classes:
            raise MmjaxError(f"backbone.num_classes={self.backbone.num_classes}: the encoder has no head here")

    @property
    def strides(self) -> tuple[float, ...]:
        """Pixels between the points of each level, the finest first."""
        if isinstance(self.backbone, ResNetConfig):
            strides, stride = [], 1.0 if self.backbone.stem == "cifar" else 4.0
            for stage in geometries(self.backbone):
                stride *= math.prod(block.stride for block in stage)
                strides.append(stride)
            strides = strides[-3:]
        else:
            strides = [self.backbone.stride * factor for factor in (0.25, 0.5, 1.0, 2.0)]
        return (*strides, *(strides[-1] * 2 ** (i + 1) for i in range(self.coarse)))


class FeaturePyramid(nn.Module):
    """The levels [b, rows, columns, width] of a detector, the finest first."""

    config: DetectionConfig

    @nn.compact
    def __call__(self, maps: Maps) -> Maps:
        c = self.config

        def conv(size: int, name: str, strides: int = 1) -> Conv:
            return Conv(c.width, size, strides, size // 2, use_bias=True, dtype=c.dtype, name=name)

        if isinstance(c.backbone, ViTConfig):
            scaled = Pyramid(c.dtype, name="pyramid")([maps[-1]] * LEVELS)
            levels = [
                ConvBlock(c.width, 3, c.dtype, name=f"level{i}")(ConvBlock(c.width, 1, c.dtype, name=f"lateral{i}")(x))
                for i, x in enumerate(scaled)
            ]
        else:
            path = [conv(1, f"lateral{i}")(x) for i, x in enumerate(maps[-3:])]
            for i in reversed(range(len(path) - 1)):
                path[i] = path[i] + resized(path[i + 1], *path[i].shape[1:3])
            levels = [conv(3, f"level{i}")(x) for i, x in enumerate(path)]
        for i in range(c.coarse):
            levels.append(conv(3, f"coarse{i}", 2)(relu(levels[-1]) if i else levels[-1]))
        return levels


@dataclasses.dataclass(frozen=True)
class Points:
    """The points of all levels, L of them. xy: [L, 2], pixels. strides: [L]. sizes: [L, 2]: the least and the largest
    distance to a side of a box that a level is for (FCOS: 0, 64, 128, ... at strides 8, 16, ...)."""

    xy: Float[np.ndarray, "L 2"]
    strides: Float[np.ndarray, " L"]
    sizes: Float[np.ndarray, "L 2"]


def points_of(strides: tuple[float, ...], grids: list[tuple[int, int]]) -> Points:
    """grids: (rows, columns) of each level."""
    xy, lengths, sizes = [], [], []
    for i, (stride, (rows, columns)) in enumerate(zip(strides, grids, strict=True)):
        y, x = np.meshgrid(np.arange(rows) + 0.5, np.arange(columns) + 0.5, indexing="ij")
        xy.append(np.stack([x.ravel(), y.ravel()], 1) * stride)
        lengths.append(np.full(rows * columns, stride))
        low, high = 8 * strides[i - 1] if i else 0.0, 8 * stride if i < len(strides) - 1 else np.inf
        sizes.append(np.tile([low, high], (rows * columns, 1)))
    joined = (np.concatenate(parts).astype(np.float32) for parts in (xy, lengths, sizes))
    return Points(*joined)


class Towers(nn.Module):
    """The two towers, shared by all levels: class logits [b, n, c], distances [b, n, 4], centre-ness logits [b, n]."""

    config: DetectionConfig

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array, Array]:
        c = self.config
        towers = {}
        for tower in ("class", "box"):
            y = x
            for i in range(c.convs):
                y = ConvBlock(c.width, 3, c.dtype, name=f"{tower}{i}")(y)
            towers[tower] = y

        def out(name: str, features: int, y: Array, bias: float = 0.0) -> Array:
            kernel_init = nn.initializers.normal(0.01)
            y = Conv(features, 3, padding=1, dtype=c.dtype, kernel_init=kernel_init, name=name)(y).astype(jnp.float32)
            y = y + self.param(f"{name}_bias", nn.initializers.constant(bias), (features,))
            return rearrange(y, "b r c d -> b (r c) d")

        logits = out("logits", c.classes, towers["class"], math.log(PRIOR / (1 - PRIOR)))
        return logits, out("distances", 4, towers["box"], 1.0), out("centre", 1, towers["box"])[..., 0]


class DetectionHead(nn.Module):
    """Pyramid and towers on an encoder's maps: the outputs of `Detector`."""

    config: DetectionConfig

    @nn.compact
    def __call__(self, maps: Maps) -> dict[str, Array]:
        c = self.config
        levels = FeaturePyramid(c, name="pyramid")(maps)
        towers = Towers(c, name="towers")
        scales = self.param("scales", nn.initializers.ones, (len(levels),))
        outputs = [towers(x) for x in levels]
        distances = [
            jax.nn.softplus(numbers * scales[i]) * stride
            for i, ((_, numbers, _), stride) in enumerate(zip(outputs, c.strides))
        ]
        points = points_of(c.strides, [(x.shape[1], x.shape[2]) for x in levels])
        return {
            "logits": jnp.concatenate([logits for logits, _, _ in outputs], 1),
            "distances": jnp.concatenate(distances, 1),
            "centre": jnp.concatenate([centre for _, _, centre in outputs], 1),
            "xy": jnp.asarray(points.xy),
            "strides": jnp.asarray(points.strides),
            "sizes": jnp.asarray(points.sizes),
        }


class Detector(nn.Module):
    """Images -> outputs of all L points of all levels, float32.

    logits [b, L, c]; distances [b, L, 4], to the left, upper, right and lower side, in pixels; centre [b, L], logits of
    the centre-ness; and the constants of `Points`: xy [L, 2], strides [L], sizes [L, 2]. Distances are softplus of the
    head's numbers, scaled for each level, times its stride; FCOS takes an exponential.
    Parameter paths: backbone/..., head/... axis_name: the mapped axis that cuts the batch.
    """

    config: DetectionConfig
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "b height width 3"], train_backbone: bool = False, bn_groups: int = 1
    ) -> dict[str, Array]:
        """train_backbone: with the encoder's dropout and statistics of the batch."""
        c = self.config
        maps = feature_maps(in_dtype(c), pixels, train_backbone, bn_groups, self.axis_name)
        return DetectionHead(c, name="head")(maps)
