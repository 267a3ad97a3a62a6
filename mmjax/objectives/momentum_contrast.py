"""Image-text contrast against momentum keys and queues, with soft targets (ALBEF, arXiv 2107.07651, sections 3.2, 3.3).

A caption often fits other images than its own. The momentum encoders say how well each fits; what they say, and the
labels, are mixed into the targets. BLIP (arXiv 2201.12086) and both systems' retrieval fine-tuning use the same loss.
"""

import jax
import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.nn.groups import cut, group_places, group_rows
from mmjax.objectives.classification import softmax_cross_entropy
from mmjax.objectives.contrastive import by_rows
from mmjax.objectives.distillation import soft_labels_of
from mmjax.objectives.language import IGNORED
from mmjax.types import Array, Float, Int


def momentum_contrast(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    image_keys: Float[Array, "b d"],
    text_keys: Float[Array, "b d"],
    image_queue: Float[Array, "q d"],
    text_queue: Float[Array, "q d"],
    temperature: Float[Array, ""] | float,
    alpha: Float[Array, ""] | float,
    *,
    ids: Int[Array, "b"] | None = None,
    queue_ids: Int[Array, "q"] | None = None,
    groups: int = 1,
    axis_name: str | None = None,
    blocks: int = 1,
) -> Float[Array, ""]:
    """Mean of the soft cross-entropies of images against texts and of texts against images, float32.

    A row's candidates are the keys of its group of the batch, then the queue. Its target is alpha * softmax(momentum
    similarities / temperature) + (1 - alpha) * label. Gradients reach `image`, `text` and, through the logits alone,
    the temperature. Under `axis_name` the result is this device's share, whose mean over devices is the loss of the
    global batch (ALBEF models/model_pretrain.py:88-214, models/model_retrieval.py).

    Args:
        image, text: unit vectors of the trained encoders; row i of one belongs to row i of the other.
        image_keys, text_keys: the same of the momentum encoders.
        image_queue, text_queue: keys of earlier batches, as they are before this batch's are enqueued.
        temperature: divides the cosines.
        alpha: share of the soft part: 0 learns from the labels alone.
        ids: of each pair's image. Every candidate of the same id is right, all to equal shares (retrieval). None: only
            its own is right (pre-training). `IGNORED`: nothing is known; only its own is right.
        queue_ids: of each entry of the queues; `IGNORED` is nobody's.
        groups: parts that the global batch is cut in; a row meets the batch's keys of its own part alone. The originals
            have one a process (8); 1: the whole batch.
        blocks: in how many runs of rows the logits are made. More than 1 never holds the whole of them, forward or
            backward, at the price of computing each twice.

    Raises MmjaxError: groups that do not cut the batch (`mmjax.nn.groups.cut`), blocks that do not divide a device's
    rows of a group, or one kind of ids without the other.
    """
    if (ids is None) != (queue_ids is None):
        given, missing = ("ids", "queue_ids") if queue_ids is None else ("queue_ids", "ids")
        raise MmjaxError(f"momentum_contrast: {given} without {missing}")
    if ids is None or queue_ids is None:
        ids, queue_ids = jnp.full(len(image), IGNORED), jnp.full(len(image_queue), IGNORED)
    how = (temperature, alpha, ids, queue_ids, groups, axis_name, blocks)
    image_to_text = _one_way(image, image_keys, text_keys, text_queue, *how)
    text_to_image = _one_way(text, text_keys, image_keys, image_queue, *how)
    return (image_to_text + text_to_image) / 2


def _one_way(
    query: Array,
    teacher: Array,
    keys: Array,
    queue: Array,
    temperature: Array | float,
    alpha: Array | float,
    ids: Array,
    queue_ids: Array,
    groups: int,
    axis_name: str | None,
    blocks: int,
) -> Array:
    """Mean over this device's rows, which lie as [r, g]: r of each of g groups, so that blocks cut every group alike.

    teacher: momentum features of the query's kind, which stand in its place in the targets.
    """
    query, teacher, keys, queue = (x.astype(jnp.float32) for x in (query, teacher, keys, queue))
    local = cut(len(query), groups, axis_name).local
    keys, queue, teacher = jax.lax.stop_gradient((group_rows(keys, groups, axis_name), queue, teacher))
    candidate_ids = jnp.concatenate(
        [group_rows(ids, groups, axis_name), jnp.broadcast_to(queue_ids, (local, len(queue)))], -1
    )

    def similarities(rows: Array) -> Array:
        """To every candidate, [r, g, candidate]."""
        within = jnp.einsum("rgd,gmd->rgm", rows, keys, precision="highest")
        return jnp.concatenate([within, jnp.einsum("rgd,qd->rgq", rows, queue, precision="highest")], -1)

    def run(carry: Array, rows: tuple[Array, ...]) -> tuple[Array, Array]:
        query, teacher, place, own_id = rows
        same = (own_id[..., None] == candidate_ids) & (own_id != IGNORED)[..., None]
        right = same | (place[..., None] == jnp.arange(candidate_ids.shape[1]))
        label = right / jnp.sum(right, -1, keepdims=True)
        soft = soft_labels_of(similarities(teacher), temperature)
        target = jax.lax.stop_gradient(alpha * soft + (1 - alpha) * label)
        return carry, softmax_cross_entropy(similarities(query) / temperature, target)

    everything = query, teacher, group_places(len(query), groups, axis_name), ids
    rows = tuple(x.reshape(local, -1, *x.shape[1:]).swapaxes(0, 1) for x in everything)
    return jnp.mean(by_rows(run, jnp.zeros(()), rows, blocks)[1])
