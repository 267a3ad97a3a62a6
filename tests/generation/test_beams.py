"""Beam search against exhaustive search and against the rules written out in Python."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation.markov import Markov

from mmjax.generation.engine import generate, stream
from mmjax.generation.options import BeamRules, GenerationOptions

V, EOS = 5, 0
TABLE = np.array(jax.nn.log_softmax(jnp.asarray(np.random.default_rng(4).normal(size=(V, V)) * 1.5, jnp.float32)))
PROMPTS = np.array([[3, 2], [1, 4], [2, 1], [4, 3]], np.int32)


def search(**options):
    options = GenerationOptions(eos=(EOS,), pad=EOS, **options)
    result = generate(Markov(), {"table": jnp.asarray(TABLE)}, {"input_ids": jnp.asarray(PROMPTS)}, options)
    return np.asarray(result.ids), np.asarray(result.scores)


def total(last, row):
    return sum(float(TABLE[a, b]) for a, b in zip([last, *row], row))


@pytest.mark.parametrize("gnmt", [False, True])
def test_wide_beams_find_the_best_of_all_texts(gnmt):
    length, penalty = 3, 0.7
    options = {"length_penalty": penalty, "early_stopping": "never", "beam_rules": BeamRules(gnmt=gnmt)}
    ids, scores = search(max_new_tokens=length, num_beams=V**2, **options)
    for last, row, score in zip(PROMPTS[:, -1], ids[:, 0], scores[:, 0]):
        texts = [row for row in itertools.product(range(V), repeat=length) if EOS not in row[:-1]]
        texts += [(*row, EOS) for n in range(length - 1) for row in itertools.product(range(1, V), repeat=n)]
        divisors = {n: ((5 + n) / 6 if gnmt else n) ** penalty for n in range(1, length + 1)}
        best = max(texts, key=lambda text: total(last, text) / divisors[len(text)])
        np.testing.assert_array_equal(row[: len(best)], best)
        np.testing.assert_allclose(score, total(last, best) / divisors[len(best)], rtol=1e-5)


def by_the_rules(last, k, length, penalty, early):
    """One item, lists instead of arrays."""
    running, ended = [(0.0, [])], []
    for written in range(1, length + 1):
        continuations = [(s + TABLE[(row or [last])[-1], id], [*row, id]) for s, row in running for id in range(V)]
        best = sorted(continuations, key=lambda pair: -pair[0])[: 2 * k]
        hit = [row[-1] == EOS or written == length for _, row in best]
        if not (early is True and len(ended) == k):
            ended += [(s / written**penalty, row) for (s, row), h in list(zip(best, hit))[:k] if h]
            ended = sorted(ended, key=lambda pair: -pair[0])[:k]
        running = [pair for pair, h in zip(best, hit) if not h][:k]
        if not running or (early is True and len(ended) == k):
            break
        length_bound = length if early == "never" and penalty > 0 else written
        if len(ended) == k and running[0][0] / length_bound**penalty <= ended[-1][0]:
            break
    return ended


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
def test_every_beam_follows_the_rules(early, penalty):
    k, length = 3, 7
    ids, scores = search(
        max_new_tokens=length, num_beams=k, num_return_sequences=k, length_penalty=penalty, early_stopping=early
    )
    for i, last in enumerate(PROMPTS[:, -1]):
        expected = by_the_rules(last, k, length, penalty, early)
        np.testing.assert_allclose(scores[i, : len(expected)], [score for score, _ in expected], rtol=1e-4)
        for row, (_, text) in zip(ids[i], expected):
            np.testing.assert_array_equal(row, [*text, *[EOS] * (length - len(text))])


def test_a_beam_search_is_not_streamed():
    with pytest.raises(ValueError, match="beam search"):
        next(stream(Markov(), {"table": TABLE}, {"input_ids": PROMPTS}, GenerationOptions(num_beams=2)))
