"""T5's buckets against the published bounds and torch, its bias by hand; RMSNorm by hand and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.nn.attention import attention_weights, dot_product_attention
from mmjax.nn.norm import RMSNorm
from mmjax.nn.relative_positions import RelativeBias, bucket_table

ENCODER = {8: 8, 12: 9, 16: 10, 23: 11, 32: 12, 46: 13, 64: 14, 91: 15}
DECODER = {16: 16, 19: 17, 21: 18, 24: 19, 27: 20, 31: 21, 35: 22, 40: 23, 46: 24, 52: 25, 59: 26, 67: 27, 77: 28}
DECODER |= {87: 29, 99: 30, 113: 31}
"""The first distance of each growing bucket, by torch's float32."""


def test_buckets_begin_where_torch_begins_them():
    bidirectional, causal = bucket_table(True), bucket_table(False)
    for table, bounds in ((bidirectional, ENCODER), (causal, DECODER)):
        before = table[128::-1]
        firsts = {n: int(before[n]) for n in range(1, 129) if before[n] != before[n - 1] and n >= min(bounds)}
        assert firsts == bounds
        np.testing.assert_array_equal(before[: min(bounds)], range(min(bounds)))
    np.testing.assert_array_equal(bidirectional[129:], bidirectional[127::-1] + 16)
    np.testing.assert_array_equal(causal[129:], 0)


@pytest.mark.torch
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (14, 37), (6, 11)])
def test_every_distance_as_transformers(bidirectional, buckets, max_distance):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    r = torch.arange(-300, 301)
    reference = t5.T5Attention._relative_position_bucket(r, bidirectional, buckets, max_distance).numpy()
    actual = bucket_table(bidirectional, buckets, max_distance)[
        np.clip(r.numpy(), -max_distance, max_distance) + max_distance
    ]
    np.testing.assert_array_equal(actual, reference)


def test_too_few_buckets_or_too_small_a_distance():
    with pytest.raises(MmjaxError, match="3 buckets"):
        bucket_table(True, 3)
    with pytest.raises(MmjaxError, match="distances up to 8"):
        bucket_table(True, 32, 8)


def test_bias_of_a_position_in_the_middle():
    module = RelativeBias(3, False, buckets=8, max_distance=11)
    positions = jnp.arange(29)
    variables = module.init(jax.random.key(0), positions, positions)
    whole = module.apply(variables, positions, positions)
    table = variables["params"]["table"]
    assert whole.shape == (1, 3, 29, 29) and whole.dtype == jnp.float32
    np.testing.assert_array_equal(whole[0, :, 5, 9], table[0])
    np.testing.assert_array_equal(whole[0, :, 7, 4], table[3])
    np.testing.assert_array_equal(whole[0, :, 28, 0], table[7])
    one = jax.jit(lambda position: module.apply(variables, position[None], positions))(jnp.int32(17))
    np.testing.assert_array_equal(one[:, :, 0], whole[:, :, 17])


def test_bias_and_scale_in_attention():
    q = jnp.array([[[[3.0]]]])
    k, v = jnp.array([[[[1.0]], [[2.0]]]]), jnp.array([[[[5.0]], [[7.0]]]])
    bias = jnp.array([0.5, -1.0]).reshape(1, 1, 1, 2)
    scores = 0.25 * 3 * np.array([1, 2]) + [0.5, -1.0]
    expected = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(attention_weights(q, k, bias=bias, scale=0.25)[0, 0, 0], expected, rtol=1e-6)
    mixed = dot_product_attention(q, k, v, bias=bias, scale=0.25)
    np.testing.assert_allclose(mixed.item(), expected @ [5, 7], rtol=1e-6)
    hidden = dot_product_attention(q, k, v, jnp.array([[[[False, True]]]]), bias=bias, scale=0.25)
    np.testing.assert_allclose(hidden.item(), 7, rtol=1e-6)


def test_rms_norm_by_hand_and_in_half_precision():
    x, scale = np.array([[3.0, -4.0, 0.0], [1e-3, 0.0, 0.0]], np.float32), np.array([1.0, 2.0, 5.0], np.float32)
    rms = np.sqrt((x**2).mean(-1, keepdims=True) + 0.01)
    variables = {"params": {"scale": scale}}
    np.testing.assert_allclose(RMSNorm(0.01).apply(variables, x), x / rms * scale, rtol=1e-6)
    half = RMSNorm(0.01, jnp.bfloat16).apply(variables, jnp.asarray(x, jnp.bfloat16))
    expected = (jnp.asarray(x / rms).astype(jnp.bfloat16) * scale.astype(jnp.bfloat16)).astype(jnp.float32)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), expected, rtol=8e-3)


@pytest.mark.torch
def test_rms_norm_as_transformers():
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    reference = t5.T5LayerNorm(7)
    with torch.no_grad():
        reference.weight.copy_(torch.linspace(-1, 2, 7))
    x = torch.linspace(-5, 3, 35).reshape(5, 7)
    actual = RMSNorm().apply({"params": {"scale": reference.weight.detach().numpy()}}, x.numpy())
    np.testing.assert_allclose(actual, reference(x).detach(), rtol=1e-6)
