"""Cross-entropies by hand, against torch, and in their gradients; hits with ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from mmjax.objectives.classification import hits, sigmoid_cross_entropy, smooth, soft_labels, softmax_cross_entropy

B, C = 5, 7
LOGITS = np.random.default_rng(0).normal(0, 2, (B, C)).astype(np.float32)
LABELS = np.array([3, 0, 6, 3, 1])
SOFT = np.random.default_rng(1).dirichlet(np.ones(C), B).astype(np.float32)


def test_cross_entropy_by_hand():
    logits, labels = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])), jnp.array([0, 1])
    np.testing.assert_allclose(softmax_cross_entropy(logits, labels), [np.log(2), np.log(10)], rtol=1e-6)
    # Smoothing 0.3 over 3 classes: 0.8 on the label, 0.1 on each other one.
    by_hand = 0.8 * np.log(2) + 0.2 * np.log(4), 0.8 * np.log(10) + 0.1 * np.log(10) + 0.1 * np.log(1.25)
    np.testing.assert_allclose(softmax_cross_entropy(logits, labels, 0.3), by_hand, rtol=1e-6)


def test_smoothing_by_hand():
    np.testing.assert_allclose(smooth(jnp.array([[1.0, 0, 0, 0, 0]]), 0.1), [[0.92, 0.02, 0.02, 0.02, 0.02]], rtol=1e-6)
    np.testing.assert_allclose(smooth(jnp.asarray(SOFT), 0.4).sum(-1), np.ones(B), rtol=1e-6)


@pytest.mark.parametrize("loss", [softmax_cross_entropy, sigmoid_cross_entropy])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_indices_match_one_hot_rows(loss, smoothing):
    by_number = loss(LOGITS, jnp.asarray(LABELS), smoothing)
    np.testing.assert_allclose(by_number, loss(LOGITS, soft_labels(jnp.asarray(LABELS), C), smoothing), rtol=1e-5)


def test_sigmoid_cross_entropy_by_hand():
    # p = (0.5, 0.9), t = (1, 0.25): -log 0.5 - 0.25 log 0.9 - 0.75 log 0.1
    losses = sigmoid_cross_entropy(jnp.array([[0.0, np.log(9.0)]]), jnp.array([[1.0, 0.25]]))
    np.testing.assert_allclose(losses, [-np.log(0.5) - 0.25 * np.log(0.9) - 0.75 * np.log(0.1)], rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_matches_torch(smoothing):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    for targets in (LABELS, SOFT):
        tensor = torch.from_numpy(LOGITS).requires_grad_()
        expected = functional.cross_entropy(
            tensor, torch.from_numpy(targets), label_smoothing=smoothing, reduction="none"
        )
        expected.mean().backward()
        np.testing.assert_allclose(
            softmax_cross_entropy(LOGITS, jnp.asarray(targets), smoothing), expected.detach(), 1e-5
        )
        gradient = jax.grad(lambda x, t=targets: softmax_cross_entropy(x, jnp.asarray(t), smoothing).mean())(LOGITS)
        np.testing.assert_allclose(gradient, tensor.grad, atol=1e-6)
    expected = functional.binary_cross_entropy_with_logits(
        torch.from_numpy(LOGITS), torch.from_numpy(SOFT), reduction="none"
    ).sum(-1)
    np.testing.assert_allclose(sigmoid_cross_entropy(LOGITS, jnp.asarray(SOFT)), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", [softmax_cross_entropy, sigmoid_cross_entropy])
def test_gradients_are_right_and_stay_finite(loss):
    check_grads(
        lambda x: loss(x, jnp.asarray(SOFT), 0.1).mean(), (LOGITS,), order=1, modes=("rev",), atol=1e-2, rtol=1e-2
    )
    far = jnp.asarray([[300.0, -300.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: loss(x, jnp.array([1])).sum())(far)
    assert np.isfinite(value) and value >= 600 and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("loss", [softmax_cross_entropy, sigmoid_cross_entropy])
def test_bfloat16_logits_give_a_float32_loss(loss):
    half = jnp.asarray(LOGITS, jnp.bfloat16)
    losses = loss(half, jnp.asarray(LABELS))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, loss(half.astype(jnp.float32), jnp.asarray(LABELS)), rtol=1e-6)


def test_hits():
    logits = jnp.array([[0.1, 0.9, 0.5, 0.3], [0.1, 0.9, 0.5, 0.3], [0.2, 0.2, 0.2, 0.2], [0.4, 0.4, 0.1, 0.1]])
    labels = jnp.array([1, 3, 0, 1])
    np.testing.assert_array_equal(hits(logits, labels), [1, 0, 0, 0])
    np.testing.assert_array_equal(hits(logits, labels, 2), [1, 0, 0, 1])
    np.testing.assert_array_equal(hits(logits, labels, 3), [1, 1, 0, 1])
    np.testing.assert_array_equal(hits(logits, labels, 5), [1, 1, 1, 1])
    np.testing.assert_array_equal(hits(logits, soft_labels(labels, 4), 2), [1, 0, 0, 1])
    assert float(hits(jnp.zeros((1, 3)), jnp.array([0]))[0]) == 0.0  # a constant network is not right about class 0
    assert float(hits(jnp.full((1, 3), jnp.nan), jnp.array([0]))[0]) == 0.0
