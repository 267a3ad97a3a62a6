"""Translation scores: sacrebleu's values, their intervals, and the evaluation over batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.evaluation.translation import TranslationEvaluation, translation_scores
from mmjax.generation.decodable import DecodeState
from mmjax.generation.options import GenerationOptions
from mmjax.training.scores import metrics

REFERENCES = ["the cat sat on the mat", "a red car", "two dogs are playing in the park", "it rains"] * 5
TRANSLATIONS = ["the cat sat on a mat", "a red car", "two dogs playing in a park", "it snows now"] * 5


def test_scores_are_sacrebleus():
    from sacrebleu import corpus_bleu, corpus_chrf

    scores = translation_scores(TRANSLATIONS, REFERENCES)
    assert scores["bleu"].value == pytest.approx(corpus_bleu(TRANSLATIONS, [REFERENCES]).score, abs=1e-5)
    assert scores["chrf"].value == pytest.approx(corpus_chrf(TRANSLATIONS, [REFERENCES]).score, abs=1e-5)
    assert scores["exact_match"].value == 25 and scores["exact_match"].n == 20
    for score in scores.values():
        assert score.low is not None and score.high is not None and score.low < score.value < score.high
    assert scores == translation_scores(TRANSLATIONS, REFERENCES)
    bare = translation_scores(TRANSLATIONS, REFERENCES, intervals=False)
    assert bare["bleu"].low is None and bare["bleu"].value == scores["bleu"].value


def test_texts_without_a_match():
    """Empty, of two letters, or all wrong: scores of 0 and no division by it."""
    scores = translation_scores(["", "ab", "x"], ["cd", "ab c", ""])
    assert scores["bleu"].value == scores["bleu"].high == 0
    from sacrebleu import corpus_chrf

    expected = corpus_chrf(["", "ab", "x"], [["cd", "ab c", ""]]).score
    assert scores["chrf"].value == pytest.approx(expected, abs=1e-5) and scores["chrf"].low == 0
    assert translation_scores(["ab"], ["cd"])["chrf"].high == 0


def test_invalid_corpora_are_refused():
    with pytest.raises(MmjaxError, match="1 translations and 2 references"):
        translation_scores(["a"], ["a", "b"])
    with pytest.raises(MmjaxError, match="0 translations and 0 references"):
        translation_scores([], [])


class Copies:
    """Writes its source's ids one after the other; `params` is added to each."""

    def prefill(self, variables, inputs, rows, capacity):
        source = inputs["input_ids"] + variables["params"]
        items = {"source": jnp.pad(source, ((0, 0), (0, capacity)))}
        state = DecodeState(items, jnp.zeros(source.shape[0] * rows), jnp.zeros((), jnp.int32))
        return jax.nn.one_hot(source[:, 0], 50), state

    def step(self, variables, ids, state):
        source = jax.lax.dynamic_index_in_dim(state.items["source"], state.index + 1, 1, keepdims=False)
        logits = jnp.broadcast_to(jax.nn.one_hot(source, 50)[:, None], (*ids.shape, 50))
        return logits, state._replace(index=state.index + 1)


def test_every_item_is_scored_once():
    """Seven items in batches of three; examples come only at the end."""
    ids = np.random.default_rng(0).integers(3, 40, (7, 6)).astype(np.int32)
    ids[:, -1] = 2
    texts = [" ".join(map(str, row[:-1])) for row in ids]
    options = GenerationOptions(max_new_tokens=6, eos=(2,))

    class State:
        step = 8

    evaluation = TranslationEvaluation(
        decodable=Copies(),
        inputs={"input_ids": ids},
        sources=texts,
        references=texts,
        decode=lambda row: " ".join(map(str, row[: row.index(2)] if 2 in row else row)),
        options={"greedy": options, "beam": options.replace(num_beams=2)},
        batch_size=3,
        final_step=9,
    )
    logged = metrics(evaluation.run(jnp.asarray(0), State))
    assert logged["translation_greedy_exact_match"] == 100 and logged["translation_beam_bleu"] == pytest.approx(100)
    assert logged["translation_n"] == 7 and "translation_examples" not in logged
    State.step = 9
    logged = metrics(evaluation.run(jnp.asarray(1), State))
    assert logged["translation_greedy_exact_match"] == 0 and logged["translation_greedy_exact_match_high"] > 0
    lines = logged["translation_examples"].splitlines()
    assert lines[0] == "source | reference | greedy | beam" and len(lines) == 8
    shifted = " ".join(str(id + 1) for id in ids[0])
    assert lines[1] == f"{texts[0]} | {texts[0]} | {shifted} | {shifted}"
    scores = evaluation.scores(jnp.asarray(0), State)
    assert scores["translation_beam_chrf"].value == pytest.approx(100) and len(scores) == 6
