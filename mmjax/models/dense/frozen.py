"""The feature maps of a frozen encoder, computed once: a column of batches that the head is trained on."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.models.dense.pyramid import Backbone, Maps, feature_maps
from mmjax.types import Array, Float, Params

MAPS = "maps"
"""The column of a batch, float32 [b, n]: an example's maps, each flattened, from fine to coarse."""


class Encoder(nn.Module):
    """The feature maps in evaluation. Parameter paths: backbone/..."""

    config: Backbone

    @nn.compact
    def __call__(self, pixels: Float[Array, "b height width 3"]) -> Maps:
        return feature_maps(self.config, pixels, False)


def flat_maps(
    config: Backbone, params: Params, stats: Params, pixels: Float[Array, "b height width 3"]
) -> Float[Array, "b n"]:
    """The column `MAPS` of images. params, stats: of the encoder by itself."""
    variables = {"params": {"backbone": params}} | ({"batch_stats": {"backbone": stats}} if stats else {})
    maps: Any = Encoder(config).apply(variables, pixels)
    return jnp.concatenate([x.reshape(len(x), -1).astype(jnp.float32) for x in maps], -1)


def unflattened(config: Backbone, flat: Float[Array, "b n"], height: int, width: int) -> Maps:
    """The maps of a column, in the encoder's dtype. height, width: of the images that it was computed from."""
    pixels = jnp.zeros((1, height, width, 3))
    shapes: Any = jax.eval_shape(lambda: Encoder(config).init_with_output(jax.random.key(0), pixels)[0])
    maps, start = [], 0
    for shape in shapes:
        end = start + math.prod(shape.shape)
        maps.append(flat[:, start:end].reshape(-1, *shape.shape[1:]).astype(shape.dtype))
        start = end
    return maps


def in_dtype(config: Any) -> Backbone:
    """The encoder of a segmentation network or detector, with its dtype."""
    return dataclasses.replace(config.backbone, dtype=config.dtype)
