"""The resampler: what it depends on, and embeddings of more frames than there are rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.nn.resampler import Resampler, frame_rows

MODULE = Resampler(2, 2, 3, 5, frames=3, media=4)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODULE.init, jax.random.key(0), jnp.zeros((1, 1, 1, 7, 11)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), shapes)


def apply(params, x, mask=None):
    return MODULE.apply({"params": params}, x, mask)


def test_each_medium_by_itself_and_padding_is_not_attended_to(params):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 2, 7, 11)), jnp.float32)
    latents = apply(params, x)
    assert latents.shape == (2, 3, 5, 11)
    np.testing.assert_allclose(apply(params, x[:, :2]), latents[:, :2], atol=1e-5)
    mask = jnp.ones(x.shape[:4]).at[1, 2, 1].set(0)
    masked, other = (apply(params, y, mask) for y in (x, x.at[1, 2, 1].set(9.0)))
    np.testing.assert_array_equal(masked, other)
    assert jnp.abs(masked - latents)[1, 2].max() > 1e-3
    np.testing.assert_allclose(masked[1, 2], apply(params, x[:, :, :1])[1, 2], atol=1e-5)
    assert jnp.abs(apply(params, x[:, ::-1])[:, 0] - latents[:, 2]).max() > 1e-3  # their embeddings differ
    with pytest.raises(MmjaxError, match="5 images or videos in a prompt; the resampler has embeddings for 4"):
        apply(params, jnp.zeros((1, 5, 1, 7, 11)))


def test_embeddings_of_more_frames_are_interpolated():
    table = jnp.asarray([[0.0, 1.0], [2.0, 3.0], [8.0, 5.0]])
    np.testing.assert_array_equal(frame_rows(table, 2), table[:2])
    np.testing.assert_allclose(frame_rows(table, 5), [[0, 1], [1, 2], [2, 3], [5, 4], [8, 5]])
    np.testing.assert_allclose(frame_rows(table[:1], 3), [[0, 1]] * 3)
