"""Attention against values by hand, a loop over queries, gradients, and a kernel's choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from mmjax.nn.attention import attention_weights, dot_product_attention
from mmjax.nn.masks import causal_mask, padding_mask

B, L, S, H, K = 2, 3, 5, 7, 11


@pytest.fixture
def qkv():
    keys = jax.random.split(jax.random.key(13), 3)
    return [jax.random.normal(key, (B, n, H, K)) for key, n in zip(keys, (L, S, S))]


def by_loop(q, k, v, allowed):
    """Attention of each query alone, in float64; `allowed` [b, h, l, s]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, l, h in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(allowed[b, h, l])
        scores = np.exp(k[b, seen, h] @ q[b, l, h] / np.sqrt(q.shape[-1]))
        out[b, l, h] = (scores / scores.sum()) @ v[b, seen, h]
    return out


def test_two_tokens_by_hand():
    q = jnp.array([[[[2.0]], [[0.0]]]])  # one head one wide, two queries
    k, v = jnp.array([[[[1.0]], [[0.0]]]]), jnp.array([[[[3.0]], [[5.0]]]])
    first = (np.exp(2) * 3 + 5) / (np.exp(2) + 1)
    np.testing.assert_allclose(dot_product_attention(q, k, v)[0, :, 0, 0], [first, 4.0], rtol=1e-6)
    np.testing.assert_allclose(dot_product_attention(q, k, v, causal=True)[0, :, 0, 0], [3.0, 4.0], rtol=1e-6)


def test_masked_attention_is_attention_over_the_rest(qkv):
    q, k, v = qkv
    mask = np.random.default_rng(17).random((B, H, L, S)) < 0.6
    mask[..., 0] = True
    everything = np.ones((B, H, L, S), bool)
    np.testing.assert_allclose(dot_product_attention(q, k, v), by_loop(q, k, v, everything), atol=2e-6)
    np.testing.assert_allclose(dot_product_attention(q, k, v, jnp.asarray(mask)), by_loop(q, k, v, mask), atol=2e-6)
    lengths = np.array([2, 5])
    valid = np.arange(S) < lengths[:, None]
    both = np.asarray(padding_mask(valid)) & np.asarray(causal_mask(L, S))
    ours = dot_product_attention(q, k, v, padding_mask(valid), causal=True)
    np.testing.assert_allclose(ours, by_loop(q, k, v, np.broadcast_to(both, everything.shape)), atol=2e-6)


def test_jax_agrees_and_so_does_jit(qkv):
    q, k, v = qkv
    mask = padding_mask(np.arange(S) < np.array([[3], [4]]))
    reference = jax.nn.dot_product_attention(q, k, v, mask=mask)
    np.testing.assert_allclose(dot_product_attention(q, k, v, mask), reference, atol=2e-6)
    np.testing.assert_allclose(jax.jit(dot_product_attention)(q, k, v, mask), reference, atol=2e-6)


def test_nobody_to_attend_to_is_everybody(qkv):
    q, k, v = qkv
    weights = attention_weights(q, k, jnp.zeros((1, 1, 1, S), bool))
    np.testing.assert_allclose(weights, np.full((B, H, L, S), 1 / S), rtol=1e-6)
    gradient = jax.grad(lambda q: dot_product_attention(q, k, v, jnp.zeros((1, 1, 1, S), bool)).sum())(q)
    assert np.isfinite(gradient).all()


def test_gradients(qkv):
    q, k, v = qkv
    mask = padding_mask(np.arange(S) < np.array([[3], [4]]))
    check_grads(lambda *x: dot_product_attention(*x, mask), (q, k, v), order=1, modes=["rev"], rtol=1e-2, eps=3e-3)


def test_softmax_stays_in_float32_for_half_precision(qkv):
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv)
    assert attention_weights(q, k).dtype == jnp.float32
    exact = dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    ours = dot_product_attention(q, k, v)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, atol=0.02)


def test_dropout_keeps_the_mean_and_needs_a_key(qkv):
    q, k, v = qkv
    plain = dot_product_attention(q, k, v)
    np.testing.assert_array_equal(dot_product_attention(q, k, v, dropout_rate=0.5), plain)
    rngs = jax.random.split(jax.random.key(19), 4000)
    drop = jax.jit(jax.vmap(lambda rng: dot_product_attention(q, k, v, dropout_rate=0.3, dropout_rng=rng)))
    draws = drop(rngs)
    assert np.abs(draws[0] - plain).max() > 0.1
    np.testing.assert_allclose(draws.mean(0), plain, atol=5 * float(draws.std(0).max()) / 4000**0.5)
