"""Counter-based randomness: a key is a function of (seed, step, name, example), not of earlier random numbers."""

import zlib

import jax
import jax.numpy as jnp

from mmjax.types import Array, Key, PRNGKeyArray


def named(rng: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """The key of one purpose: `named(rng, "augment")`. Adding a purpose leaves the random numbers of the others."""
    return jax.random.fold_in(rng, zlib.crc32(name.encode()))


def example_keys(rng: PRNGKeyArray, size: int, axis_name: str | None = None) -> Key[Array, "b"]:
    """A key for each of this device's `size` examples, by their index in the global batch: [b] typed keys.

    axis_name: the mapped axis over which the batch is cut; any cut gives an example the same key.
    """
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * size
    return jax.vmap(lambda index: jax.random.fold_in(rng, index))(first + jnp.arange(size))
