"""T5's relative positions: a number a head and a bucket of distances, added to attention's scores.

(arXiv 1910.10683, section 2.1; mesh_tensorflow transformer_layers.py, `_relative_position_bucket`.)
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.types import Array, Float, Int


@functools.cache
def bucket_table(bidirectional: bool, buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """int32 [2 * max_distance + 1]: the bucket of a key at distance r from its query, at index r + max_distance.

    bidirectional: half of the buckets are for keys after the query; otherwise those fall into bucket 0.
    Half of a side's buckets hold one distance each; the rest grow with its logarithm, and the last has all that are
    farther than `max_distance`. In integers: float32 logarithms may fall short of a bound (16, 32, 64).
    Raises MmjaxError where the growing buckets do not fit.
    """
    side = buckets // 2 if bidirectional else buckets
    exact = side // 2
    if exact < 1 or max_distance <= exact:
        raise MmjaxError(f"relative positions: {buckets} buckets do not divide distances up to {max_distance}")
    growing = side - exact
    # floor(growing * log(n / exact) / log(max_distance / exact)) is the number of bounds j that n has reached:
    # (n / exact)^growing >= (max_distance / exact)^j.
    bounds = [max_distance**j * exact ** (growing - j) for j in range(1, growing)]
    of_distance = [
        n if n < exact else exact + sum(n**growing >= bound for bound in bounds) for n in range(max_distance + 1)
    ]
    before = np.array(of_distance[::-1], np.int32)
    after = np.array(of_distance[1:], np.int32) + side if bidirectional else np.zeros(max_distance, np.int32)
    return np.concatenate([before, after])


class RelativeBias(nn.Module):
    """The bias of every query and key by their distance, float32. Params: table [buckets, heads]."""

    heads: int
    bidirectional: bool
    buckets: int = 32
    max_distance: int = 128
    table_init: Any = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, queries: Int[Array, " l"], keys: Int[Array, " s"]) -> Float[Array, "1 h l s"]:
        """queries, keys: their positions; in cached decoding a query comes after the generated tokens."""
        table = self.param("table", self.table_init, (self.buckets, self.heads)).astype(jnp.float32)
        limit = self.max_distance
        distance = jnp.clip(keys - queries[:, None], -limit, limit) + limit
        bucket = jnp.asarray(bucket_table(self.bidirectional, self.buckets, limit))[distance]
        return jnp.moveaxis(table[bucket], -1, 0)[None]
