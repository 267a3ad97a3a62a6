"""Margin losses of pairs and triplets: by hand, against torch, gradients, coinciding points, and a divided batch."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from mmjax.errors import MmjaxError
from mmjax.objectives.metric_learning import (
    Triplets,
    batch_all_triplets,
    batch_hard_triplets,
    contrastive_loss,
    semi_hard_triplets,
    triplet_loss,
    triplet_mean,
)

B, D = 24, 5
FEATURES = jax.random.normal(jax.random.key(0), (B, D))
LABELS = jnp.array([*range(5), 7] * 4)
MINERS = {
    "batch all": batch_all_triplets,
    "batch all, satisfied ones too": functools.partial(batch_all_triplets, active_only=False),
    "batch hard": batch_hard_triplets,
    "semi-hard": semi_hard_triplets,
    "soft margin": functools.partial(batch_hard_triplets, margin=None),
}


def test_pairs_by_hand():
    """Distances 5 and 0.6: similar ones cost their square, dissimilar ones only within the margin of 1."""
    first, second = jnp.array([[0.0, 0.0], [1.0, 1.0]] * 2), jnp.array([[3.0, 4.0], [1.0, 1.6]] * 2)
    losses = contrastive_loss(first, second, jnp.array([1, 1, 0, 0]))
    np.testing.assert_allclose(losses, [25, 0.36, 0, 0.16], atol=1e-6)
    np.testing.assert_allclose(contrastive_loss(first, second, jnp.zeros(4), 7.0), [4, 6.4**2] * 2, rtol=1e-6)
    assert contrastive_loss(first.astype(jnp.bfloat16), second, jnp.ones(4, bool)).dtype == jnp.float32


def test_triplets_by_hand():
    """On a line at 0, 1 (class 0), 1.5, 4 (class 1) and 9 (class 2, alone), margin 0.2."""
    points, labels = jnp.array([[0.0], [1.0], [1.5], [4.0], [9.0]]), jnp.array([0, 0, 1, 1, 2])
    # (anchor, positive) -> violations by its negatives, nearest first:
    #   0, 1: 1 - 1.5, 1 - 4, 1 - 9    1, 0: 1 - .5, 1 - 3, 1 - 8    1.5, 4: 2.5 - .5, 2.5 - 1.5, 2.5 - 7.5
    #   4, 1.5: 2.5 - 3, 2.5 - 4, 2.5 - 5
    hard = batch_hard_triplets(points, labels)
    np.testing.assert_allclose(hard.losses, [0, 0.7, 2.2, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(hard.counts, [1, 1, 1, 1, 0])
    everything = batch_all_triplets(points, labels)
    np.testing.assert_allclose(everything.losses, [0, 0.7, 2.2 + 1.2, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(everything.counts, [0, 1, 2, 0, 0])
    np.testing.assert_array_equal(batch_all_triplets(points, labels, active_only=False).counts, [3, 3, 3, 3, 0])
    assert abs(float(triplet_mean(everything).value) - 4.1 / 3) < 1e-6
    # Semi-hard, not squared: 0 -> 1.5, 1 -> 3, 1.5 -> 7.5, 4 -> 3: all farther by more than the margin.
    assert not np.any(semi_hard_triplets(points, labels, squared=False).losses)
    # Margin 1: violations + 1 of the same negatives. Squared: 1 - 2.25, 1 - 9, 6.25 - 56.25, 6.25 - 9.
    np.testing.assert_allclose(
        semi_hard_triplets(points, labels, 1.0, squared=False).losses, [0.5, 0, 0, 0.5, 0], atol=1e-6
    )
    np.testing.assert_allclose(semi_hard_triplets(points, labels, 3.0).losses, [1.75, 0, 0, 0.25, 0], atol=1e-6)
    # Without the point at 9 the anchor 1.5 has no negative farther than its positive: of 1.5 and 0.5 the farther one.
    np.testing.assert_allclose(
        semi_hard_triplets(points[:4], labels[:4], squared=False).losses, [0, 0, 1.2, 0], atol=1e-6
    )
    soft = batch_hard_triplets(points, labels, margin=None)
    np.testing.assert_allclose(soft.losses[:4], np.log1p(np.exp([-0.5, 0.5, 2.0, -0.5])), rtol=1e-6)


def plain(points: np.ndarray, labels: np.ndarray, margin: float, rule: str) -> tuple[float, int]:
    """(sum, count), triplet by triplet."""
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1).astype(np.float64)
    total, count = 0.0, 0
    for anchor in range(len(points)):
        positives = [i for i in np.flatnonzero(labels == labels[anchor]) if i != anchor]
        negatives = np.flatnonzero(labels != labels[anchor])
        if rule == "batch hard":
            chosen = [(max(distance[anchor, positives]), min(distance[anchor, negatives]))]
        elif rule == "batch all":
            chosen = list(itertools.product(distance[anchor, positives], distance[anchor, negatives]))
        else:
            chosen = []
            for near in distance[anchor, positives] ** 2:
                far = distance[anchor, negatives] ** 2
                chosen.append((near, min(far[far > near]) if (far > near).any() else max(far)))
        losses = [max(0.0, near - far + margin) for near, far in chosen]
        total += sum(losses)
        count += sum(loss > 0 for loss in losses) if rule == "batch all" else len(losses)
    return total, count


@pytest.mark.parametrize("name", ["batch all", "batch hard", "semi-hard"])
def test_mining_is_the_triplet_by_triplet_rule(name):
    mined = jax.jit(functools.partial(MINERS[name], margin=0.5))(FEATURES, LABELS)
    total, count = plain(np.asarray(FEATURES), np.asarray(LABELS), 0.5, name)
    assert abs(float(mined.losses.sum()) - total) < 1e-5 * total and float(mined.counts.sum()) == count


@pytest.mark.parametrize("name", ["batch all", "batch hard", "semi-hard", "soft margin"])
def test_gradients_match_finite_differences(name):
    """Where no hinge and no choice changes nearby: distances differ, and every triplet violates the margin."""
    points = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [2.5, 3.0], [-4.0, 1.0], [-4.0, -2.0]])
    miner = MINERS[name] if name == "soft margin" else functools.partial(MINERS[name], margin=80.0)
    loss = jax.jit(lambda x: triplet_mean(miner(x, jnp.array([0, 0, 1, 1, 2, 2]))).value)
    check_grads(loss, (points,), order=1, modes=["rev"], eps=1e-2, atol=1e-2, rtol=1e-2)


def test_gradients_of_single_pairs_and_triplets_are_slopes():
    a, b, c = (jax.random.normal(jax.random.key(seed), (B, D)) for seed in range(1, 4))
    similar = jnp.arange(B) % 2
    pairs = jax.jit(lambda x, y: contrastive_loss(x, y, similar, 4.0))
    check_grads(pairs, (a, b), order=1, modes=["rev"], eps=1e-3)
    check_grads(jax.jit(triplet_loss), (a, b, c), order=1, modes=["rev"], eps=1e-3)


@pytest.mark.parametrize("name", ["batch all", "batch hard", "semi-hard", "soft margin"])
def test_coinciding_points_have_finite_gradients(name):
    """All in one point, and every point twice; also of negatives alone, of positives alone, and of a single point."""
    twice = jnp.concatenate([FEATURES[:12]] * 2)
    distinct, equal = jnp.arange(B), jnp.zeros(B, jnp.int32)
    loss = jax.jit(jax.value_and_grad(lambda x, y: triplet_mean(MINERS[name](x, y)).value))
    for points, labels in (
        (jnp.ones((B, D)), LABELS),
        (twice, LABELS),
        (twice, distinct),
        (FEATURES, equal),
    ):
        value, slope = loss(points, labels)
        assert np.isfinite(value) and np.isfinite(slope).all()
        if labels is not LABELS:  # no positive, or no negative
            assert value == 0 and not slope.any()
    alone = MINERS[name](FEATURES[:1], equal[:1])
    assert alone.losses == 0 and alone.counts == 0


def test_pairs_of_coinciding_points_have_finite_gradients():
    for similar in (0, 1):
        slope = jax.grad(lambda x, y=similar: contrastive_loss(x, jnp.ones((3, D)), jnp.full(3, y)).sum())
        assert not slope(jnp.ones((3, D))).any()
    slope = jax.grad(lambda x: triplet_loss(x, x, jnp.ones((3, D))).sum())(jnp.ones((3, D)))
    assert not slope.any()


def test_near_points_lose_no_digits():
    """Far from the origin, as products of float32 features would: |x|^2 = 4e6 there has steps of 0.25."""
    points = jnp.array([[2000.0, 0.0], [2000.0, 0.125], [2000.0, 0.25]])
    hard = batch_hard_triplets(points, jnp.array([0, 0, 1]), margin=0.0625)
    np.testing.assert_array_equal(hard.losses, [0, 0.0625, 0])


@pytest.mark.parametrize("name", ["batch all", "batch all, satisfied ones too", "batch hard", "semi-hard"])
def test_a_divided_batch_is_one(name, devices=8, blocks=3):
    """The mapped axis is vmap's, with pmap's collectives; totals and counts add up to the global batch's value, and
    gradients of totals to its gradient."""

    def share(weight, x, labels, axis_name):
        mean = triplet_mean(MINERS[name](x @ weight, labels, axis_name=axis_name, blocks=blocks))
        return mean.total, mean.count

    def mapped(weight, x, labels):
        (total, count), slope = jax.value_and_grad(share, has_aux=True)(weight, x, labels, "data")
        total, count, slope = jax.lax.psum((total, count, slope), "data")
        return total / count, slope / count

    weight = jax.random.normal(jax.random.key(9), (D, D))
    shards = (x.reshape(devices, -1, *x.shape[1:]) for x in (FEATURES, LABELS))
    values, slopes = jax.jit(jax.vmap(mapped, in_axes=(None, 0, 0), axis_name="data"))(weight, *shards)
    whole = jax.jit(jax.value_and_grad(lambda w: triplet_mean(MINERS[name](FEATURES @ w, LABELS)).value))
    expected = whole(weight)
    np.testing.assert_allclose(values[0], expected[0], rtol=1e-5)
    assert np.abs(slopes[0] - expected[1]).max() <= 1e-5 * np.abs(expected[1]).max()


def test_blocks_keep_the_order_of_anchors_and_must_divide_the_batch():
    whole, divided = batch_hard_triplets(FEATURES, LABELS), batch_hard_triplets(FEATURES, LABELS, blocks=4)
    for one, other in zip(whole, divided):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    with pytest.raises(MmjaxError, match="blocks=5 does not divide a batch of 24 rows"):
        batch_hard_triplets(FEATURES, LABELS, blocks=5)


def test_the_mean_counts_triplets_not_anchors():
    assert float(triplet_mean(Triplets(jnp.array([3.0, 0.0]), jnp.array([2.0, 0.0]))).value) == 1.5


@pytest.mark.torch
@pytest.mark.parametrize("margin", [0.3, 1.0])
def test_matches_torch(margin):
    """TripletMarginLoss, and the formula of pairs written in torch; values and gradients."""
    import torch

    arrays = [np.asarray(jax.random.normal(jax.random.key(seed), (B, D))) for seed in range(3)]
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    expected = torch.nn.TripletMarginLoss(margin, eps=0.0)(*tensors)
    expected.backward()
    value, slopes = jax.value_and_grad(lambda *x: triplet_loss(*x, margin).mean(), (0, 1, 2))(*arrays)
    assert abs(float(value) - expected.item()) < 1e-6 * expected.item()
    for slope, tensor in zip(slopes, tensors):
        assert tensor.grad is not None
        np.testing.assert_allclose(slope, tensor.grad.numpy(), rtol=0, atol=1e-6)
    first, second = (torch.tensor(x, requires_grad=True) for x in arrays[:2])
    y, distance = torch.arange(B) % 2, torch.linalg.vector_norm(first - second, dim=1)
    expected = (y * distance**2 + (1 - y) * torch.clamp(3 * margin - distance, min=0) ** 2).mean()
    expected.backward()
    similar = jnp.arange(B) % 2
    value, slope = jax.value_and_grad(lambda x: contrastive_loss(x, arrays[1], similar, 3 * margin).mean())(arrays[0])
    assert abs(float(value) - expected.item()) < 1e-6 * expected.item()
    assert first.grad is not None
    np.testing.assert_allclose(slope, first.grad.numpy(), rtol=0, atol=1e-6)
