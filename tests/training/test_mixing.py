"""Mixup and CutMix: values by hand, the distribution of the shares, and the same pairs for every cut of the batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.training.mixing import Mixing, cut_box, previous

B, H, W, C = 6, 11, 7, 5
IMAGES = jax.random.normal(jax.random.key(0), (B, H, W, 3))
TARGETS = jax.nn.one_hot(jnp.arange(B) % C, C)


@functools.cache
def compiled(mixing: Mixing) -> Any:
    return jax.jit(lambda key, hparams: mixing(key, IMAGES, TARGETS, hparams))


def mixed(mixing: Mixing, seed: int = 1, **hparams: float) -> Any:
    values = mixing.hparams | {name: jnp.float32(value) for name, value in hparams.items()}
    return compiled(mixing)(jax.random.key(seed), values)


def share_of(targets: Any) -> float:
    """The share of its own label in the target of row 1."""
    return float(targets[1, 1])


def test_mixup_by_hand():
    images, targets = mixed(Mixing(mixup=0.3))
    share = share_of(targets)
    assert 0 < share < 1
    np.testing.assert_allclose(images, share * IMAGES + (1 - share) * np.roll(IMAGES, 1, 0), atol=1e-6)
    np.testing.assert_allclose(targets, share * TARGETS + (1 - share) * np.roll(TARGETS, 1, 0), atol=1e-6)


def test_cutmix_by_hand():
    shares = []
    for seed in range(20):
        images, targets = mixed(Mixing(cutmix=1.0), seed)
        other = np.roll(IMAGES, 1, 0)
        taken = np.asarray((images == other).all(-1))
        keep_mask = np.asarray((images == IMAGES).all(-1))
        assert (taken ^ keep_mask).all() and (taken == taken[0]).all()
        rows, columns = taken[0].any(1), taken[0].any(0)
        np.testing.assert_array_equal(taken[0], np.outer(rows, columns))  # one box
        for axis in (rows, columns):
            assert np.abs(np.diff(np.pad(axis.astype(int), 1))).sum() in (0, 2)
        shares.append(taken[0].mean())
        np.testing.assert_allclose(share_of(targets), 1 - shares[-1], atol=1e-6)
        np.testing.assert_allclose(targets.sum(1), np.ones(B), atol=1e-6)
    assert len(set(shares)) > 10


def test_boxes_by_hand():
    """share 0.75: a box of half the height and half the width, less what lies outside."""
    for seed in range(30):
        inside, share = cut_box(jax.random.key(seed), 16, 8, jnp.float32(0.75))
        row_rng, column_rng = jax.random.split(jax.random.key(seed))
        row, column = (int(jax.random.randint(rng, (), 0, n)) for rng, n in ((row_rng, 16), (column_rng, 8)))
        expected = np.zeros((16, 8), bool)
        expected[max(row - 4, 0) : row + 4, max(column - 2, 0) : column + 2] = True
        np.testing.assert_array_equal(inside, expected)
        assert share == 1 - expected.mean()


@pytest.mark.parametrize(("alpha", "keep_larger"), [(0.2, False), (1.0, True)])
def test_shares_follow_beta(alpha: float, keep_larger: bool):
    mixing = Mixing(mixup=alpha, keep_larger=keep_larger)
    draw = jax.jit(jax.vmap(lambda key: mixing(key, IMAGES[:2, :1, :1], TARGETS[:2], mixing.hparams)[1][1, 1]))
    shares = np.asarray(draw(jax.random.split(jax.random.key(7), 4000)), np.float64)
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(a, a)
    np.testing.assert_allclose(np.mean((shares - 0.5) ** 2), variance, rtol=0.1)
    assert shares.min() >= (0.5 if keep_larger else 0)
    if not keep_larger:
        assert abs(shares.mean() - 0.5) < 5 * (variance / 4000) ** 0.5


def test_with_both_a_coin_decides():
    mixing = Mixing(mixup=0.2, cutmix=1.0)
    cut = 0
    for seed in range(60):
        images = mixed(mixing, seed)[0]
        cut += bool(((images == IMAGES) | (images == np.roll(IMAGES, 1, 0))).all())
    assert 17 < cut < 43


def test_alphas_are_read_from_the_hyper_parameters():
    images, targets = mixed(Mixing(mixup=0.3), mixup=0.0)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(targets, TARGETS)
    images, targets = mixed(Mixing(cutmix=1.0), cutmix=0.0)
    np.testing.assert_array_equal(images, IMAGES)
    assert abs(share_of(mixed(Mixing(mixup=0.3), mixup=500.0)[1]) - 0.5) < 0.1
    assert Mixing(mixup=0.3).hparams.keys() == {"mixup"} and not Mixing().hparams


@pytest.mark.parametrize("devices", [2, 6])
@pytest.mark.parametrize("mixing", [Mixing(mixup=0.3), Mixing(0.2, 1.0)])
def test_a_cut_batch_mixes_the_same_pairs(devices: int, mixing: Mixing):
    key = jax.random.key(3)

    def share(images: Any, targets: Any) -> Any:
        return mixing(key, images, targets, mixing.hparams, "data")

    cut = [x.reshape(devices, B // devices, *x.shape[1:]) for x in (IMAGES, TARGETS)]
    images, targets = jax.jit(jax.vmap(share, axis_name="data"))(*cut)
    whole = mixed(mixing, 3)
    np.testing.assert_allclose(images.reshape(IMAGES.shape), whole[0], atol=1e-6)
    np.testing.assert_allclose(targets.reshape(TARGETS.shape), whole[1], atol=1e-6)


def test_previous_rows_go_round():
    np.testing.assert_array_equal(previous(jnp.arange(5.0)), [4, 0, 1, 2, 3])
    cut = jax.vmap(lambda x: previous(x, "data"), axis_name="data")(jnp.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(cut.reshape(-1), [5, 0, 1, 2, 3, 4])


def test_dtype_stays_and_settings_are_checked():
    mixing, half = Mixing(mixup=0.3), IMAGES.astype(jnp.bfloat16)
    outputs = jax.eval_shape(lambda key: mixing(key, half, TARGETS, mixing.hparams), jax.random.key(0))
    assert (outputs[0].dtype, outputs[1].dtype) == (jnp.bfloat16, jnp.float32)
    assert not Mixing() and Mixing(cutmix=0.1)
    for wrong in (-0.1, float("nan")):
        with pytest.raises(MmjaxError, match="alphas are 0"):
            Mixing(mixup=wrong)
