"""Perplexity in windows: each token once, against a plain loop, whatever the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.evaluation.perplexity import perplexity, windows
from mmjax.objectives.language import IGNORED

V, N = 13, 61
TEXT = np.random.default_rng(0).integers(V, size=N)
TABLE = jax.random.normal(jax.random.key(0), (V, V))


def causal(table, ids, mask):
    """Logits depend on all earlier tokens; masked ids have no effect."""
    return jnp.cumsum(jnp.where(mask[..., None], table[ids], 7.0), axis=1) / 3


def loop(length, stride):
    """The loop of transformers' documentation of fixed-length models: one window after another, unpadded."""
    sums, counts, end = [], [], 0
    for start in range(0, N, stride):
        before, end = end, min(start + length, N)
        ids = TEXT[start:end]
        logits = np.cumsum(np.asarray(TABLE, np.float64)[ids], axis=0) / 3
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        evaluated = range(max(before - start - 1, 0), len(ids) - 1)
        sums.append(-sum(log_p[i, ids[i + 1]] for i in evaluated))
        counts.append(len(evaluated))
        if end == N:
            return sums, counts
    raise AssertionError


def test_every_token_but_the_first_is_scored_once():
    for length, stride in ((10, 3), (10, 9), (61, 60), (60, 1), (100, 50), (2, 1), (9, 4)):
        cut = windows(TEXT, length, stride)
        starts = np.arange(len(cut.ids)) * stride
        positions = (starts[:, None] + np.arange(length) + 1)[cut.labels != IGNORED]
        assert sorted(positions) == list(range(1, N)), (length, stride)
        np.testing.assert_array_equal(cut.labels[cut.labels != IGNORED], TEXT[positions])
        assert cut.mask[-1].any() and starts[-1] + cut.mask[-1].sum() == N and cut.ids.shape[1] == length
        context = (np.arange(length) + 1)[None].repeat(len(starts), 0)[1:][cut.labels[1:] != IGNORED]
        assert context.min(initial=length) >= length - stride


@pytest.mark.parametrize(
    "length, stride, batch_size", [(10, 3, 4), (10, 3, 99), (12, None, 5), (99, 1, 8), (16, 15, 1)]
)
def test_matches_a_plain_loop(length, stride, batch_size):
    score = perplexity(causal, TABLE, TEXT, length=length, stride=stride, batch_size=batch_size)
    sums, counts = loop(length, stride or length // 2)
    assert score.n == sum(counts) == N - 1 and score.chance == V and score.unit == "perplexity"
    assert abs(score.value - np.exp(sum(sums) / sum(counts))) < 1e-5 * score.value
    assert score.low is not None and score.high is not None and score.low <= score.value <= score.high
    assert len(sums) == 1 or score.low < score.high


def test_a_uniform_model_is_at_chance():
    score = perplexity(lambda table, ids, mask: jnp.zeros((*ids.shape, V)), None, TEXT, length=8)
    assert abs(score.value - V) < 1e-5 and score.high is not None and abs(score.high - V) < 1e-5


def test_compiles_once():
    traced = []

    def counted(table, ids, mask):
        traced.append(ids.shape)
        return causal(table, ids, mask)

    first = perplexity(counted, TABLE, TEXT, length=10, batch_size=4)
    again = perplexity(counted, TABLE + 1, TEXT, length=10, batch_size=4)
    assert traced.count((4, 10)) <= 3 and first.value != again.value  # each call traces once for the shape


@pytest.mark.parametrize(
    "ids, options, message",
    [
        (TEXT[:1], {}, r"ids should be \[n\]"),
        (TEXT[None], {}, r"int64 \[1, 61\]"),
        (TEXT, {"length": 1}, "length=1"),
        (TEXT, {"stride": 10}, "stride=10"),
        (TEXT, {"stride": 0}, "stride=0"),
        (np.append(TEXT, V), {}, "tokens from 0 to 13, a vocabulary of 13"),
    ],
)
def test_invalid_inputs_are_refused(ids, options, message):
    with pytest.raises(MmjaxError, match=message):
        perplexity(causal, TABLE, ids, **{"length": 10, **options})
