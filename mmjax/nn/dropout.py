"""Dropout and stochastic depth. What an example loses depends on its index in the global batch alone.

So one device, `pmap` and a mesh leave out the same numbers. (`flax.linen.Dropout` draws a whole array from one key:
under `pmap` every device would draw the same mask for its share of the batch.)
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.types import Array, Bool, Float, PRNGKeyArray


def keep_mask(
    rng: PRNGKeyArray, rate: float, shape: tuple[int, ...], axis_name: str | None = None
) -> Bool[Array, "b *rest"]:
    """False with probability `rate`.

    rng: the same on every device. shape: of this device's share. axis_name: the mapped axis that cuts the batch.
    """
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * shape[0]
    keys = jax.vmap(lambda index: jax.random.fold_in(rng, index))(first + jnp.arange(shape[0]))
    return jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape[1:]))(keys)


class Dropout(nn.Module):
    """In training a number becomes 0 with probability `rate`, else it is scaled up by 1 / (1 - rate)."""

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b *rest"], train: bool) -> Float[Array, "b *rest"]:
        if not train or self.rate == 0:
            return x
        mask = keep_mask(self.make_rng("dropout"), self.rate, x.shape, self.axis_name)
        return jnp.where(mask, x / (1 - self.rate), 0).astype(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth: in training an example's residual branch is dropped with probability `rate`, and scaled up
    by 1 / (1 - rate) where it stays (Huang et al. 2016; timm's `drop_path`)."""

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, branch: Float[Array, "b n d"], train: bool) -> Float[Array, "b n d"]:
        if not train or self.rate == 0:
            return branch
        mask = keep_mask(self.make_rng("dropout"), self.rate, (branch.shape[0], 1, 1), self.axis_name)
        return jnp.where(mask, branch / (1 - self.rate), 0).astype(branch.dtype)
