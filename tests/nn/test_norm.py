"""Unit vectors as torch.nn.functional.normalize makes them, at the lower bound of the norm too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn.norm import l2_normalize


@pytest.mark.torch
@pytest.mark.parametrize("norm", [0.0, 1e-14, 1e-13, 9e-13, 2e-12, 1e-6, 1.0, 1e6])
def test_unit_vectors_are_torchs(norm: float):
    """In value and in gradient; below 1e-12 vectors are only scaled by 1e12, and shorter than one."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, slope = rng.normal(size=(2, 3, 7)).astype(np.float32)
    x *= np.float32(norm) / np.linalg.norm(x, axis=-1, keepdims=True)
    value, pull = jax.vjp(l2_normalize, jnp.asarray(x))
    reference = torch.from_numpy(x).requires_grad_()
    expected = torch.nn.functional.normalize(reference, dim=-1)
    expected.backward(torch.from_numpy(slope))
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-5, atol=1e-7)
    gradient = pull(jnp.asarray(slope))[0]
    assert reference.grad is not None
    scale = float(reference.grad.abs().max())
    np.testing.assert_allclose(gradient, reference.grad.numpy(), atol=2e-5 * scale, rtol=0)
