"""The queue of keys: a ring buffer on the device that outlives the step (MoCo, arXiv 1911.05722, section 3.2)."""

import jax
import jax.numpy as jnp
from flax import struct

from mmjax.errors import MmjaxError
from mmjax.types import Array, Float, Int, PRNGKeyArray


@struct.dataclass
class Queue:
    """`keys[cursor]` is the oldest entry and the next to be replaced.

    The originals store the transpose, [d, q]; `models/*/checkpoint.py` turns it.
    """

    keys: Float[Array, "q d"]
    cursor: Int[Array, ""]


def create_queue(rng: PRNGKeyArray, length: int, width: int, batch_size: int) -> Queue:
    """A queue of random unit vectors, as the original fills it (moco/builder.py:44-48).

    Args:
        length: number of keys held, a multiple of `batch_size`.
        width: number of features of a key.
        batch_size: keys that one step will enqueue, over all devices.

    Raises:
        MmjaxError: `length` is not a multiple of `batch_size`: the write would tear at the end of the ring.
    """
    if batch_size < 1 or length % batch_size:
        raise MmjaxError(
            f"queue length {length} is not a multiple of the batch size {batch_size}: "
            f"use {max(length // max(batch_size, 1), 1) * max(batch_size, 1)} or another batch size"
        )
    keys = jax.random.normal(rng, (length, width), jnp.float32)
    keys /= jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    return Queue(keys=keys, cursor=jnp.zeros((), jnp.int32))


def enqueue(queue: Queue, keys: Float[Array, "b d"]) -> Queue:
    """Replaces the oldest `b` keys and moves the cursor, wrapping at the end.

    Raises:
        MmjaxError: the queue's length is not a multiple of b (an odd last batch, say).
    """
    length, size = queue.keys.shape[0], keys.shape[0]
    if length % size:
        raise MmjaxError(f"a batch of {size} keys does not divide the queue of {length}: drop the last, partial batch")
    keys = jax.lax.stop_gradient(keys).astype(queue.keys.dtype)
    return Queue(
        keys=jax.lax.dynamic_update_slice(queue.keys, keys, (queue.cursor, jnp.zeros_like(queue.cursor))),
        cursor=(queue.cursor + size) % length,
    )
