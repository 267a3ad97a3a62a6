"""Image-text contrast against momentum keys and queues, with soft targets (ALBEF, arXiv 2107.07651, sections 3.2, 3.3).

A caption often fits several images. The targets mix the labels with the momentum encoders' similarities, which measure
how well each image fits. BLIP (arXiv 2201.12086) and both systems' retrieval fine-tuning use the same loss.
"""

import jax
import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.nn.groups import cut, group_positions, group_rows
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

    The candidates of a row are the keys of its group of the batch, then the queue. Its target is alpha *
    softmax(momentum similarities / temperature) + (1 - alpha) * label. Gradients reach `image`, `text` and, through the
    logits only, the temperature. Under `axis_name` the result is this device's share, whose mean over devices is the
    loss of the global batch (ALBEF models/model_pretrain.py:88-214, models/model_retrieval.py).

    Args:
        image, text: unit vectors of the trained encoders; row i of one belongs to row i of the other.
        image_keys, text_keys: unit vectors of the momentum encoders.
        image_queue, text_queue: keys of earlier batches, before this batch's keys are enqueued.
        temperature: divides the cosines.
        alpha: share of the soft part: 0 learns from the labels only.
        ids: image id of each pair. All candidates of the same id are positives with equal shares (retrieval). None, or
            `IGNORED`: only the pair itself is positive (pre-training).
        queue_ids: image id of each entry of the queues; `IGNORED` matches no id.
        groups: parts of the global batch; a row is contrasted with the batch's keys of its part only. The originals
            have one per process (8); 1: the whole batch.
        blocks: number of row blocks in which the logits are computed. With more than 1 the whole matrix never exists,
            forward or backward, and each block is computed twice.

    Raises MmjaxError: groups that do not divide the batch (`mmjax.nn.groups.cut`), blocks that do not divide a device's
    rows of a group, or `ids` without `queue_ids` or the reverse.
    """
    if (ids is None) != (queue_ids is None):
        present, missing = ("ids", "queue_ids") if queue_ids is None else ("queue_ids", "ids")
        raise MmjaxError(f"momentum_contrast: {present} without {missing}")
    if ids is None or queue_ids is None:
        ids, queue_ids = jnp.full(len(image), IGNORED), jnp.full(len(image_queue), IGNORED)
    options = (temperature, alpha, ids, queue_ids, groups, axis_name, blocks)
    image_to_text = _one_direction(image, image_keys, text_keys, text_queue, *options)
    text_to_image = _one_direction(text, text_keys, image_keys, image_queue, *options)
    return (image_to_text + text_to_image) / 2


def _one_direction(
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
    """Mean over this device's rows, laid out as [r, g]: r of each of g groups, so that blocks divide all groups alike.

    teacher: momentum features of the query's modality, which replace the query in the targets.
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
        query, teacher, position, query_id = rows
        same = (query_id[..., None] == candidate_ids) & (query_id != IGNORED)[..., None]
        positive = same | (position[..., None] == jnp.arange(candidate_ids.shape[1]))
        label = positive / jnp.sum(positive, -1, keepdims=True)
        soft = soft_labels_of(similarities(teacher), temperature)
        target = jax.lax.stop_gradient(alpha * soft + (1 - alpha) * label)
        return carry, softmax_cross_entropy(similarities(query) / temperature, target)

    columns = query, teacher, group_positions(len(query), groups, axis_name), ids
    rows = tuple(x.reshape(local, -1, *x.shape[1:]).swapaxes(0, 1) for x in columns)
    return jnp.mean(by_rows(run, jnp.zeros(()), rows, blocks)[1])
