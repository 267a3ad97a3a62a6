"""The feature maps of an image encoder, from fine to coarse: C2 to C5 of a ResNet, four depths of a ViT."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.nn.activation import activation
from mmjax.nn.convolution import max_pool
from mmjax.nn.norm import LayerNorm
from mmjax.nn.positions import resize_matrix
from mmjax.nn.transformer import Dense
from mmjax.types import Array, Float, Params

Backbone: TypeAlias = ResNetConfig | ViTConfig
Maps: TypeAlias = list[Float[Array, "b _ _ _"]]
LEVELS = 4


def without_pooling(config: Backbone, params: Params) -> tuple[Backbone, dict[str, Any]]:
    """A loaded encoder's config and parameters without what follows its feature maps: pooling and heads."""
    unused = ("head", "head_distilled", "pre_logits", "map_head", "attention_pool")
    rest = {name: leaf for name, leaf in params.items() if name not in unused}
    if isinstance(config, ResNetConfig):
        return dataclasses.replace(config, attention_pool=None, num_classes=0), rest
    fields: dict[str, Any] = {"representation": None, "distilled_head": False, "pool": "mean"}
    return dataclasses.replace(config, num_classes=0, **fields), rest


def feature_maps(
    config: Backbone,
    pixels: Float[Array, "b height width 3"],
    train: bool,
    bn_groups: int = 1,
    axis_name: str | None = None,
) -> Maps:
    """The maps [b, rows, columns, c] of the encoder, the module "backbone" of the calling module.

    A ResNet's stages, at strides 4, 8, 16 and 32; the tokens of a ViT's blocks at a quarter, a half, three quarters and
    all of its depth, before the final norm, all at the patches' stride. A shallow encoder has fewer.
    """
    if isinstance(config, ResNetConfig):
        outputs: Mapping[str, Array] = ResNet(config, axis_name, name="backbone")(pixels, train, bn_groups)
        return [outputs[f"C{stage + 2}"] for stage in range(len(config.layers))]
    states = ViT(config, axis_name, name="backbone")(pixels, train=train).states
    depths = sorted({max(config.depth * (level + 1) // LEVELS, 1) for level in range(LEVELS)})
    rows = pixels.shape[1] // config.stride
    return [rearrange(states[depth][:, config.prefix :], "b (r c) d -> b r c d", r=rows) for depth in depths]


def resized(x: Float[Array, "b _ _ c"], height: int, width: int) -> Float[Array, "b height width c"]:
    """Bilinear, as torch with align_corners=False; two matrix products."""
    for axis, (old, new) in enumerate(((x.shape[1], height), (x.shape[2], width)), 1):
        if old != new:
            matrix = jnp.asarray(resize_matrix(old, new, "bilinear"), x.dtype)
            x = jnp.moveaxis(jnp.tensordot(matrix, x, ((1,), (axis,))), 0, axis)
    return x


class Pyramid(nn.Module):
    """Maps of one stride, a ViT's, at 4, 2, 1 and 1/2 times their resolution (BEiT's and MAE's for UPerNet).

    Up by 2 x 2 transposed convolutions with stride 2, two of them with a norm and GELU in between; down by a maximum.
    With fewer maps than four, the last of these scales.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Maps) -> Maps:
        scaled = []
        for i, x in enumerate(maps, LEVELS - len(maps)):
            if i == 0:
                x = self._doubled(x, "up0a")
                x = self._doubled(activation("gelu")(LayerNorm(dtype=self.dtype, name="up0_norm")(x)), "up0b")
            elif i == 1:
                x = self._doubled(x, "up1")
            elif i == 3:
                x = max_pool(x, 2, 2) if min(x.shape[1:3]) > 1 else x
            scaled.append(x)
        return scaled

    def _doubled(self, x: Array, name: str) -> Array:
        # A 2 x 2 convolution with stride 2, transposed: each pixel makes its own four.
        y = Dense(4 * x.shape[-1], dtype=self.dtype, name=name)(x)
        return rearrange(y, "b r c (i j d) -> b (r i) (c j) d", i=2, j=2)
