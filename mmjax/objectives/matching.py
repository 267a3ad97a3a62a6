"""Image-text matching with hard negatives (ALBEF, arXiv 2107.07651, section 3.2): does this text belong to this image?

    weights = negative_log_weights(text, image_keys, temperature)             # of each text: how like each image is
    images = draw_negatives(example_keys(rng, b, axis_name), weights)         # [b] places in the group
    negatives = take_in_group(image_states, images)                           # [b n d], with their gradient

and the same from images to texts; three runs of pairs are then told apart: (text, image), (text, negative image),
(negative text, image). All in float32.
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
    """log(softmax(query . keys / temperature) + floor) over the m rows of a row's group; -inf where it is no negative.

    The larger, the harder: the argmax of a row is its hardest negative. Logs do not underflow where weights do, so a
    row keeps its order at any temperature. Without a gradient.

    Args:
        query, keys: unit vectors of one kind and of the other. ALBEF's and BLIP's keys are the momentum encoders',
            those of BLIP's retrieval are as the query's.
        ids: of each pair's image: a row of the same id is no negative. None, or `IGNORED`: a row's own alone is none.
        floor: 1e-4 in BLIP's pre-training (models/blip_pretrain.py:155), which makes easy negatives likelier.
        groups: parts of the global batch; negatives are of a row's own part. The originals have one a process.

    Raises MmjaxError: groups that do not cut the batch (`mmjax.nn.groups.cut`).
    """
    query, keys = jax.lax.stop_gradient((query.astype(jnp.float32), keys.astype(jnp.float32)))
    known = jnp.full(len(query), IGNORED) if ids is None else ids
    candidates, candidate_ids = (group_rows(x, groups, axis_name) for x in (keys, known))
    rows, own_id = (x.reshape(len(candidates), -1, *x.shape[1:]) for x in (query, known))
    similarity = jnp.einsum("grd,gmd->grm", rows, candidates, precision="highest")
    similarity = similarity / jax.lax.stop_gradient(temperature)
    weights = jnp.logaddexp(jax.nn.log_softmax(similarity), jnp.log(floor))
    same = (own_id[..., None] == candidate_ids[:, None]) & (own_id != IGNORED)[..., None]
    weights = jnp.where(same, -jnp.inf, weights).reshape(len(query), -1)
    places = group_places(len(query), groups, axis_name)
    return jnp.where(places[:, None] == jnp.arange(weights.shape[1]), -jnp.inf, weights)


def draw_negatives(keys: PRNGKeyArray, log_weights: Float[Array, "b m"]) -> Int[Array, "b"]:
    """A place in [0, m) for each row, by the weights; -1 for a row that has no negative.

    keys: one a row, of the row's place in the global batch (`mmjax.training.rng.example_keys`): any cut draws the same.
    """
    drawn = jax.vmap(jax.random.categorical)(keys, log_weights)
    return jnp.where(jnp.any(log_weights > -jnp.inf, axis=1), drawn, -1)


def matching_loss(
    logits: Float[Array, "three_b 2"], negatives: Int[Array, "two_b"], axis_name: str | None = None
) -> Float[Array, ""]:
    """Mean cross-entropy of three runs of b pairs: the first match (class 1), the other two do not (class 0).

    Args:
        logits: of (text, image), then (text, negative image), then (negative text, image).
        negatives: as drawn, of the second and of the third run. A pair whose negative is -1 is not counted: where a
            whole group shares one image the originals fail.
        axis_name: the mapped axis over which the batch is cut; the result is then this device's share, whose mean over
            devices, in value and in gradient, is the loss of the global batch.
    """
    matches = jnp.ones(len(negatives) // 2, jnp.int32)
    labels = jnp.concatenate([matches, jnp.where(negatives < 0, IGNORED, 0)])
    return token_cross_entropy(logits, labels, axis_name=axis_name).loss
