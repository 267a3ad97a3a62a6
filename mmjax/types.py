"""The names that every floor of the house shares: axis letters, array aliases.

Axis legend, used in every public signature:

    b batch          n image tokens     l text tokens     s key/value tokens     m tokens of a context
    h heads          d width            k head width      v vocabulary
    q queue length   c channels or classes
    height width     the two image axes, written out
"""

from collections.abc import Mapping
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int, Key, PRNGKeyArray, UInt8

from mmjax.errors import MmjaxError

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.Array | np.ndarray
Params: TypeAlias = Mapping[str, Any]
"""A nested dict of arrays: one subtree a submodule."""
Batch: TypeAlias = Mapping[str, Any]
"""A dict of arrays that share their first axis."""
Metrics: TypeAlias = dict[str, jax.Array]


@struct.dataclass
class Mean:
    """A mean before its division: totals and counts of micro-batches and of devices add up to those of the batch.

    Attributes:
        total: the sum of the counted values.
        count: their number, or the sum of their weights; it has no gradient.
    """

    total: Float[jax.Array, ""]
    count: Float[jax.Array, ""]

    @classmethod
    def of(cls, values: Float[jax.Array, "*b"], weights: Any) -> Self:
        """The mean of `values`, by `weights` of the same shape, numbers or booleans; weight 0 excludes even NaN."""
        weights = jax.lax.stop_gradient(jnp.asarray(weights, jnp.float32))
        return cls(jnp.sum(jnp.where(weights != 0, values * weights, 0.0)), jnp.sum(weights))

    @property
    def value(self) -> Float[jax.Array, ""]:
        """The mean; NaN, which a train step refuses, where nothing was counted."""
        # Explicit: compilers make 0 of 0 / 0.
        return jnp.where(self.count > 0, self.total / self.count, jnp.nan)


Means: TypeAlias = dict[str, Mean | jax.Array]
"""name -> a mean before its division, or a scalar, the mean over an equal part of a batch."""

__all__ = [
    "Array",
    "ArrayLike",
    "Batch",
    "Bool",
    "Float",
    "Int",
    "Key",
    "Mean",
    "Means",
    "Metrics",
    "MmjaxError",
    "PRNGKeyArray",
    "Params",
    "UInt8",
]
