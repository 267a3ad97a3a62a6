"""Greedy decoding and sampling on a Markov chain that can be enumerated by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation.markov import Markov

from mmjax.errors import MmjaxError
from mmjax.generation.engine import generate, stream
from mmjax.generation.options import GenerationOptions
from mmjax.generation.scores import constrain, nucleus
from mmjax.generation.stopping import Stops
from mmjax.text.stop_strings import stop_automaton

V = 7
TABLE = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(0).normal(size=(V, V)) * 2, jnp.float32))
VARIABLES = {"table": TABLE}
PROMPTS = np.array([[3, 5], [4, 1], [0, 2]], np.int32)


def run(**options):
    inputs = {"input_ids": jnp.asarray(options.pop("prompts", PROMPTS))}
    inputs |= {"attention_mask": jnp.asarray(options.pop("mask"))} if "mask" in options else {}
    inputs |= {"decoder_input_ids": jnp.asarray(options.pop("begun"))} if "begun" in options else {}
    seed, stops = options.pop("seed", 0), options.pop("stops", None)
    return generate(Markov(), VARIABLES, inputs, GenerationOptions(**options), seed, stops)


def walk(last, length, allowed=lambda row, scores: scores):
    row = []
    for _ in range(length):
        row.append(int(np.argmax(allowed(row, np.array(TABLE[last], np.float64)))))
        last = row[-1]
    return row


def test_greedy_takes_the_most_probable_and_pads_after_the_end():
    result = run(max_new_tokens=9)
    sequences = [walk(last, 9) for last in PROMPTS[:, -1]]
    np.testing.assert_array_equal(result.ids[:, 0], sequences)
    sums = [sum(float(TABLE[a, b]) for a, b in zip([last, *row], row)) for last, row in zip(PROMPTS[:, -1], sequences)]
    np.testing.assert_allclose(result.scores[:, 0], sums, rtol=1e-5)
    eos = sequences[0][2]
    first = [row[: row.index(eos) + 1] if eos in row else row for row in sequences]
    ended = np.asarray(run(max_new_tokens=9, eos=(eos,), pad=6).ids[:, 0])
    np.testing.assert_array_equal(ended, [[*row, *[6] * (9 - len(row))] for row in first])


def test_padding_on_either_side_changes_nothing():
    left = run(max_new_tokens=5, prompts=np.array([[0, 0, 5], [0, 4, 1]]), mask=np.array([[0, 0, 1], [0, 1, 1]]))
    right = run(max_new_tokens=5, prompts=np.array([[5, 0, 0], [4, 1, 0]]), mask=np.array([[1, 0, 0], [1, 1, 0]]))
    np.testing.assert_array_equal(left.ids, right.ids)
    np.testing.assert_array_equal(left.ids[:, 0], [walk(5, 5), walk(1, 5)])


def test_the_model_processes_the_chosen_tokens():
    result = run(max_new_tokens=6, temperature=1.0, num_return_sequences=3)
    assert result.state is not None
    np.testing.assert_array_equal(result.state.rows["read"][:, :5], result.ids[..., :5].reshape(-1, 5))
    assert int(result.state.index) == 5


def test_streamed_tokens_are_those_of_one_run():
    options = GenerationOptions(max_new_tokens=8, temperature=0.7, eos=(2,), pad=6)
    whole = np.asarray(generate(Markov(), VARIABLES, {"input_ids": PROMPTS}, options, 5).ids)
    for every in (1, 3):
        parts = list(stream(Markov(), VARIABLES, {"input_ids": PROMPTS}, options, 5, every=every))
        joined = np.concatenate(parts, -1)
        np.testing.assert_array_equal(joined, whole[..., : joined.shape[-1]])
        assert (whole[..., joined.shape[-1] :] == 6).all()
        assert {part.shape[-1] for part in parts[1:-1]} <= {every}


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 0.8, 1.0), (3, 1.0, 0.5), (4, 0.6, 1.7), (0, 1.0, 0.9)]
)
def test_samples_follow_the_definition(top_k, top_p, temperature):
    """Pearson's chi-square of 6,000 first tokens against the filtered distribution, and nothing outside of it."""
    scores = np.asarray(TABLE[5], np.float64) / temperature
    included = np.argsort(-scores)[: top_k or V]
    shares = np.exp(scores[included]) / np.exp(scores[included]).sum()
    size = int(np.searchsorted(np.cumsum(shares), top_p - 1e-9)) + 1
    included, shares = included[:size], shares[:size] / shares[:size].sum()
    n = 6000
    result = run(
        prompts=PROMPTS[:1], max_new_tokens=1, num_return_sequences=n, seed=3,
        top_k=top_k, top_p=top_p, temperature=temperature,
    )  # fmt: skip
    counts = np.bincount(np.asarray(result.ids).ravel(), minlength=V)
    assert counts[np.setdiff1d(np.arange(V), included)].sum() == 0
    statistic = ((counts[included] - n * shares) ** 2 / (n * shares)).sum()
    # The 99.99 % point for as many degrees of freedom (Wilson and Hilferty's approximation).
    freedom = len(included) - 1
    if freedom:
        assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_the_nucleus_is_the_smallest_set_with_the_mass():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(200, 31)) * 3, jnp.float32)
    for top_p in (0.05, 0.5, 0.9, 0.999):
        included = np.isfinite(nucleus(logits, GenerationOptions(temperature=1.3, top_p=top_p)))
        shares = np.array(jax.nn.softmax(logits / 1.3), np.float64)
        mass = np.where(included, shares, 0).sum(-1)
        assert (mass >= top_p - 1e-6).all()
        least = np.where(included, shares, np.inf).min(-1)
        assert (mass - least < top_p + 1e-6).all(), "without its least likely token it would still hold the mass"
        assert (np.where(included, -np.inf, shares).max(-1) <= least).all()


def test_halves_of_the_mass_at_the_border():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
    included = np.isfinite(nucleus(logits, GenerationOptions(temperature=1.0, top_p=0.75)))
    np.testing.assert_array_equal(included, [True, True, False, False])


def test_an_items_samples_do_not_depend_on_later_items():
    options = {"max_new_tokens": 6, "temperature": 1.0, "seed": 9}
    np.testing.assert_array_equal(run(**options).ids[:1], run(**options, prompts=PROMPTS[:1]).ids)


def test_penalties_by_the_rule():
    options = GenerationOptions(repetition_penalty=1.5, min_new_tokens=3, eos=(0,), suppress=(6,))
    scores = jnp.asarray([[[-1.0, 2.0, -3.0, 4.0, 0.5, 0.0, 9.0]]])
    occurred = jnp.asarray([[[False, True, True, False, False, False, False]]])
    result = constrain(scores, options, jnp.int32(1), occurred, jnp.zeros((1, 1, 4), jnp.int32), None)
    np.testing.assert_allclose(result[0, 0], [-np.inf, 2 / 1.5, -4.5, 4.0, 0.5, 0.0, -np.inf], rtol=1e-6)


def without_repeats(size, prompt, penalty=1.0):
    def rule(row, scores):
        text = [*prompt, *row]
        for id in set(text):
            scores[id] *= penalty if scores[id] < 0 else 1 / penalty
        for end in range(size, len(text) + 1):
            if text[end - size : end - 1] == text[len(text) - size + 1 :]:
                scores[text[end - 1]] = -np.inf
        return scores

    return rule


def test_a_repetition_penalty_counts_prompt_and_sequence():
    result = run(max_new_tokens=9, repetition_penalty=1.4)
    sequences = [walk(p[-1], 9, without_repeats(99, p.tolist(), penalty=1.4)) for p in PROMPTS]
    np.testing.assert_array_equal(result.ids[:, 0], sequences)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_occurs_twice_in_prompt_and_sequence(size):
    prompts = np.array([[3, 5, 3, 5], [6, 4, 1, 1], [2, 6, 2, 6]]) if size > 1 else PROMPTS
    length = 12 if size > 1 else 5
    result = np.asarray(run(max_new_tokens=length, no_repeat_ngram_size=size, prompts=prompts).ids[:, 0])
    texts = prompts.tolist()
    np.testing.assert_array_equal(result, [walk(t[-1], length, without_repeats(size, t)) for t in texts])
    for text, row in zip(texts, result.tolist()):
        grams = [tuple([*text, *row][i : i + size]) for i in range(len(text) + length - size + 1)]
        assert len(set(grams)) == len(grams) - (text[:2] == text[2:] and size == 2), "but for what the prompt repeats"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_part_of_a_prompt(side):
    """Short prompts in a batch with a long one are penalised as if they were alone."""
    texts, pad, options = [[1], [3, 5, 3], [2, 6, 2, 6, 4]], 5, {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2}
    sequences = [np.pad(t, (5 - len(t), 0) if side == "left" else (0, 5 - len(t)), constant_values=pad) for t in texts]
    mask = [np.pad(np.ones(len(t), int), (5 - len(t), 0) if side == "left" else (0, 5 - len(t))) for t in texts]
    result = run(max_new_tokens=9, prompts=np.array(sequences), mask=np.array(mask), **options)
    for text, row in zip(texts, np.asarray(result.ids[:, 0])):
        np.testing.assert_array_equal(row, walk(text[-1], 9, without_repeats(2, text, penalty=1.6)))


def test_of_an_encoder_decoder_the_decoder_s_ids_count():
    options = {"max_new_tokens": 8, "repetition_penalty": 1.6, "no_repeat_ngram_size": 2}
    begun = np.array([[3, 5, 3], [6, 4, 1], [2, 6, 2]])
    np.testing.assert_array_equal(run(begun=begun, **options).ids, run(prompts=begun, **options).ids)


def test_samples_repeat_no_ngram_either():
    result = run(
        max_new_tokens=20, temperature=3.0, num_return_sequences=20, no_repeat_ngram_size=2, repetition_penalty=1.1
    )
    for text, sequences in zip(PROMPTS.tolist(), np.asarray(result.ids).tolist()):
        for row in sequences:
            grams = list(zip([*text, *row], [*text, *row][1:]))
            assert len(set(grams)) == len(grams)


def test_a_forced_bos_follows_a_single_id_only():
    start, longer = np.array([[3], [4], [0]]), np.array([[3, 3], [1, 4], [2, 0]])
    forced = {"max_new_tokens": 4, "forced_bos": 6}
    for begun in ({"prompts": start}, {"begun": start}):
        for beams in (1, 2):
            assert (np.asarray(run(**begun, **forced, num_beams=beams).ids)[:, 0, 0] == 6).all()
    greedy = run(prompts=start, **forced)
    np.testing.assert_array_equal(greedy.ids[:, 0], [[6, *walk(6, 3)]] * 3)
    rest = sum(float(TABLE[a, b]) for a, b in zip([6, *walk(6, 3)], walk(6, 3)))
    np.testing.assert_allclose(greedy.scores, np.full((3, 1), rest), rtol=1e-5)
    np.testing.assert_array_equal(run(prompts=longer, **forced).ids[:, 0], [walk(last, 4) for last in (3, 4, 0)])
    padded = run(prompts=longer, mask=np.array([[0, 1]] * 3), **forced)
    np.testing.assert_array_equal(padded.ids, greedy.ids)


def test_a_forced_eos_is_the_last_token_and_none_comes_earlier():
    result = np.asarray(run(max_new_tokens=6, eos=(1,), forced_eos=True, min_new_tokens=6).ids[:, 0])
    assert (result[:, -1] == 1).all() and (result[:, :-1] != 1).all()


def test_stop_strings_end_sequences():
    spelled = [bytes([97 + i]) for i in range(V)]
    row = walk(5, 12)
    text = "".join(chr(97 + i) for i in row)
    stop = text[4:6]
    automaton = stop_automaton([stop], spelled)
    start = [automaton.after_prompt(prompt.tolist()) for prompt in PROMPTS]
    stops = Stops(jnp.asarray(automaton.table), jnp.int32(automaton.matched), jnp.asarray(start, jnp.int32))
    result = np.asarray(run(max_new_tokens=12, stops=stops, pad=V - 1).ids[0, 0])
    end = (text.index(stop) if text.index(stop) else 0) + len(stop)
    np.testing.assert_array_equal(result, [*row[:end], *[V - 1] * (12 - end)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: at least 1"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p=0.0"),
        ({"top_p": 0.5}, "need a temperature"),
        ({"num_beams": 2, "temperature": 1.0}, "it takes no temperature"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3"),
        ({"num_return_sequences": 3}, "one text"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"early_stopping": "later", "num_beams": 2}, "early_stopping='later'"),
        ({"min_new_tokens": 30}, "min_new_tokens=30"),
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "num_beam_groups=3: not equally large"),
        ({"num_beams": 4, "num_beam_groups": 2}, "diversity_penalty=0.0: without the penalty"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "a single group has none to differ from"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(MmjaxError, match=message):
        GenerationOptions(**options)
