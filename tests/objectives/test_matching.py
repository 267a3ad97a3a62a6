"""Hard negatives and the matching loss: by hand, the vaults' negatives, samples by chi-square, and over 8 devices."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives.test_momentum_contrast import units, vault
from safetensors.numpy import load_file
from scipy import stats

from mmjax.errors import MmjaxError
from mmjax.nn.groups import take_in_group
from mmjax.objectives.language import IGNORED
from mmjax.objectives.matching import (
    has_negative,
    matching_loss,
    matching_metrics,
    mixed_with_uniform,
    negative_log_weights,
    sample_negatives,
)
from mmjax.training.rng import example_keys

B, D = 16, 7
QUERY, KEYS = units(0, B, D), units(1, B, D)
IDS = jnp.array([0, 1, 1, 2, 3, 3, 3, IGNORED, 4, 5, 5, IGNORED, 6, 7, 0, 8])


def plain_weights(query, keys, temperature, ids=None, floor=0.0):
    """The originals' formula, in float64."""
    scores = np.asarray(query, np.float64) @ np.asarray(keys, np.float64).T / temperature
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights = weights / weights.sum(1, keepdims=True) + floor
    ids = np.arange(len(query)) if ids is None else np.asarray(ids)
    weights[(ids[:, None] == ids) & ((ids != IGNORED)[:, None] | np.eye(len(ids), dtype=bool))] = 0
    np.fill_diagonal(weights, 0)
    return weights


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("floor", [0.0, 1e-4, 0.1])
def test_weights_match_the_plain_formula(ids, floor):
    log_weights = negative_log_weights(QUERY, KEYS, 0.3, ids=ids, floor=floor)
    expected = plain_weights(QUERY, KEYS, 0.3, ids, floor)
    np.testing.assert_allclose(np.exp(log_weights), expected, rtol=2e-5, atol=0)
    assert not np.any(np.exp(np.diagonal(log_weights))) and (ids is None or log_weights[1, 2] == -np.inf)


def test_groups_are_independent():
    whole = negative_log_weights(QUERY, KEYS, 0.3, ids=IDS, floor=0.01, groups=4)
    assert whole.shape == (B, 4)
    for first in range(0, B, 4):
        part = slice(first, first + 4)
        alone = negative_log_weights(QUERY[part], KEYS[part], 0.3, ids=IDS[part], floor=0.01)
        np.testing.assert_allclose(whole[part], alone, rtol=1e-6)
    with pytest.raises(MmjaxError, match="groups=3 does not cut a global batch of 16"):
        negative_log_weights(QUERY, KEYS, 0.3, groups=3)


@pytest.mark.parametrize("name", ["albef_pretrain", "albef_retrieval", "blip_pretrain", "blip_retrieval"])
def test_recorded_negatives_are_the_largest(golden_dir, name):
    features, recorded = vault(golden_dir, name), load_file(golden_dir / f"{name}.safetensors")
    kinds = {"image": features["image_keys"], "text": features["text_keys"]}
    if name == "blip_retrieval":
        kinds = {kind: features[kind] for kind in kinds}
    floor = 1e-4 if name == "blip_pretrain" else 0.0
    ids = jnp.asarray(features["ids"]) if "ids" in features else None
    for kind, other in (("image", "text"), ("text", "image")):
        weights = negative_log_weights(
            jnp.asarray(features[other]), jnp.asarray(kinds[kind]), float(features["temp"]), ids=ids, floor=floor
        )
        np.testing.assert_array_equal(jnp.argmax(weights, 1), recorded[f"outputs/neg_{kind}_idx"])


@pytest.mark.parametrize("name", ["albef_pretrain", "albef_retrieval", "blip_pretrain", "blip_retrieval"])
def test_recorded_matching_losses(golden_dir, name):
    recorded = load_file(golden_dir / f"{name}.safetensors")
    logits = jnp.asarray(recorded["outputs/itm_logits"])
    value = matching_loss(logits, jnp.full(len(logits) // 3, True)).value
    assert abs(float(value - recorded["outputs/loss_itm"])) < 1e-6 * float(recorded["outputs/loss_itm"])


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_samples_follow_the_weights(floor):
    """Chi-square of 20,000 samples per row over the negatives that are expected at least 5 times."""
    draws = 20_000
    weights = negative_log_weights(QUERY[:5], KEYS[:5], 0.4, ids=IDS[:5], floor=floor)
    seeds = jax.random.split(jax.random.key(3), draws)
    sampled = np.asarray(jax.jit(jax.vmap(lambda key: sample_negatives(example_keys(key, 5), weights)))(seeds))
    expected = plain_weights(QUERY[:5], KEYS[:5], 0.4, IDS[:5], floor)
    expected *= draws / expected.sum(1, keepdims=True)
    for row, expected_counts in enumerate(expected):
        counts = np.bincount(sampled[:, row], minlength=5)
        assert not counts[expected_counts == 0].any()
        often = expected_counts >= 5
        assert often.sum() > 1 and counts[~often].sum() < 20
        pairs = counts[often], expected_counts[often] * counts[often].sum() / expected_counts[often].sum()
        assert stats.chisquare(*pairs).pvalue > 1e-3
    # Rows sample independently, even with nearly equal weights.
    assert len({tuple(sampled[:50, row]) for row in range(5)}) == 5


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_negatives_is_uniform(share):
    """(1 - share) p + share u over the same negatives; a row without negatives stays one."""
    ids = IDS.at[:2].set(9)
    weights = negative_log_weights(QUERY, KEYS, 0.05, ids=ids)
    plain = plain_weights(QUERY, KEYS, 0.05, ids)
    expected = (1 - share) * plain / plain.sum(1, keepdims=True)
    expected += share * (plain > 0) / (plain > 0).sum(1, keepdims=True)
    mixed = np.exp(mixed_with_uniform(weights, jnp.float32(share)))
    np.testing.assert_allclose(mixed, expected, rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(mixed.sum(1), 1, rtol=1e-5)
    nothing = mixed_with_uniform(jnp.full((2, 3), -jnp.inf), share)
    assert (nothing == -jnp.inf).all()


def test_a_negative_is_sampled_where_every_weight_underflows():
    """Queries equal to their keys at a temperature of 1e-3: all but the positive are 0 in float32."""
    keys = jnp.concatenate([jnp.eye(3), jnp.array([[0.6, 0.8, 0.0]])])
    weights = negative_log_weights(keys, keys, 1e-3)
    softmax = jax.nn.softmax(keys @ keys.T / 1e-3) * (1 - jnp.eye(4))
    assert not np.any(softmax)
    sampled = jax.vmap(lambda key: sample_negatives(example_keys(key, 4), weights))(
        jax.random.split(jax.random.key(0), 50)
    )
    # The nearest other key; for the third all are equally far.
    np.testing.assert_array_equal(sampled[:, [0, 1, 3]], np.tile([3, 3, 1], (50, 1)))
    assert set(np.asarray(sampled[:, 2])) == {0, 1, 3}


def test_a_row_without_negatives_gives_minus_one_and_is_not_counted():
    ids = jnp.array([3, 3, 3, 4])
    sampled = sample_negatives(
        example_keys(jax.random.key(0), 4), negative_log_weights(KEYS[:4], KEYS[:4], 0.1, ids=ids)
    )
    assert list(map(int, sampled[:3])) == [3, 3, 3] and int(sampled[3]) in (0, 1, 2)
    everywhere = negative_log_weights(KEYS[:4], KEYS[:4], 0.1, ids=jnp.full(4, 3), floor=1e-4)
    np.testing.assert_array_equal(sample_negatives(example_keys(jax.random.key(0), 4), everywhere), [-1] * 4)
    alone = negative_log_weights(KEYS[:4], KEYS[:4], 0.1, groups=4)
    np.testing.assert_array_equal(sample_negatives(example_keys(jax.random.key(0), 4), alone), [-1] * 4)
    all_of_one = jnp.full(4, 3)
    for pair_ids, groups, expected in ((ids, 1, [1] * 4), (all_of_one, 1, [0] * 4), (None, 4, [0] * 4)):
        np.testing.assert_array_equal(has_negative(4, pair_ids, groups), expected)
    # Two pairs; the first has no negative.
    logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0], [9.0, 1.0], [4.0, 1.0], [1.0, 1.0], [7.0, 2.0]]))
    counted = [4 / 3, 2, 5 / 4, 9 / 7]
    slope = jax.value_and_grad(lambda logits, counted: matching_loss(logits, counted).value)
    value, slopes = slope(logits, jnp.array([False, True]))
    assert abs(float(value) - sum(map(math.log, counted)) / 4) < 1e-6
    assert not np.any(slopes[jnp.array([2, 4])]) and np.all(slopes[jnp.array([0, 1, 3, 5])])
    value, _ = slope(logits, jnp.array([True, True]))
    assert abs(float(value) - sum(map(math.log, [*counted, 10 / 9, 2])) / 6) < 1e-6


def test_weights_have_no_gradient():
    slopes = jax.grad(lambda *a: jnp.sum(jnp.where(jnp.eye(B), 0.0, negative_log_weights(*a))), (0, 1, 2))
    assert not any(np.any(slope) for slope in slopes(QUERY, KEYS, jnp.float32(0.3)))


@pytest.mark.torch
def test_matches_torch():
    import torch

    logits = torch.tensor(np.asarray(units(2, 3 * B, 2)), requires_grad=True)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1] * B + [0] * 2 * B))
    expected.backward()
    slope = jax.value_and_grad(lambda logits: matching_loss(logits, jnp.full(B, True)).value)
    value, slopes = slope(units(2, 3 * B, 2))
    assert abs(float(value) - expected.item()) < 1e-6 * expected.item() and logits.grad is not None
    np.testing.assert_allclose(slopes, logits.grad.numpy(), rtol=1e-5, atol=1e-8)


def over_devices() -> dict[str, float]:
    """Largest relative errors of loss and gradients of a whole matching step; NaN where samples differ."""
    devices, errors = jax.device_count(), {}
    kernel, rng = units(9, D, 2), jax.random.key(4)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = {"image": QUERY, "text": KEYS, "ids": IDS.at[:4].set(2)}

    def step(weight, batch, groups, axis_name=None):
        image, text = batch["image"] @ weight, batch["text"] @ weight
        options = {"groups": groups, "axis_name": axis_name}
        keys = example_keys(rng, len(image), axis_name)

        def negatives(query, others):
            return sample_negatives(keys, negative_log_weights(query, others, 0.3, ids=batch["ids"], **options))

        images, texts = negatives(text, image), negatives(image, text)
        pairs = [
            (image, text),
            (take_in_group(image, images, **options), text),
            (image, take_in_group(text, texts, **options)),
        ]
        logits = jnp.concatenate([image * text @ kernel for image, text in pairs])
        loss = matching_loss(logits, has_negative(len(image), batch["ids"], **options))
        count = loss.count if axis_name is None else jax.lax.psum(loss.count, axis_name)
        return loss.total / count, (images, texts)

    for groups in (1, 4, 8):
        slopes = jax.value_and_grad(lambda w, b, a=None, groups=groups: step(w, b, groups, a), has_aux=True)
        (value, sampled), slope = jax.jit(slopes)(jnp.eye(D), batch)
        share = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        (shares, shard_samples), parts = jax.pmap(lambda b, slopes=slopes: slopes(jnp.eye(D), b, "data"), "data")(share)
        sharded = jax.tree.map(lambda x: jax.device_put(x, spread), batch)
        (mesh_value, mesh_samples), mesh_slope = jax.jit(slopes)(jnp.eye(D), sharded)
        for lift, value_of_lift, draws, grads in (
            ("pmap", shares.sum(), shard_samples, parts.sum(0)),
            ("mesh", mesh_value, mesh_samples, mesh_slope),
        ):
            same = all(np.array_equal(np.ravel(a), b) for a, b in zip(draws, sampled))
            worst = max(abs(float(value_of_lift / value) - 1), float(np.abs(grads - slope).max() / np.abs(slope).max()))
            errors[f"{groups} {lift}"] = worst if same else math.nan
        # Rows of one image leave the group of the first two without a negative.
        assert (int(sampled[0][0]) < 0) == (groups > 2), sampled
    return errors


def test_eight_devices_match_one(repository):
    """Samples are identical, loss and gradients to rounding; devices count different numbers of pairs."""
    environment = os.environ | {
        "PYTHONPATH": f"{repository}:{repository}/tests",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
    }
    script = "import json, objectives.test_matching as t; print(json.dumps(t.over_devices()))"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr[-3000:]
    errors = json.loads(result.stdout)
    assert len(errors) == 6
    assert all(error <= 1e-5 for error in errors.values()), errors


def test_metrics_show_progress_where_accuracy_does_not():
    """By hand, with ties and a pair without negatives; over devices the negatives of all count."""
    rng = np.random.default_rng(3)
    logits = np.zeros((3 * B, 2), np.float32)
    logits[:, 1] = rng.integers(-5, 3, 3 * B)  # whole numbers: several are equal
    counted = np.arange(B) != 4
    scores = (logits[:, 1] - logits[:, 0]).reshape(3, B)
    negatives = scores[1:][:, counted].ravel()
    wins = (scores[0][:, None] > negatives) + 0.5 * (scores[0][:, None] == negatives)
    metrics = {name: float(mean.value) for name, mean in matching_metrics(logits, jnp.asarray(counted)).items()}
    right = np.concatenate([scores[0] > 0, scores[1][counted] <= 0, scores[2][counted] <= 0])
    expected = {
        "matching_accuracy": right.mean(),
        "matching_auc": wins.mean(),
        "matching_gap": (scores[0] - scores[1:].mean(0))[counted].mean(),
    }
    assert metrics == pytest.approx(expected, rel=1e-6)
    parts = logits.reshape(3, 4, B // 4, 2).swapaxes(0, 1).reshape(4, -1, 2), counted.reshape(4, -1)
    cut = jax.vmap(lambda *part: matching_metrics(*part, "data"), axis_name="data")(*parts)
    summed = {name: float(mean.total.sum() / mean.count.sum()) for name, mean in cut.items()}
    assert summed == pytest.approx(expected, rel=1e-6)
    # A head that always answers "no", but less so for those that match.
    quiet = np.stack([np.full(3 * B, 5.0), np.repeat([0.2, 0.1, 0.0], B)], 1)
    metrics = {name: float(mean.value) for name, mean in matching_metrics(quiet, jnp.ones(B, bool)).items()}
    assert metrics == pytest.approx({"matching_accuracy": 2 / 3, "matching_auc": 1.0, "matching_gap": 0.15}, rel=1e-5)
    nothing = matching_metrics(logits, jnp.zeros(B, bool))
    assert np.isnan(nothing["matching_auc"].value) and float(nothing["matching_auc"].total) == 0
