"""BERT's AdamW and schedule, against the original's formulas written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.training.optimizer import Optimizer, bert_adamw, warmup_linear


def test_the_schedule_starts_at_zero_and_jumps_down_at_the_end_of_warmup():
    rate = warmup_linear(2e-3, steps=50, warmup=10)
    rates = [float(rate(step)) for step in (0, 1, 9, 10, 49, 50, 60)]
    np.testing.assert_allclose(rates, [0, 2e-4, 1.8e-3, 1.6e-3, 4e-5, 0, 0], rtol=1e-5, atol=1e-12)
    with pytest.raises(MmjaxError, match="--steps 10 leaves nothing after a --warmup of 10 steps"):
        warmup_linear(1.0, 10, 10)


def test_steps_are_those_of_adam_weight_decay_optimizer():
    """optimization.py:87-174, in NumPy and float64."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 5)), "bias": rng.normal(size=5)}
    optimizer = Optimizer(bert_adamw(warmup_linear(0.1, 7, 2), 0.01), clip_norm=1.0)
    updated = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    state = optimizer.init(updated)
    m = {name: np.zeros_like(value) for name, value in params.items()}
    v = {name: np.zeros_like(value) for name, value in params.items()}
    for step in range(5):
        grads = {name: rng.normal(size=value.shape) for name, value in params.items()}
        inputs = {name: jnp.asarray(value, jnp.float32) for name, value in grads.items()}
        updates, state = optimizer.update(inputs, state, updated, {}, jnp.int32(step))
        updated = {name: updated[name] + updates[name] for name in updated}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        rate = 0.1 * step / 2 if step < 2 else 0.1 * (1 - step / 7)
        for name, grad in grads.items():
            grad = grad / max(norm, 1.0)
            m[name] = 0.9 * m[name] + 0.1 * grad
            v[name] = 0.999 * v[name] + 0.001 * grad**2
            update = m[name] / (np.sqrt(v[name]) + 1e-6) + (0.01 * params[name] if name == "kernel" else 0)
            params[name] = params[name] - rate * update
            np.testing.assert_allclose(updated[name], params[name], rtol=2e-5, atol=2e-6)
        if step == 0:
            np.testing.assert_array_equal(updates["bias"], np.zeros(5))
