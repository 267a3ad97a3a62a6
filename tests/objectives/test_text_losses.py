"""Losses of a teacher's tokens and sums over texts: by hand, the plain formula, the vaults, torch, and over devices."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives.test_language_losses import HIDDEN, KERNEL, LABELS, WEIGHTS, B, L, V
from safetensors.numpy import load_file

from mmjax.objectives.language import (
    IGNORED,
    answer_loss,
    distilled_text_cross_entropy,
    distilled_token_cross_entropy,
    next_tokens,
    text_cross_entropy,
    token_cross_entropy,
)

LOGITS, TEACHER = HIDDEN @ KERNEL, 2 * jax.random.normal(jax.random.key(9), (B, L, V))


def plain_losses(logits, teacher, labels, alpha, smoothing):
    """Of each token, 0 where it is ignored."""
    log_p = jax.nn.log_softmax(logits)
    target = (1 - alpha) * jax.nn.one_hot(labels, V) + alpha * jax.nn.softmax(teacher)
    target = (1 - smoothing) * target + smoothing / V
    return jnp.where(labels == IGNORED, 0, -jnp.sum(target * log_p, -1))


def test_distilled_and_summed_by_hand():
    logits, teacher = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0], [9.0, 1.0]]])), jnp.log(jnp.array([[[1.0, 1.0]] * 3]))
    labels = jnp.array([[1, 0, IGNORED]])
    hard = math.log(4 / 3) + math.log(2)
    soft = (math.log(4 / 3) + math.log(4)) / 2 + math.log(2)
    np.testing.assert_allclose(text_cross_entropy(logits, labels), [hard], rtol=1e-6)
    smoothed = 0.9 * hard + 0.1 * soft  # over two entries alike, as this teacher
    np.testing.assert_allclose(text_cross_entropy(logits, labels, label_smoothing=0.1), [smoothed], rtol=1e-6)
    np.testing.assert_allclose(distilled_text_cross_entropy(logits, teacher, labels, 0.1), [smoothed], rtol=1e-6)
    outputs = distilled_token_cross_entropy(logits, teacher, labels, 0.25)
    expected = [(0.75 * hard + 0.25 * soft) / 2, hard / 2, 2]
    np.testing.assert_allclose([outputs.loss.value, outputs.nll.value, outputs.loss.count], expected, rtol=1e-6)
    # Three answers to two questions, and padding.
    losses = jnp.array([1.0, 3.0, 5.0, jnp.nan])
    assert abs(float(answer_loss(losses, jnp.array([0.5, 0.25, 1.0, 0.0]), 2)) - 6.25 / 2) < 1e-6
    assert math.isnan(answer_loss(losses, jnp.array([0.5, 0.25, 1.0, 0.1]), 2))


def test_distilled_and_summed_match_the_plain_formula():
    weight = jnp.arange(1.0, B + 1)
    labels = LABELS.at[2].set(IGNORED)

    def slopes(loss):
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(LOGITS, TEACHER)

    def plain(logits, teacher, alpha, smoothing):
        return plain_losses(logits, jax.lax.stop_gradient(teacher), labels, alpha, smoothing)

    for function, expected in (
        (
            lambda s, t: weight @ text_cross_entropy(s, labels, label_smoothing=0.1),
            lambda s, t: weight @ plain(s, t, 0.0, 0.1).sum(1),
        ),
        (
            lambda s, t: weight @ distilled_text_cross_entropy(s, t, labels, 0.4),
            lambda s, t: weight @ plain(s, t, 0.4, 0.0).sum(1),
        ),
        (
            lambda s, t: distilled_token_cross_entropy(s, t, labels, 0.4).loss.value,
            lambda s, t: plain(s, t, 0.4, 0.0).sum() / (labels != IGNORED).sum(),
        ),
    ):
        (value, grads), (expected_value, others) = slopes(function), slopes(expected)
        assert abs(float(value - expected_value)) < 2e-6 * float(expected_value)
        assert np.abs(grads[0] - others[0]).max() < 1e-5 * np.abs(others[0]).max()
        assert not np.any(grads[1]) and not np.any(grads[0][2])
    assert text_cross_entropy(LOGITS, labels)[2] == distilled_text_cross_entropy(LOGITS, TEACHER, labels, 0.4)[2] == 0


def test_ignored_tokens_do_not_count_and_wrong_labels_give_nan():
    hole = (LABELS == IGNORED)[..., None]
    wrong = LABELS.at[3, 1].set(V)
    broken = [jnp.where(hole, jnp.inf, x) for x in (LOGITS, TEACHER)]
    for loss in (
        lambda s, t, labels: distilled_token_cross_entropy(s, t, labels, 0.4).loss.value,
        lambda s, t, labels: distilled_text_cross_entropy(s, t, labels, 0.4).sum(),
        lambda s, t, labels: text_cross_entropy(s, labels).sum(),
    ):
        slopes = jax.jit(jax.value_and_grad(loss))
        for one, other in zip(slopes(LOGITS, TEACHER, LABELS), slopes(*broken, LABELS)):
            np.testing.assert_array_equal(one, other)
        assert math.isnan(loss(LOGITS, TEACHER, wrong))
    np.testing.assert_array_equal(np.isnan(text_cross_entropy(LOGITS, wrong)), np.arange(B) == 3)
    nothing = jnp.full((B, L), IGNORED)
    assert math.isnan(distilled_token_cross_entropy(LOGITS, TEACHER, nothing, 0.4).loss.value)


@pytest.fixture
def recorded(golden_dir):
    def read(name):
        alpha = json.loads((golden_dir / f"{name}.json").read_text())["config"]["alpha"]
        return {k: jnp.asarray(v) for k, v in load_file(golden_dir / f"{name}.safetensors").items()}, alpha

    return read


def near(value, expected):
    return np.abs(np.asarray(value) - np.asarray(expected)).max() < 1e-6 * np.abs(expected).max()


def test_recorded_masked_and_causal_language_models(recorded):
    recorded_step, alpha = recorded("albef_pretrain")
    student, teacher = recorded_step["outputs/mlm_logits"], recorded_step["outputs/mlm_logits_m"]
    loss = distilled_token_cross_entropy(student, teacher, recorded_step["inputs/mlm_labels"], alpha).loss.value
    assert near(loss, recorded_step["outputs/loss_mlm"])
    recorded_step, _ = recorded("blip_pretrain")
    labels = next_tokens(recorded_step["inputs/input_ids"], recorded_step["inputs/attention_mask"])
    assert near(
        token_cross_entropy(recorded_step["outputs/lm_logits"], labels, label_smoothing=0.1).loss.value,
        recorded_step["outputs/loss_lm"],
    )


def test_recorded_answers(recorded):
    recorded_step, alpha = recorded("albef_vqa")
    labels = next_tokens(recorded_step["inputs/answer_ids"], recorded_step["inputs/answer_mask"])
    # The momentum model's last position is cut off in the record; nothing is counted there.
    teacher = jnp.pad(recorded_step["outputs/answer_logits_m"], ((0, 0), (0, 1), (0, 0)))
    weights, questions = recorded_step["inputs/weights"], len(recorded_step["inputs/k"])

    def loss(bias):
        losses = distilled_text_cross_entropy(recorded_step["outputs/answer_logits"] + bias, teacher, labels, alpha)
        return answer_loss(losses, weights, questions), losses

    (value, losses), slope = jax.value_and_grad(loss, has_aux=True)(jnp.zeros(teacher.shape[-1]))
    assert near(losses, recorded_step["outputs/answer_loss"]) and near(value, recorded_step["outputs/loss"])
    assert near(slope, recorded_step["outputs/grad/text_decoder.cls.predictions.bias"])

    recorded_step, _ = recorded("blip_vqa")
    labels = next_tokens(recorded_step["inputs/answer_ids"], recorded_step["inputs/answer_mask"])
    losses = text_cross_entropy(recorded_step["outputs/answer_logits"], labels, label_smoothing=0.1)
    value = answer_loss(losses, recorded_step["inputs/weights"], len(recorded_step["inputs/n"]))
    assert near(losses, recorded_step["outputs/answer_loss"]) and near(value, recorded_step["outputs/loss"])


@pytest.mark.parametrize("devices", [2, 3])
def test_mean_over_devices_is_the_global_loss(devices):
    labels = LABELS.at[0].set(IGNORED)

    def share(bias, logits, teacher, labels, axis_name=None):
        outputs = distilled_token_cross_entropy(logits + bias, teacher, labels, 0.4)
        count = outputs.loss.count
        return outputs.loss.total / (count if axis_name is None else jax.lax.psum(count, axis_name)), outputs

    whole = LOGITS, TEACHER, labels
    cut = [x.reshape(devices, -1, *x.shape[1:]) for x in whole]
    slopes = jax.grad(share, has_aux=True)
    mapped = jax.vmap(lambda *a: slopes(*a, "data"), (None, 0, 0, 0), axis_name="data")
    grads, outputs = jax.jit(mapped)(jnp.zeros(V), *cut)
    expected, one = jax.jit(slopes)(jnp.zeros(V), *whole)
    total = jax.tree.map(jnp.sum, outputs)
    np.testing.assert_allclose([x.value for x in total], [x.value for x in one], rtol=1e-6)
    np.testing.assert_allclose(grads.sum(0), expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))


@pytest.mark.torch
def test_matches_torch():
    import torch

    student = torch.tensor(np.asarray(LOGITS), requires_grad=True)
    labels = torch.tensor(np.asarray(LABELS), dtype=torch.long)
    soft = torch.softmax(torch.tensor(np.asarray(TEACHER)), -1)
    functional = torch.nn.functional
    hard = functional.cross_entropy(student.reshape(-1, V), labels.reshape(-1), reduction="none").reshape(B, L)
    soft_loss = -(soft * functional.log_softmax(student, -1)).sum(-1) * (labels != IGNORED)
    expected = ((0.6 * hard + 0.4 * soft_loss).sum(1) * torch.tensor(np.asarray(WEIGHTS[:, 0]))).sum() / 4
    expected.backward()

    def loss(logits):
        return answer_loss(distilled_text_cross_entropy(logits, TEACHER, LABELS, 0.4), WEIGHTS[:, 0], 4)

    value, grad = jax.jit(jax.value_and_grad(loss))(LOGITS)
    assert abs(float(value) - expected.item()) < 2e-6 * expected.item()
    assert student.grad is not None and np.abs(grad - student.grad.numpy()).max() < 1e-5 * np.abs(grad).max()
