"""Hard negatives and the matching loss: by hand, the vaults' picks, draws by chi-square, and over 8 devices."""

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
from mmjax.objectives.matching import draw_negatives, matching_loss, negative_log_weights
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
def test_weights_are_the_plain_formula(ids, floor):
    ours = negative_log_weights(QUERY, KEYS, 0.3, ids=ids, floor=floor)
    wanted = plain_weights(QUERY, KEYS, 0.3, ids, floor)
    np.testing.assert_allclose(np.exp(ours), wanted, rtol=2e-5, atol=0)
    assert not np.any(np.exp(np.diagonal(ours))) and (ids is None or ours[1, 2] == -np.inf)


def test_each_group_has_its_own():
    whole = negative_log_weights(QUERY, KEYS, 0.3, ids=IDS, floor=0.01, groups=4)
    assert whole.shape == (B, 4)
    for first in range(0, B, 4):
        part = slice(first, first + 4)
        alone = negative_log_weights(QUERY[part], KEYS[part], 0.3, ids=IDS[part], floor=0.01)
        np.testing.assert_allclose(whole[part], alone, rtol=1e-6)
    with pytest.raises(MmjaxError, match="groups=3 does not cut a global batch of 16"):
        negative_log_weights(QUERY, KEYS, 0.3, groups=3)


@pytest.mark.parametrize("name", ["albef_pretrain", "albef_retrieval", "blip_pretrain", "blip_retrieval"])
def test_the_vaults_picks_are_the_largest(golden_dir, name):
    told, recorded = vault(golden_dir, name), load_file(golden_dir / f"{name}.safetensors")
    kinds = {"image": told["image_keys"], "text": told["text_keys"]}
    if name == "blip_retrieval":
        kinds = {kind: told[kind] for kind in kinds}
    floor = 1e-4 if name == "blip_pretrain" else 0.0
    ids = jnp.asarray(told["ids"]) if "ids" in told else None
    for kind, other in (("image", "text"), ("text", "image")):
        weights = negative_log_weights(
            jnp.asarray(told[other]), jnp.asarray(kinds[kind]), float(told["temp"]), ids=ids, floor=floor
        )
        np.testing.assert_array_equal(jnp.argmax(weights, 1), recorded[f"outputs/neg_{kind}_idx"])


@pytest.mark.parametrize("name", ["albef_pretrain", "albef_retrieval", "blip_pretrain", "blip_retrieval"])
def test_the_vaults_matching_losses(golden_dir, name):
    recorded = load_file(golden_dir / f"{name}.safetensors")
    negatives = np.concatenate([recorded[f"outputs/neg_{kind}_idx"] for kind in ("image", "text")])
    value = matching_loss(jnp.asarray(recorded["outputs/itm_logits"]), jnp.asarray(negatives))
    assert abs(float(value - recorded["outputs/loss_itm"])) < 1e-6 * float(recorded["outputs/loss_itm"])


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_draws_have_the_weights_frequencies(floor):
    """Chi-square of 20,000 draws a row over the negatives that are expected at least 5 times."""
    draws = 20_000
    weights = negative_log_weights(QUERY[:5], KEYS[:5], 0.4, ids=IDS[:5], floor=floor)
    seeds = jax.random.split(jax.random.key(3), draws)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: draw_negatives(example_keys(key, 5), weights)))(seeds))
    expected = plain_weights(QUERY[:5], KEYS[:5], 0.4, IDS[:5], floor)
    expected *= draws / expected.sum(1, keepdims=True)
    for row, wanted in enumerate(expected):
        found = np.bincount(drawn[:, row], minlength=5)
        assert not found[wanted == 0].any()
        often = wanted >= 5
        assert often.sum() > 1 and found[~often].sum() < 20
        pairs = found[often], wanted[often] * found[often].sum() / wanted[often].sum()
        assert stats.chisquare(*pairs).pvalue > 1e-3
    # Rows draw each for itself: of two with nearly the same weights no copy of the other's.
    assert len({tuple(drawn[:50, row]) for row in range(5)}) == 5


def test_where_every_weight_underflows_a_negative_is_drawn():
    """Queries equal to their keys at a temperature of 1e-3: all but the positive are 0 in float32."""
    keys = jnp.concatenate([jnp.eye(3), jnp.array([[0.6, 0.8, 0.0]])])
    weights = negative_log_weights(keys, keys, 1e-3)
    softmax = jax.nn.softmax(keys @ keys.T / 1e-3) * (1 - jnp.eye(4))
    assert not np.any(softmax)
    drawn = jax.vmap(lambda key: draw_negatives(example_keys(key, 4), weights))(jax.random.split(jax.random.key(0), 50))
    # The nearest but itself; of the third's all are as far.
    np.testing.assert_array_equal(drawn[:, [0, 1, 3]], np.tile([3, 3, 1], (50, 1)))
    assert set(np.asarray(drawn[:, 2])) == {0, 1, 3}


def test_a_row_without_negatives_is_told_and_not_counted():
    ids = jnp.array([3, 3, 3, 4])
    drawn = draw_negatives(example_keys(jax.random.key(0), 4), negative_log_weights(KEYS[:4], KEYS[:4], 0.1, ids=ids))
    assert list(map(int, drawn[:3])) == [3, 3, 3] and int(drawn[3]) in (0, 1, 2)
    everywhere = negative_log_weights(KEYS[:4], KEYS[:4], 0.1, ids=jnp.full(4, 3), floor=1e-4)
    np.testing.assert_array_equal(draw_negatives(example_keys(jax.random.key(0), 4), everywhere), [-1] * 4)
    alone = negative_log_weights(KEYS[:4], KEYS[:4], 0.1, groups=4)
    np.testing.assert_array_equal(draw_negatives(example_keys(jax.random.key(0), 4), alone), [-1] * 4)
    # Two pairs; the first text has no negative image, the second image no negative text.
    logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0], [9.0, 1.0], [4.0, 1.0], [1.0, 1.0], [7.0, 2.0]]))
    counted = [4 / 3, 2, 5 / 4, 2]
    value, slopes = jax.value_and_grad(matching_loss)(logits, jnp.array([-1, 0, 1, -1]))
    assert abs(float(value) - sum(map(math.log, counted)) / 4) < 1e-6
    assert not np.any(slopes[jnp.array([2, 5])]) and np.all(slopes[jnp.array([0, 1, 3, 4])])
    value = matching_loss(logits, jnp.array([1, 0, 1, 0]))
    assert abs(float(value) - sum(map(math.log, [*counted, 10 / 9, 9 / 7])) / 6) < 1e-6


def test_nothing_has_a_gradient_but_the_logits():
    slopes = jax.grad(lambda *a: jnp.sum(jnp.where(jnp.eye(B), 0.0, negative_log_weights(*a))), (0, 1, 2))
    assert not any(np.any(slope) for slope in slopes(QUERY, KEYS, jnp.float32(0.3)))


@pytest.mark.torch
def test_torch_says_the_same():
    import torch

    logits = torch.tensor(np.asarray(units(2, 3 * B, 2)), requires_grad=True)
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([1] * B + [0] * 2 * B))
    wanted.backward()
    value, slopes = jax.value_and_grad(matching_loss)(units(2, 3 * B, 2), jnp.zeros(2 * B, jnp.int32))
    assert abs(float(value) - wanted.item()) < 1e-6 * wanted.item() and logits.grad is not None
    np.testing.assert_allclose(slopes, logits.grad.numpy(), rtol=1e-5, atol=1e-8)


def over_devices() -> dict[str, float]:
    """Largest relative errors of loss and gradients of a whole matching step; NaN where draws differ."""
    devices, errors = jax.device_count(), {}
    kernel, rng = units(9, D, 2), jax.random.key(4)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = {"image": QUERY, "text": KEYS, "ids": IDS.at[:4].set(2)}

    def step(weight, batch, groups, axis_name=None):
        image, text = batch["image"] @ weight, batch["text"] @ weight
        how = {"groups": groups, "axis_name": axis_name}
        keys = example_keys(rng, len(image), axis_name)

        def negatives(query, others):
            return draw_negatives(keys, negative_log_weights(query, others, 0.3, ids=batch["ids"], **how))

        images, texts = negatives(text, image), negatives(image, text)
        pairs = [(image, text), (take_in_group(image, images, **how), text), (image, take_in_group(text, texts, **how))]
        logits = jnp.concatenate([image * text @ kernel for image, text in pairs])
        return matching_loss(logits, jnp.concatenate([images, texts]), axis_name), (images, texts)

    for groups in (1, 4, 8):
        slopes = jax.value_and_grad(lambda w, b, a=None, groups=groups: step(w, b, groups, a), has_aux=True)
        (value, drawn), slope = jax.jit(slopes)(jnp.eye(D), batch)
        share = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        (shares, theirs), parts = jax.pmap(lambda b, slopes=slopes: slopes(jnp.eye(D), b, "data"), "data")(share)
        placed = jax.tree.map(lambda x: jax.device_put(x, spread), batch)
        (mesh_value, mesh_drawn), mesh_slope = jax.jit(slopes)(jnp.eye(D), placed)
        for lift, found, draws, grads in (
            ("pmap", shares.mean(), theirs, parts.mean(0)),
            ("mesh", mesh_value, mesh_drawn, mesh_slope),
        ):
            same = all(np.array_equal(np.ravel(a), b) for a, b in zip(draws, drawn))
            worst = max(abs(float(found / value) - 1), float(np.abs(grads - slope).max() / np.abs(slope).max()))
            errors[f"{groups} {lift}"] = worst if same else math.nan
        # Rows of one image leave the group of the first two without a negative.
        assert (int(drawn[0][0]) < 0) == (groups > 2), drawn
    return errors


def test_eight_devices_are_one(repository):
    """Draws the very same, loss and gradients to rounding; devices count different numbers of pairs."""
    environment = os.environ | {
        "PYTHONPATH": f"{repository}:{repository}/tests",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    script = "import json, objectives.test_matching as t; print(json.dumps(t.over_devices()))"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr[-3000:]
    errors = json.loads(result.stdout)
    assert len(errors) == 6
    assert all(error <= 1e-5 for error in errors.values()), errors
