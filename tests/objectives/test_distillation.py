"""Distillation: by hand, against torch, and the properties of its parts."""

import doctest
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mmjax.objectives import distillation
from mmjax.objectives.classification import softmax_cross_entropy
from mmjax.objectives.distillation import (
    distillation_loss,
    distilled_cross_entropy,
    soft_cross_entropy,
    soft_divergence,
    soft_labels_of,
)

B, C = 7, 11
STUDENT, TEACHER = (3 * jax.random.normal(jax.random.key(seed), (B, C)) for seed in (0, 1))
LABELS = jnp.array([0, 10, 3, 3, 7, 1, 5])


def test_the_examples_of_the_docs_run():
    results = doctest.testmod(distillation)
    assert results.attempted == 2 and results.failed == 0


def test_by_hand():
    """A teacher whose logits of cat and dog are 1 and 0, a uniform student, a label "cat"."""
    teacher, student = jnp.array([[1.0, 0.0]]), jnp.zeros((1, 2))
    p = 1 / (1 + math.exp(-1))
    assert abs(p - 0.731) < 1e-3
    np.testing.assert_allclose(soft_labels_of(teacher), [[p, 1 - p]], rtol=1e-6)
    assert abs(float(soft_cross_entropy(student, teacher)[0]) - math.log(2)) < 1e-6
    divergence = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    assert abs(float(soft_divergence(student, teacher)[0]) - divergence) < 1e-6
    p = 1 / (1 + math.exp(-0.5))
    divergence = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    value = distillation_loss(student, teacher, jnp.array([0]), temperature=2.0, alpha=0.25)[0]
    assert abs(float(value) - (0.75 * math.log(2) + 0.25 * 4 * divergence)) < 1e-6
    # The student gives cat the probability q, the teacher p; the label is dog.
    q, p = 0.8, 1 / (1 + math.exp(-1))
    value = distilled_cross_entropy(jnp.log(jnp.array([q, 1 - q])), teacher[0], jnp.array(1), 0.4)
    assert abs(float(value) + 0.6 * math.log(1 - q) + 0.4 * (p * math.log(q) + (1 - p) * math.log(1 - q))) < 1e-6


def test_alpha_0_is_the_labels_and_1_the_teacher():
    hard = distillation_loss(STUDENT, TEACHER, LABELS, alpha=0.0)
    np.testing.assert_allclose(hard, softmax_cross_entropy(STUDENT, LABELS), rtol=1e-6)
    np.testing.assert_allclose(distillation_loss(TEACHER, TEACHER, LABELS, alpha=1.0), np.zeros(B), atol=1e-5)
    soft = softmax_cross_entropy(STUDENT, jax.nn.softmax(TEACHER))
    np.testing.assert_allclose(soft_cross_entropy(STUDENT, TEACHER), soft, rtol=1e-6)


def test_slopes():
    """T (p - q) of the soft part for the student, at every temperature of one size; none for the teacher."""
    loss = jax.jit(jax.grad(lambda s, t, temperature: distillation_loss(s, t, LABELS, temperature, 1.0).sum(), (0, 1)))
    for temperature in (1.0, 3.0):
        student, teacher = loss(STUDENT, TEACHER, temperature)
        p, q = (jax.nn.softmax(x / temperature) for x in (STUDENT, TEACHER))
        np.testing.assert_allclose(student, temperature * (p - q), rtol=1e-4, atol=1e-6)
        assert not np.any(teacher)
    # Very warm: (student - teacher) / c, both without their means (section 2.1).
    centred = STUDENT - STUDENT.mean(1, keepdims=True) - TEACHER + TEACHER.mean(1, keepdims=True)
    np.testing.assert_allclose(loss(STUDENT, TEACHER, 300.0)[0], centred / C, rtol=0.05, atol=0.02)


def test_a_wrong_label_gives_nan():
    labels = LABELS.at[2].set(C).at[4].set(-1)
    for values in (distillation_loss(STUDENT, TEACHER, labels), distilled_cross_entropy(STUDENT, TEACHER, labels, 0.4)):
        np.testing.assert_array_equal(np.isnan(values), [0, 0, 1, 0, 1, 0, 0])


def test_mixtures_differ_by_the_teachers_entropy():
    def slopes(loss):
        return jax.jit(jax.value_and_grad(lambda s, t, alpha: loss(s, t, alpha).sum(), (0, 1)))(STUDENT, TEACHER, 0.4)

    value, grads = slopes(lambda s, t, alpha: distilled_cross_entropy(s, t, LABELS, alpha))
    other, expected_grads = slopes(lambda s, t, alpha: distillation_loss(s, t, LABELS, 1.0, alpha))
    q = np.exp(np.asarray(jax.nn.log_softmax(TEACHER), np.float64))
    assert abs(float(value - other) + 0.4 * float((q * np.log(q)).sum())) < 1e-5 * float(value)
    by_hand = jax.nn.softmax(STUDENT) - 0.6 * jax.nn.one_hot(LABELS, C) - 0.4 * jax.nn.softmax(TEACHER)
    np.testing.assert_allclose(grads[0], expected_grads[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(grads[0], by_hand, rtol=0, atol=1e-6)
    assert not np.any(grads[1])


@pytest.mark.parametrize("name", ["albef_ve", "albef_nlvr"])
def test_recorded_losses(golden_dir, name):
    recorded = load_file(golden_dir / f"{name}.safetensors")
    alpha = json.loads((golden_dir / f"{name}.json").read_text())["config"]["alpha"]
    student, teacher = (jnp.asarray(recorded[f"outputs/{key}"]) for key in ("prediction", "prediction_m"))
    value = distilled_cross_entropy(student, teacher, jnp.asarray(recorded["inputs/targets"]), alpha).mean()
    assert abs(float(value - recorded["outputs/loss"])) < 1e-6 * float(recorded["outputs/loss"])


def test_bfloat16_logits_of_tokens():
    logits = jnp.stack([STUDENT, TEACHER]).astype(jnp.bfloat16)
    value = distillation_loss(logits, logits[::-1], jnp.stack([LABELS, LABELS]))
    assert value.shape == (2, B) and value.dtype == jnp.float32
    wide = distillation_loss(logits[0].astype(jnp.float32), logits[1].astype(jnp.float32), LABELS)
    np.testing.assert_allclose(value[0], wide, rtol=1e-6)


@pytest.mark.torch
def test_matches_torch():
    import torch

    student, teacher = torch.tensor(np.asarray(STUDENT), requires_grad=True), torch.tensor(np.asarray(TEACHER))
    functional = torch.nn.functional
    soft = functional.kl_div(
        functional.log_softmax(student / 3, 1), functional.softmax(teacher / 3, 1), reduction="batchmean"
    )
    hard = functional.cross_entropy(student, torch.tensor(np.asarray(LABELS), dtype=torch.long))
    expected = 0.3 * hard + 0.7 * 9 * soft
    expected.backward()
    mean = jax.value_and_grad(lambda s: distillation_loss(s, TEACHER, LABELS, 3.0, 0.7).mean())
    value, grad = mean(STUDENT)
    assert abs(float(value) - expected.item()) < 1e-5 * expected.item()
    assert student.grad is not None and np.abs(grad - student.grad.numpy()).max() < 1e-5 * np.abs(grad).max()
