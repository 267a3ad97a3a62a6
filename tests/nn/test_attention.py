"""Attention against values by hand, a loop over queries, gradients, and a kernel's choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from mmjax.nn.attention import attention_weights, dot_product_attention
from mmjax.nn.kv_cache import attend, from_tokens
from mmjax.nn.masks import causal_mask, padding_mask
from mmjax.nn.splash import splash_attention, splash_takes

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
        visible = np.flatnonzero(allowed[b, h, l])
        scores = np.exp(k[b, visible, h] @ q[b, l, h] / np.sqrt(q.shape[-1]))
        out[b, l, h] = (scores / scores.sum()) @ v[b, visible, h]
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
    both_masks = np.asarray(padding_mask(valid)) & np.asarray(causal_mask(L, S))
    actual = dot_product_attention(q, k, v, padding_mask(valid), causal=True)
    np.testing.assert_allclose(actual, by_loop(q, k, v, np.broadcast_to(both_masks, everything.shape)), atol=2e-6)


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


def test_nobody_to_attend_to_is_nothing_on_request(qkv):
    """Only the first query of the first item changes, in a pass and in a step."""
    q, k, v = qkv
    mask = jnp.ones((B, 1, L, S), bool).at[0, 0, 0].set(False)
    zero, even = (dot_product_attention(q, k, v, mask, zero_masked=flag) for flag in (True, False))
    assert not np.any(zero[0, 0]) and np.abs(even[0, 0]).min() > 0
    np.testing.assert_array_equal(zero[0, 1:], even[0, 1:])
    np.testing.assert_array_equal(zero[1], even[1])
    gradient = jax.grad(lambda q: dot_product_attention(q, k, v, mask, zero_masked=True).sum())(q)
    assert np.isfinite(gradient).all() and not np.any(gradient[0, 0])
    valid = jnp.arange(S) < jnp.array([[0], [3]])
    step = attend(q[:, :1], from_tokens(k, v), valid, None, 0, zero_masked=True)
    assert not np.any(step[0])
    expected = dot_product_attention(q[1:, :1], k[1:, :3], v[1:, :3])
    np.testing.assert_allclose(step[1:], expected, atol=2e-6)


def test_queries_are_not_rounded_by_their_scale():
    """In bfloat16, with a scale that it cannot represent, the weights are as accurate as those of exact inputs."""
    keys = jax.random.split(jax.random.key(5), 2)
    q, k = (8 * jax.random.normal(key, (1, 7, 1, 12)) for key in keys)
    half = [x.astype(jnp.bfloat16) for x in (q, k)]
    exact = attention_weights(*(x.astype(jnp.float32) for x in half))
    np.testing.assert_allclose(attention_weights(*half), exact, rtol=1e-4, atol=1e-6)
    step = attend(half[0], from_tokens(half[1], half[1]), None, None, 0)
    one = jnp.einsum("blhs,bshk->blhk", exact.transpose(0, 2, 1, 3), half[1].astype(jnp.float32))
    np.testing.assert_allclose(step.astype(jnp.float32), one, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_the_splash_kernel_has_the_same_numbers(causal):
    """By its interpreter: grouped heads, padding, forward and backward."""
    length, width = 256, 128
    keys = jax.random.split(jax.random.key(7), 4)
    q, dy = (jax.random.normal(key, (2, length, 2, width)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, length, 1, width)) for key in keys[2:])
    mask = padding_mask(jnp.arange(length) < jnp.array([[length], [200]]))

    def splash(q, k, v):
        return splash_attention(q, k, v, mask, causal, 0.07, interpret=True)

    def plain(q, k, v):
        return dot_product_attention(q, k, v, mask, causal=causal, scale=0.07)

    results = []
    for run in (splash, plain):
        y, pull = jax.vjp(jax.jit(run), q, k, v)
        results.append((y, *pull(dy)))
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))


def test_the_splash_kernel_is_for_tpu_alone(monkeypatch):
    q = jnp.zeros((1, 1024, 4, 128), jnp.bfloat16)
    assert not splash_takes(q, q, None, True)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert splash_takes(q, q, None, True) and splash_takes(q, q, jnp.ones((1, 1, 1, 1024), bool), False)
    assert not splash_takes(q, q, jnp.ones((1, 1, 1024, 1024), bool), True)
    assert not splash_takes(q[..., :64], q[..., :64], None, True) and not splash_takes(q[:, :512], q, None, True)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not splash_takes(q, q, None, True)


def test_gradients(qkv):
    q, k, v = qkv
    mask = padding_mask(np.arange(S) < np.array([[3], [4]]))
    check_grads(lambda *x: dot_product_attention(*x, mask), (q, k, v), order=1, modes=["rev"], rtol=1e-2, eps=3e-3)


def test_softmax_stays_in_float32_for_half_precision(qkv):
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv)
    assert attention_weights(q, k).dtype == jnp.float32
    exact = dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    actual = dot_product_attention(q, k, v)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(actual.astype(jnp.float32), exact, atol=0.02)


def test_dropout_keeps_the_mean_and_needs_a_key(qkv):
    q, k, v = qkv
    plain = dot_product_attention(q, k, v)
    np.testing.assert_array_equal(dot_product_attention(q, k, v, dropout_rate=0.5), plain)
    rngs = jax.random.split(jax.random.key(19), 4000)
    drop = jax.jit(jax.vmap(lambda rng: dot_product_attention(q, k, v, dropout_rate=0.3, dropout_rng=rng)))
    draws = drop(rngs)
    assert np.abs(draws[0] - plain).max() > 0.1
    np.testing.assert_allclose(draws.mean(0), plain, atol=5 * float(draws.std(0).max()) / 4000**0.5)
