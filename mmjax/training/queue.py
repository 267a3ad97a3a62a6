"""The queue of keys: a ring buffer on the device that outlives the step (MoCo, arXiv 1911.05722, section 3.2)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from mmjax.errors import MmjaxError
from mmjax.types import Array, Bool, Float, Int, PRNGKeyArray


@struct.dataclass
class Queue:
    """`keys[cursor]` is the oldest key and the next to be replaced. Keys are features, or ids [q, 1].

    The originals store the transpose, [d, q]; `models/*/checkpoint.py` transposes it.

    Attributes:
        incoming: keys of this batch, which the step writes once it has accepted the update. Until then `keys` are
            those from before the batch: for every micro-batch of it, and without a second copy.
    """

    keys: Float[Array, "q d"] | Int[Array, "q d"]
    cursor: Int[Array, ""]
    incoming: Float[Array, "b d"] | Int[Array, "b d"] | None = None


def create_queue(rng: PRNGKeyArray, length: int, width: int, batch_size: int) -> Queue:
    """A queue of random unit vectors, as the original fills it (moco/builder.py:44-48).

    Args:
        length: number of keys, a multiple of `batch_size`.
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


def enqueue(queue: Queue, keys: Float[Array, "b d"] | Int[Array, "b d"]) -> Queue:
    """The queue with the keys of this batch, of all devices, as `incoming`; no gradient passes."""
    return dataclasses.replace(queue, incoming=jax.lax.stop_gradient(keys).astype(queue.keys.dtype))


def write(queue: Queue, accepted: Bool[Array, ""] | bool = True) -> Queue:
    """Replaces the oldest keys by the incoming ones and advances the cursor, wrapping at the end, if accepted.

    A donated queue is updated in place: the selected array is as large as the batch, not as the queue.

    Raises:
        MmjaxError: the queue's length is not a multiple of the batch (an odd last batch, say).
    """
    if queue.incoming is None:
        return queue
    length, size = queue.keys.shape[0], queue.incoming.shape[0]
    if length % size:
        raise MmjaxError(f"a batch of {size} keys does not divide the queue of {length}: drop the last, partial batch")
    start = (queue.cursor, jnp.zeros_like(queue.cursor))
    oldest = jax.lax.dynamic_slice(queue.keys, start, queue.incoming.shape)
    keys = jax.lax.dynamic_update_slice(queue.keys, jnp.where(accepted, queue.incoming, oldest), start)
    return Queue(keys, jnp.where(accepted, (queue.cursor + size) % length, queue.cursor))
