"""Image-text matching with hard negatives (ALBEF, arXiv 2107.07651, section 3.2): does this text belong to this image?

    weights = negative_log_weights(text, image_keys, temperature)             # similarity of each image to each text
    images = sample_negatives(example_keys(rng, b, axis_name), weights)       # [b] positions in the group
    negatives = take_in_group(image_states, images)                           # [b n d], with their gradient

and likewise from images to texts. Three blocks of pairs are then classified: (text, image), (text, negative image),
(negative text, image). Everything is float32.
"""

import jax
import jax.numpy as jnp

from mmjax.nn.groups import group_positions, group_rows
from mmjax.objectives.language import IGNORED, token_accuracy, token_cross_entropy
from mmjax.types import Array, Bool, Float, Int, Key, Mean


def negative_log_weights(
    query: Float[Array, "b *q d"],
    keys: Float[Array, "b *k d"],
    temperature: Float[Array, ""] | float,
    *,
    ids: Int[Array, "b"] | None = None,
    floor: float = 0.0,
    groups: int = 1,
    axis_name: str | None = None,
) -> Float[Array, "b m"]:
    """log(softmax(query . keys / temperature) + floor) over the m keys of the query's group; -inf for non-negatives.

    The argmax of a row is its hardest negative. Logs do not underflow where weights do, so the order within a row is
    the same at any temperature. No gradient flows.

    Args:
        query, keys: unit vectors of one modality and of the other. ALBEF's and BLIP's keys come from the momentum
            encoders, those of BLIP's retrieval from the encoders that make the queries. Of several vectors of an item
            [b, q, d] the nearest pair counts (BLIP-2's images).
        ids: image id of each pair: rows with the same id are not negatives. None, or `IGNORED`: only the query's
            matching key is excluded.
        floor: 1e-4 in BLIP's pre-training (models/blip_pretrain.py:155), which makes easy negatives more probable.
        groups: parts of the global batch; negatives come from the query's part. The originals have one per process.

    Raises MmjaxError: groups that do not divide the batch (`mmjax.nn.groups.cut`).
    """
    query, keys = jax.lax.stop_gradient((query.astype(jnp.float32), keys.astype(jnp.float32)))
    candidates = group_rows(keys, groups, axis_name)
    queries = query.reshape(len(candidates), -1, *query.shape[1:])
    if queries.ndim == candidates.ndim == 3:
        similarity = jnp.einsum("grd,gmd->grm", queries, candidates, precision="highest")
    else:
        several = (x if x.ndim == 4 else x[:, :, None] for x in (queries, candidates))
        similarity = jnp.einsum("grpd,gmqd->grmpq", *several, precision="highest").max(axis=(3, 4))
    similarity = similarity / jax.lax.stop_gradient(temperature)
    weights = jnp.logaddexp(jax.nn.log_softmax(similarity), jnp.log(floor)).reshape(len(query), -1)
    return jnp.where(_are_negatives(len(query), ids, groups, axis_name), weights, -jnp.inf)


def mixed_with_uniform(log_weights: Float[Array, "b m"], share: Float[Array, ""] | float) -> Float[Array, "b m"]:
    """Logs of the probabilities (1 - share) p + share u: p by the weights, u uniform over the same negatives.

    share: in [0, 1]; 0: p, 1: u. A row without negatives stays one.
    """
    present = log_weights > -jnp.inf
    count = jnp.maximum(jnp.sum(present, axis=1, keepdims=True), 1)
    # A row of -inf alone would make log_softmax NaN.
    hard = jax.nn.log_softmax(jnp.where(present.any(axis=1, keepdims=True), log_weights, 0.0))
    mixed = jnp.logaddexp(jnp.log1p(-jnp.float32(share)) + hard, jnp.log(jnp.float32(share)) - jnp.log(count))
    return jnp.where(present, mixed, -jnp.inf)


def has_negative(
    size: int, ids: Int[Array, "b"] | None = None, groups: int = 1, axis_name: str | None = None
) -> Bool[Array, "b"]:
    """Whether the group of each of `size` pairs has a pair of another image; arguments as of `negative_log_weights`."""
    return jnp.any(_are_negatives(size, ids, groups, axis_name), axis=1)


def _are_negatives(size: int, ids: Array | None, groups: int, axis_name: str | None) -> Bool[Array, "b m"]:
    ids = jnp.full(size, IGNORED) if ids is None else ids
    candidate_ids = group_rows(ids, groups, axis_name)
    query_ids = ids.reshape(len(candidate_ids), -1)
    same = (query_ids[..., None] == candidate_ids[:, None]) & (query_ids != IGNORED)[..., None]
    positions = group_positions(size, groups, axis_name)
    return ~same.reshape(size, -1) & (positions[:, None] != jnp.arange(same.shape[-1]))


def sample_negatives(keys: Key[Array, "b"], log_weights: Float[Array, "b m"]) -> Int[Array, "b"]:
    """An index in [0, m) for each row, sampled by the weights; -1 for a row without negatives.

    keys: one per row, a function of its position in the global batch (`mmjax.training.rng.example_keys`), so that any
    division over devices samples the same.
    """
    sampled = jax.vmap(jax.random.categorical)(keys, log_weights)
    return jnp.where(jnp.any(log_weights > -jnp.inf, axis=1), sampled, -1)


def matching_loss(logits: Float[Array, "three_b 2"], counted: Bool[Array, "b"]) -> Mean:
    """Mean cross-entropy of three blocks of b pairs: the first match (class 1), the other two do not (class 0).

    Args:
        logits: of (text, image), then (text, negative image), then (negative text, image).
        counted: `has_negative`. Where a whole group shares one image, which the originals fail on, pairs of the second
            and of the third block are not counted. (A sampled index of -1 marks them too, but only after the network
            has run, and accumulation needs the count before.)
    """
    return token_cross_entropy(logits, matching_labels(counted)).loss


def matching_labels(counted: Bool[Array, "b"]) -> Int[Array, "three_b"]:
    """The classes of `matching_loss`'s pairs: 1 where they match, else 0; `IGNORED` where they are not counted."""
    negative = jnp.where(counted, 0, IGNORED)
    return jnp.concatenate([jnp.ones(len(counted), jnp.int32), negative, negative])


def matching_metrics(
    logits: Float[Array, "three_b 2"], counted: Bool[Array, "b"], axis_name: str | None = None
) -> dict[str, Mean]:
    """matching_accuracy, matching_auc and matching_gap, of the arguments of `matching_loss`.

    A head that always answers "no" has an accuracy of 2/3, and one that has begun to learn has it for long, because
    there are two negatives for each positive. The other two show that progress: how often a pair's score, the
    difference of its logits, is above that of a negative (the area under the ROC curve, 0.5 by chance), over all
    positives and negatives of the global batch; and by how much on average it is above those of its own negatives.
    """
    logits = jax.lax.stop_gradient(logits.astype(jnp.float32))
    scores = (logits[:, 1] - logits[:, 0]).reshape(3, -1)
    positive, negatives = scores[0], scores[1:]
    present = jnp.broadcast_to(counted, negatives.shape)
    everyone, everyone_present = negatives, present
    if axis_name is not None:
        everyone, everyone_present = (jax.lax.all_gather(x, axis_name) for x in (negatives, present))
    # Ranks of the positives among the sorted negatives: no [b, 2 b] matrix.
    ordered = jnp.sort(jnp.where(everyone_present, everyone, jnp.inf).reshape(-1))
    below, not_above = (jnp.searchsorted(ordered, positive, side=side) for side in ("left", "right"))
    number = jnp.sum(everyone_present).astype(jnp.float32)
    wins = jnp.sum((below + not_above).astype(jnp.float32)) / 2
    return {
        "matching_accuracy": token_accuracy(logits, matching_labels(counted)),
        "matching_auc": Mean(wins / jnp.maximum(number, 1), jnp.where(number > 0, float(len(positive)), 0.0)),
        "matching_gap": Mean.of(positive - jnp.mean(negatives, axis=0), counted),
    }
