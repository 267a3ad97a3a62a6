"""Batch normalisation over groups of the global batch.

A group is a number in the recipe, not a device: ShuffleBN or a published "32 images a device" mean the same thing on
one chip and on 256. torch's rules: the biased variance normalises, the unbiased one updates the running statistics.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mmjax.nn.groups import cut
from mmjax.types import Array, Float


class BatchNorm(nn.Module):
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias over the last axis; statistics of all other axes.

    Parameters scale and bias [c]; collection "batch_stats": mean and var [c] (float32) and count, the number of batches
    so far (torch's num_batches_tracked). With several groups the running statistics move by the mean over the groups.

    Attributes:
        use_running_average: normalise by the running statistics and leave them as they are (torch's eval mode).
        momentum: the share of the old running statistics that stays; 1 - torch's momentum.
        groups: equal parts, in order, that the global batch is cut in; each is normalised by its own statistics.
        axis_name: the mapped axis over which the batch is cut; devices that share a group add up their sums.
        dtype: of the output; statistics are always float32.
    """

    use_running_average: bool = False
    momentum: float = 0.9
    epsilon: float = 1e-5
    groups: int = 1
    axis_name: str | None = None
    use_scale: bool = True
    use_bias: bool = True
    scale_init: Callable[..., Any] = nn.initializers.ones
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        c = x.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, (c,), jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, (c,), jnp.float32)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        scale = self.param("scale", self.scale_init, (c,)) if self.use_scale else jnp.ones(c)
        bias = self.param("bias", nn.initializers.zeros, (c,)) if self.use_bias else jnp.zeros(c)
        dtype = jnp.dtype(self.dtype or x.dtype)
        if self.use_running_average:
            slope = scale * lax.rsqrt(var.value + self.epsilon)
            return (x * slope + (bias - mean.value * slope)).astype(dtype)
        axis_name = None if self.is_initializing() else self.axis_name
        y, batch_mean, batch_var = batch_normalise(
            x, scale, bias, epsilon=self.epsilon, groups=self.groups, axis_name=axis_name
        )
        if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
            mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
            var.value = self.momentum * var.value + (1 - self.momentum) * batch_var
            count.value = count.value + 1
        return y.astype(dtype)


def batch_normalise(
    x: Float[Array, "b *space c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    *,
    epsilon: float = 1e-5,
    groups: int = 1,
    axis_name: str | None = None,
) -> tuple[Float[Array, "b *space c"], Float[Array, " c"], Float[Array, " c"]]:
    """(normalised x, mean, unbiased variance); the latter two averaged over all groups, and without a gradient.

    Raises MmjaxError if the groups do not cut the global batch, or do not fit the devices.
    """
    local, together, members = cut(len(x), groups, axis_name)
    count = x.size // x.shape[-1] // local * together
    normalise = _normalise(epsilon, count, axis_name if together > 1 else None, members)
    c = x.shape[-1]
    if local == 1:
        y, mean, var = normalise(x.reshape(-1, c), scale, bias)
    else:
        y, means, variances = jax.vmap(normalise, (0, None, None))(x.reshape(local, -1, c), scale, bias)
        mean, var = means.mean(0), variances.mean(0)
    if axis_name is not None and groups > 1:
        mean, var = lax.pmean((mean, var), axis_name)
    return y.reshape(x.shape), mean, var


@functools.cache
def _normalise(
    epsilon: float, count: int, axis_name: str | None, members: tuple[tuple[int, ...], ...] | None
) -> Callable[..., Any]:
    """x [row, c] of one group -> (y, mean, unbiased variance); `count` rows make a group, over all its devices.

    The variance is that of the centred x, so that nothing cancels where the mean is large. The backward pass keeps x
    itself: XLA's reductions take the centring in, and writing it out costs more than doing it again.
    """

    def total(*sums: Array) -> tuple[Array, ...]:
        if axis_name is None:
            return sums
        return lax.psum(sums, axis_name, axis_index_groups=members)

    @jax.custom_vjp
    def run(x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
        return forward(x, scale, bias)[0]

    def forward(x: Array, scale: Array, bias: Array) -> Any:
        wide = x.astype(jnp.float32)
        mean = total(jnp.sum(wide, 0))[0] / count
        centred = wide - mean
        var = total(jnp.sum(jnp.square(centred), 0))[0] / count
        inverse = lax.rsqrt(var + epsilon)
        y = centred * (scale * inverse) + bias
        return (y.astype(x.dtype), mean, var * (count / max(count - 1, 1))), (x, mean, inverse, scale)

    def backward(residuals: Any, cotangents: Any) -> tuple[Array, Array, Array]:
        x, mean, inverse, scale = residuals
        dy, centred = cotangents[0].astype(jnp.float32), x.astype(jnp.float32) - mean
        d_bias, d_slope = jnp.sum(dy, 0), jnp.sum(dy * centred, 0)
        all_bias, all_slope = total(d_bias, d_slope)
        slope = scale * inverse
        dx = dy * slope - centred * (slope * jnp.square(inverse) * all_slope / count) - slope * all_bias / count
        return dx.astype(x.dtype), d_slope * inverse, d_bias

    run.defvjp(forward, backward)
    return run
