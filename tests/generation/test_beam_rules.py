"""Beam searches as four versions of transformers gave them (see record_beams.py), and further rules."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation.markov import Markov

from mmjax.errors import MmjaxError
from mmjax.generation.engine import generate
from mmjax.generation.options import BeamRules, GenerationOptions

RECORD = json.loads(pathlib.Path(__file__).with_name("beams.json").read_text())
RULES = {"4.15.0": BeamRules.v4_15(), "4.33.2": BeamRules.v4_33(), "4.37.2": BeamRules.v4_37()}
RULES |= {version: BeamRules.v5() for version in RECORD["found"] if version.startswith("5.")}
CASES = [(v, i) for v, result in RECORD["found"].items() for i, of_trial in enumerate(result) if of_trial is not None]
COMPILED = (("4.15.0", 9), ("4.37.2", 16))
"""As in use; the others run step by step, which takes a tenth of the time."""


def search(version, prompts, embeds=False, **options):
    """Prompts are padded on the right, to test it: the original's were padded on the left."""
    kwargs = {"eos": tuple(options.pop("eos", RECORD["eos"])), "pad": RECORD["pad"], "max_new_tokens": 8}
    if version.startswith("4.") and embeds:
        kwargs["bos"] = RECORD["bos"]
    width = 8
    ids = np.array([[*map(int, prompt), *[RECORD["pad"]] * (width - len(prompt))] for prompt in prompts], np.int32)
    inputs = {"inputs_embeds": jnp.asarray(ids[..., None], jnp.float32)} if embeds else {"input_ids": jnp.asarray(ids)}
    inputs |= {"attention_mask": jnp.asarray([[i < len(prompt) for i in range(width)] for prompt in prompts])}
    kwargs |= {"beam_rules": RULES[version], "num_return_sequences": options["num_beams"], **options}
    chosen_options = GenerationOptions(**kwargs)
    return generate(
        Markov(RECORD["rate"]), {"table": jnp.asarray(RECORD["table"])}, inputs, chosen_options
    ), chosen_options


@pytest.mark.parametrize(("version", "i"), CASES)
def test_every_beam_is_that_of_the_version(version, i):
    with jax.disable_jit((version, i) not in COMPILED):
        result, options = search(version, RECORD["prompts"][i], **RECORD["trials"][i])
    for ids, scores, beams in zip(np.asarray(result.ids), np.asarray(result.scores), RECORD["found"][version][i]):
        ends = [
            int(np.argmax(np.isin(row, options.eos))) + 1 if np.isin(row, options.eos).any() else None for row in ids
        ]
        assert ["".join(map(str, row[:end])) for row, end in zip(ids, ends)] == [text for text, _ in beams]
        np.testing.assert_allclose(scores, [score for _, score in beams], atol=1e-4)


class Remembering(Markov):
    """The logits depend on all earlier tokens."""

    def step(self, variables, ids, state):
        logits, state = super().step(variables, ids, state)
        read = state.rows["read"].reshape(*ids.shape, -1)
        return logits * (1 + 0.1 * jnp.sum(jnp.maximum(read, 0), axis=-1, keepdims=True)), state


def test_each_beam_of_each_group_has_its_cache():
    """The score of a text is that of its ids, whichever beams it came from; groups identify the search."""
    table, k, capacity = np.array(RECORD["table"]), 4, 6
    options = GenerationOptions(
        max_new_tokens=capacity, num_beams=k, num_beam_groups=2, diversity_penalty=1e-6, num_return_sequences=k,
        length_penalty=0.0, eos=(0,), pad=7, early_stopping=True,
    )  # fmt: skip
    prompts = np.array([[5], [4], [2], [6]], np.int32)
    variables, inputs = {"table": jnp.asarray(table, jnp.float32)}, {"input_ids": jnp.asarray(prompts)}
    result = generate(Remembering(), variables, inputs, options)
    for last, beams, scores in zip(prompts[:, 0], np.asarray(result.ids), np.asarray(result.scores)):
        for row, score in zip(beams.tolist(), scores):
            text = row[: row.index(0) + 1] if 0 in row else row
            total, read = 0.0, 0
            for i, (one, id) in enumerate(zip([last, *text], text)):
                read += one if i else 0
                total += float(jax.nn.log_softmax(jnp.asarray(table[one] * (1 + 0.1 * read)))[id])
            assert abs(total - score) < 1e-3
    groups = np.asarray(result.groups)
    assert (np.sort(groups) == [0, 0, 1, 1]).all()
    alone = generate(
        Remembering(),
        variables,
        inputs,
        options.replace(num_beams=2, num_return_sequences=2, num_beam_groups=1, diversity_penalty=0.0),
    )
    first = np.asarray(result.ids)[groups == 0].reshape(-1, 2, capacity)
    np.testing.assert_array_equal(first, alone.ids, err_msg="the first group is as if it were alone")


def test_lengths_count_the_prompt_ids():
    options = GenerationOptions(num_beams=2, beam_rules=BeamRules.v4_33())
    inputs = {"inputs_embeds": jnp.ones((2, 3, 1))}
    with pytest.raises(MmjaxError, match="a prompt of embeddings has none: set bos="):
        generate(Markov(), {"table": jnp.asarray(RECORD["table"])}, inputs, options)
    with pytest.raises(MmjaxError, match="a length of 0"):
        BeamRules(eos_counted=False)


def test_a_decoder_s_start_counts_as_a_prompt_of_one_id():
    table, start = {"table": jnp.asarray(RECORD["table"])}, jnp.asarray([[4], [5]])
    options = GenerationOptions(max_new_tokens=8, num_beams=3, eos=(0,), pad=7, beam_rules=BeamRules.v4_33())
    expected = generate(Markov(), table, {"input_ids": start}, options)
    encoded = {"input_ids": jnp.ones((2, 7), jnp.int32), "attention_mask": jnp.ones((2, 7), bool)}
    actual = generate(Markov(), table, {**encoded, "decoder_input_ids": start}, options)
    np.testing.assert_array_equal(actual.ids, expected.ids)
    np.testing.assert_array_equal(actual.scores, expected.scores)
