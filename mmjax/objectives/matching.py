"""Image-text matching with hard negatives (ALBEF, arXiv 2107.07651, section 3.2): does this text belong to this image?

    weights = negative_log_weights(text, image_keys, temperature)             # similarity of each image to each text
    images = sample_negatives(example_keys(rng, b, axis_name), weights)       # [b] positions in the group
    negatives = take_in_group(image_states, images)                           # [b n d], with their gradient

and likewise from images to texts. Three blocks of pairs are then classified: (text, image), (text, negative image),
(negative text, image). Everything is float32.
"""

import jax
import jax.numpy as jnp

from mmjax.nn.groups import group_places, group_rows
from mmjax.objectives.language import IGNORED, token_cross_entropy
from mmjax.types import Array, Float, Int, PRNGKeyArray


def negative_log_weights(
    query: Float[Array, "b d"],
    keys: Float[Array, "b d"],
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
            encoders, those of BLIP's retrieval from the encoders that make the queries.
        ids: image id of each pair: rows with the same id are not negatives. None, or `IGNORED`: only the query's
            matching key is excluded.
        floor: 1e-4 in BLIP's pre-training (models/blip_pretrain.py:155), which makes easy negatives more probable.
        groups: parts of the global batch; negatives come from the query's part. The originals have one per process.

    Raises MmjaxError: groups that do not divide the batch (`mmjax.nn.groups.cut`).
    """
    query, keys = jax.lax.stop_gradient((query.astype(jnp.float32), keys.astype(jnp.float32)))
    ids = jnp.full(len(query), IGNORED) if ids is None else ids
    candidates, candidate_ids = (group_rows(x, groups, axis_name) for x in (keys, ids))
    queries, query_ids = (x.reshape(len(candidates), -1, *x.shape[1:]) for x in (query, ids))
    similarity = jnp.einsum("grd,gmd->grm", queries, candidates, precision="highest")
    similarity = similarity / jax.lax.stop_gradient(temperature)
    weights = jnp.logaddexp(jax.nn.log_softmax(similarity), jnp.log(floor))
    same = (query_ids[..., None] == candidate_ids[:, None]) & (query_ids != IGNORED)[..., None]
    weights = jnp.where(same, -jnp.inf, weights).reshape(len(query), -1)
    positions = group_places(len(query), groups, axis_name)
    return jnp.where(positions[:, None] == jnp.arange(weights.shape[1]), -jnp.inf, weights)


def sample_negatives(keys: PRNGKeyArray, log_weights: Float[Array, "b m"]) -> Int[Array, "b"]:
    """An index in [0, m) for each row, sampled by the weights; -1 for a row without negatives.

    keys: one per row, a function of its position in the global batch (`mmjax.training.rng.example_keys`), so that any
    division over devices samples the same.
    """
    sampled = jax.vmap(jax.random.categorical)(keys, log_weights)
    return jnp.where(jnp.any(log_weights > -jnp.inf, axis=1), sampled, -1)


def matching_loss(
    logits: Float[Array, "three_b 2"], negatives: Int[Array, "two_b"], axis_name: str | None = None
) -> Float[Array, ""]:
    """Mean cross-entropy of three blocks of b pairs: the first match (class 1), the other two do not (class 0).

    Args:
        logits: of (text, image), then (text, negative image), then (negative text, image).
        negatives: sampled indices of the second and of the third block. A pair whose negative is -1 is not counted;
            the originals fail where a whole group shares one image.
        axis_name: the mapped axis over which the batch is divided; the result is then this device's share, whose mean
            over devices, in value and in gradient, is the loss of the global batch.
    """
    matches = jnp.ones(len(negatives) // 2, jnp.int32)
    labels = jnp.concatenate([matches, jnp.where(negatives < 0, IGNORED, 0)])
    return token_cross_entropy(logits, labels, axis_name=axis_name).loss
