"""Losses of tokens: by hand, against torch, in blocks of the vocabulary, and over devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from mmjax.errors import MmjaxError
from mmjax.objectives.language import (
    IGNORED,
    linear_cross_entropy,
    next_tokens,
    perplexity,
    token_cross_entropy,
)

B, L, D, V = 6, 7, 11, 53
KEYS = jax.random.split(jax.random.key(0), 6)
HIDDEN = jax.random.normal(KEYS[0], (B, L, D))
KERNEL = jax.random.normal(KEYS[1], (D, V))
BIAS = jax.random.normal(KEYS[2], (V,))
LABELS = jnp.where(jax.random.bernoulli(KEYS[3], 0.3, (B, L)), IGNORED, jax.random.randint(KEYS[4], (B, L), 0, V))
WEIGHTS = jax.random.uniform(KEYS[5], (B, L))
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.02},
    "weighted": {"weights": WEIGHTS, "epsilon": 1e-5},
    "all": {"label_smoothing": 0.2, "z_loss": 0.03, "weights": WEIGHTS},
}


token_loss = jax.jit(token_cross_entropy, static_argnames="epsilon")


def test_by_hand():
    logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0], [9.0, 1.0]]))
    outputs = token_loss(logits, jnp.array([1, 0, IGNORED]))
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert abs(float(outputs.loss.value) - expected) < 1e-6
    assert outputs.nll == outputs.loss and outputs.loss.count == 2
    assert abs(float(perplexity(outputs.nll.value)) - math.sqrt(8 / 3)) < 1e-6
    # Smoothed: half the mass on both classes alike; z-loss: log^2 of 4 and of 2.
    outputs = token_loss(logits[:2], jnp.array([1, 0]), label_smoothing=0.5, z_loss=0.1)
    first = 0.5 * math.log(4 / 3) + 0.25 * (math.log(4) + math.log(4 / 3)) + 0.1 * math.log(4) ** 2
    assert abs(float(outputs.loss.value) - (first + math.log(2) + 0.1 * math.log(2) ** 2) / 2) < 1e-6
    assert abs(float(outputs.nll.value) - expected) < 1e-6
    # Google BERT's denominator: three slots, of which one is padding with weight 0.
    outputs = token_loss(logits, jnp.array([1, 0, 0]), weights=jnp.array([1.0, 1.0, 0.0]), epsilon=1e-5)
    assert abs(float(outputs.loss.value) - 2 * expected / (2 + 1e-5)) < 1e-7


def test_labels_of_a_causal_model():
    ids = jnp.array([[5, 6, 7], [8, 9, 0]])
    np.testing.assert_array_equal(next_tokens(ids), [[6, 7, IGNORED], [9, 0, IGNORED]])
    mask = jnp.array([[1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(next_tokens(ids, mask), [[6, 7, IGNORED], [9, IGNORED, IGNORED]])


@pytest.mark.parametrize("labels", [jnp.full((B, L), IGNORED), LABELS.at[2, 3].set(V), LABELS.at[2, 3].set(-1)])
def test_no_counted_token_or_a_wrong_label_gives_nan(labels):
    assert math.isnan(token_loss(HIDDEN @ KERNEL, labels).loss.value)
    assert math.isnan(jax.jit(linear_cross_entropy)(HIDDEN, KERNEL, labels).loss.value)


def test_ignored_tokens_are_not_counted():
    """Not even if it is infinite, in value or in gradient."""
    ignored = (LABELS == IGNORED)[..., None]
    for loss, arguments in (
        (token_cross_entropy, (HIDDEN @ KERNEL,)),
        (functools.partial(linear_cross_entropy, block=20), (HIDDEN, KERNEL)),
    ):
        slopes = jax.jit(jax.value_and_grad(lambda *a, loss=loss: loss(*a, LABELS).loss.value, range(len(arguments))))
        value, grads = slopes(*arguments)
        hole, others = slopes(jnp.where(ignored, jnp.inf, arguments[0]), *arguments[1:])
        assert value == hole
        for one, other in zip(grads, others):
            np.testing.assert_array_equal(one, other)
        assert not np.any(jnp.where(ignored, grads[0], 0))


@pytest.mark.parametrize("block", [1, 10])
def test_masked_vocabulary_entries_change_nothing(block):
    """By a bias of -inf, over whole blocks, the first of them too."""
    labels, bias = jnp.where(LABELS >= 0, LABELS // 2 + 25, LABELS), BIAS.at[:25].set(-jnp.inf)

    def loss(hidden, kernel, bias):
        return linear_cross_entropy(hidden, kernel, labels, bias=bias, block=block).loss.value

    value, grads = jax.jit(jax.value_and_grad(loss, range(3)))(HIDDEN, KERNEL, bias)
    without = jax.jit(
        lambda *a: token_cross_entropy(a[0] @ a[1] + a[2], jnp.where(labels >= 0, labels - 25, labels)).loss.value
    )
    expected = without(HIDDEN, KERNEL[:, 25:], BIAS[25:])
    assert abs(value - expected) < 1e-5 * expected and all(np.all(np.isfinite(grad)) for grad in grads)
    assert not np.any(grads[1][:, :25]) and not np.any(grads[2][:25]) and np.all(grads[1][:, 25:])


CASES = [*((name, 10, False) for name in OPTIONS), *(("all", block, False) for block in (1, 53, None))]


@pytest.mark.parametrize("name, block, tied", [*CASES, ("all", 10, True), ("plain", 53, True)])
def test_blocks_keep_value_and_gradients(name, block, tied):
    def plain(hidden, kernel, bias, scale):
        logits = scale * hidden @ (kernel.T if tied else kernel) + bias
        return token_cross_entropy(logits, LABELS, **OPTIONS[name])

    def fused(hidden, kernel, bias, scale):
        options = {"tied": tied, "bias": bias, "logit_scale": scale, "block": block, **OPTIONS[name]}
        return linear_cross_entropy(hidden, kernel, LABELS, **options)

    arguments = (HIDDEN, KERNEL.T if tied else KERNEL, BIAS, jnp.float32(0.7))
    (value, rest), grads = jax.jit(jax.value_and_grad(lambda *a: _split(fused(*a)), range(4), has_aux=True))(*arguments)
    slopes = jax.jit(jax.value_and_grad(lambda *a: _split(plain(*a)), range(4), has_aux=True))
    (expected, others), expected_grads = slopes(*arguments)
    np.testing.assert_allclose([value, *rest], [expected, *others], rtol=1e-5)
    for one, other in zip(grads, expected_grads):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


def _split(outputs):
    return outputs.loss.value, (outputs.nll.value, outputs.loss.count)


def test_gradients_match_finite_differences():
    @jax.jit
    def loss(hidden, kernel):
        options = {"label_smoothing": jnp.float32(0.1), "z_loss": jnp.float32(0.02), "block": 17}
        return linear_cross_entropy(hidden, kernel, LABELS, **options).loss.value

    check_grads(loss, (HIDDEN, KERNEL), 1, ["rev"], 0.02, 0.02)


def test_logits_are_never_materialised():
    """4 MiB of them here. No gradient is computed for a frozen kernel."""
    t, v = 256, 4099
    hidden, kernel, labels = jnp.zeros((t, D)), jnp.zeros((D, v)), jnp.zeros(t, jnp.int32)

    def compiled(loss, arguments):
        return jax.jit(jax.grad(loss, arguments)).lower(hidden, kernel).compile()

    def plain(hidden, kernel):
        return token_cross_entropy(hidden @ kernel, labels).loss.value

    def fused(hidden, kernel):
        return linear_cross_entropy(hidden, kernel, labels, block=64).loss.value

    small, large, frozen = compiled(fused, (0, 1)), compiled(plain, (0, 1)), compiled(fused, 0)
    assert small.memory_analysis().temp_size_in_bytes < 4 * t * v / 8 < large.memory_analysis().temp_size_in_bytes
    assert f"f32[{t},{v}]" in large.as_text() and f"f32[{t},{v}]" not in small.as_text()
    assert "dynamic-update-slice(" in small.as_text() and "dynamic-update-slice(" not in frozen.as_text()


def test_bfloat16_is_summed_in_float32():
    t, d, v = 32, 512, 67
    hidden, kernel = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(KEYS, ((t, d), (d, v))))
    kernel = (kernel / 16).astype(jnp.bfloat16)
    labels = jnp.arange(t)

    def fused(hidden, kernel):
        return linear_cross_entropy(hidden, kernel, labels, block=25).loss.value

    def exact(hidden, kernel):
        return token_cross_entropy(hidden @ kernel, labels).loss.value

    value, grads = jax.jit(jax.value_and_grad(fused, (0, 1)))(hidden, kernel)
    wide = hidden.astype(jnp.float32), kernel.astype(jnp.float32)
    expected, expected_grads = jax.jit(jax.value_and_grad(exact, (0, 1)))(*wide)
    assert value.dtype == jnp.float32 and abs(value - expected) < 1e-5 * expected
    for one, other in zip(grads, expected_grads):
        assert one.dtype == jnp.bfloat16  # whose steps are 2**-8
        assert np.abs(one.astype(jnp.float32) - other).max() < 2**-7 * np.abs(other).max()
    # A float32 kernel behind bfloat16 activations keeps its gradient in float32.
    assert jax.eval_shape(jax.grad(fused, 1), hidden, wide[1]).dtype == jnp.float32


@pytest.mark.parametrize("devices", [2, 3])
def test_mean_over_devices_is_the_global_loss(devices):
    """With an uneven number of counted tokens on each. A mapped axis is one whether devices or `vmap` run it."""
    loss = functools.partial(linear_cross_entropy, label_smoothing=0.1, z_loss=0.01, block=20)
    labels = LABELS.at[0].set(IGNORED)
    assert len({int(n) for n in (labels.reshape(devices, -1) != IGNORED).sum(1)}) > 1

    def share(kernel, hidden, labels):
        result = loss(hidden, kernel, labels)
        return result.loss.total / jax.lax.psum(result.loss.count, "data"), result

    cut = [x.reshape(devices, -1, *x.shape[1:]) for x in (HIDDEN, labels)]
    mapped = jax.vmap(jax.grad(share, has_aux=True), (None, 0, 0), axis_name="data")
    grads, parts = jax.jit(mapped)(KERNEL, *cut)
    whole, result = jax.jit(loss)(HIDDEN, KERNEL, labels), jax.tree.map(jnp.sum, parts)
    np.testing.assert_allclose([x.value for x in result], [x.value for x in whole], rtol=1e-6)
    expected = jax.jit(jax.grad(lambda kernel: loss(HIDDEN, kernel, labels).loss.value))(KERNEL)
    np.testing.assert_allclose(grads.sum(0), expected, rtol=1e-4, atol=1e-6 * float(jnp.abs(expected).max()))


@pytest.mark.usefixtures("unchecked_arrays")
def test_wrong_shapes_are_refused():
    for wrong in (
        lambda: linear_cross_entropy(HIDDEN, KERNEL.T, LABELS),
        lambda: linear_cross_entropy(HIDDEN, KERNEL, LABELS, tied=True),
        lambda: linear_cross_entropy(HIDDEN, KERNEL, LABELS[:, 1:]),
        lambda: linear_cross_entropy(HIDDEN, KERNEL, LABELS, bias=BIAS[1:]),
        lambda: linear_cross_entropy(HIDDEN, KERNEL, LABELS, block=0),
    ):
        with pytest.raises(MmjaxError, match="linear_cross_entropy"):
            wrong()


@pytest.mark.torch
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_matches_torch(smoothing):
    import torch

    logits = np.asarray(HIDDEN @ KERNEL)
    tensor = torch.tensor(logits, requires_grad=True)
    labels = torch.tensor(np.asarray(LABELS), dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(tensor.reshape(-1, V), labels.reshape(-1), label_smoothing=smoothing)
    expected.backward()
    slopes = jax.jit(jax.value_and_grad(lambda x: token_cross_entropy(x, LABELS, label_smoothing=smoothing).loss.value))
    value, grad = slopes(logits)
    assert abs(float(value) - expected.item()) < 1e-5 * expected.item()
    assert tensor.grad is not None and np.abs(grad - tensor.grad.numpy()).max() < 1e-5 * np.abs(grad).max()
