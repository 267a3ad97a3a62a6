"""The MLM evaluation: means over masked tokens, the unigram baseline, intervals by document."""

from typing import NamedTuple

import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.evaluation.masked_words import MaskedWordsEvaluation, unigram

IDS = np.array([[5, 3, 3, 6], [5, 3, 4, 6], [5, 6, 0, 0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])


def test_unigram_counts_tokens_and_adds_one():
    expected = np.array([0, 0, 0, 3, 1, 3, 3, 0]) + 1.0
    np.testing.assert_allclose(np.exp(unigram(IDS, MASK, 8)), expected / 18)


class State(NamedTuple):
    step: int


def evaluation(**fields):
    columns = {
        "masked_ids": np.array([[3, 4], [3, 0], [6, 6], [3, 0], [4, 7]]),
        "masked_weights": np.array([[1, 1], [1, 0], [1, 1], [1, 0], [1, 1]], np.float32),
        "next_label": np.array([0, 1, 1, 1, 0]),
    }

    def judge(params, state, batch):
        return {
            "mlm_loss": params * batch["masked_ids"].astype(np.float32),
            "mlm_accuracy": (batch["masked_ids"] == 3).astype(np.float32),
            "nsp_accuracy": batch["next_label"].astype(np.float32),
        }

    kwargs = {"judge": judge, "columns": columns, "documents": np.array([4, 4, 7, 7, 9]), "batch_size": 2}
    return MaskedWordsEvaluation(**kwargs | {"frequencies": unigram(IDS, MASK, 8)} | fields)


def test_scores_are_means_over_masked_words():
    scores = evaluation().scores(np.float32(0.5))
    words = np.array([3, 4, 3, 6, 6, 3, 4, 7])
    assert scores["mlm_loss"].value == pytest.approx(0.5 * words.mean()) and scores["mlm_loss"].n == 8
    guess = -unigram(IDS, MASK, 8)[words].mean()
    assert scores["mlm_unigram_loss"].value == scores["mlm_loss"].chance == pytest.approx(guess)
    assert scores["mlm_accuracy"].value == pytest.approx(100 * 3 / 8)
    assert scores["mlm_accuracy"].chance == pytest.approx(100 * 3 / 8)  # 3 is the first of the commonest
    assert scores["nsp_accuracy"].value == pytest.approx(60) == scores["nsp_accuracy"].chance
    assert scores["mlm_loss"].low < scores["mlm_loss"].value < scores["mlm_loss"].high
    logged = evaluation(final_step=3).run(np.float32(0.5), State(2))
    assert logged["mlm_documents"] == 3 and logged["mlm_loss"] == scores["mlm_loss"]


def test_no_masked_word_is_refused():
    columns = {"masked_weights": np.zeros((2, 3))}
    with pytest.raises(MmjaxError, match="no masked word in 2 rows"):
        evaluation(columns=columns, documents=np.zeros(2))
