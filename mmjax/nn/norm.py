"""Normalisation over the last axis: layer norms, with and without a mean, and unit length."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.types import Array, Float


class LayerNorm(nn.Module):
    """Normalises the last axis; statistics in float32, biased variance, as torch. Params: scale [d], bias [d].

    Attributes:
        epsilon: added to the variance: 1e-6 in ViT, 1e-5 in CLIP, 1e-12 in BERT.
        dtype: of the result.
        use_bias: MPT has none.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)) if self.use_bias else 0.0
        x = x.astype(jnp.float32)
        # Two passes: the variance as a difference of mean squares loses digits where the mean is large.
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """The last axis over its root mean square, in float32; no mean is taken off and nothing added. Params: scale [d].

    (arXiv 1910.07467; T5 and LLaMA.) The result is rounded to `dtype` before the scale, as both do.

    Attributes:
        epsilon: added to the mean square: 1e-6 in T5 and in LLaMA-1, 1e-5 in LLaMA-2.
        dtype: of the result.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return x.astype(self.dtype) * scale.astype(self.dtype)


def l2_normalize(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Vectors of length one along the last axis, float32; zeros stay zeros, with a gradient of zero.

    As torch.nn.functional.normalize: the norm has a lower bound of 1e-12.
    """
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
