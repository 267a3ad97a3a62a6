"""Evaluation of classification: scores by hand, from arrays and pipelines, and pictures of errors."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource
from mmjax.errors import MmjaxError
from mmjax.evaluation.classification import (
    ClassificationEvaluation,
    classification_scores,
    cross_entropy,
    surest_mistakes,
)
from mmjax.evaluation.pictures import mistakes_picture
from mmjax.training.scores import metrics

C = 7
LOGITS = np.array([[3, 1, 0], [0, 2, 1], [5, 0, 4], [1, 1.5, 0], [0, 0, 9.0]])
LABELS = np.array([0, 1, 2, 0, 2])


def test_scores_by_hand():
    scores = classification_scores(LOGITS, LABELS, ks=(1, 2))
    assert scores["top1"].value == 60 and scores["top1"].n == 5 and scores["top1"].chance == 40
    assert scores["top2"].value == 100
    assert scores["mean_per_class"].value == pytest.approx(100 * (1 / 2 + 1 + 1 / 2) / 3)
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    losses = -np.log(p[np.arange(5), LABELS])
    assert scores["loss"].value == pytest.approx(losses.mean()) and scores["loss"].unit == "nats"
    assert scores["loss"].chance == pytest.approx(-(0.8 * math.log(0.4) + 0.2 * math.log(0.2)))
    # Large logits neither overflow nor hide.
    assert cross_entropy(np.array([[1000.0, 0.0]]), np.array([1])).value == 1000


def test_two_classes_have_f1_and_matthews():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 101)
    logits = rng.normal(size=(101, 2)) + 1.2 * np.eye(2)[labels]
    scores, guess = classification_scores(logits, labels), logits.argmax(1)
    assert scores["f1"].value == pytest.approx(100 * metrics.f1_score(labels, guess))
    assert scores["matthews"].value == pytest.approx(100 * metrics.matthews_corrcoef(labels, guess))
    assert scores["f1"].chance == pytest.approx(100 * metrics.f1_score(labels, np.ones(101)))
    assert scores["matthews"].low < scores["matthews"].value < scores["matthews"].high
    one = classification_scores(np.array([[1.0, 0.0]] * 3), np.array([0, 1, 0]))
    assert one["matthews"].value == one["f1"].value == 0


def test_most_confident_mistakes_come_first():
    np.testing.assert_array_equal(surest_mistakes(LOGITS, LABELS), [2, 3])
    np.testing.assert_array_equal(surest_mistakes(LOGITS, LABELS, most=1), [2])


@struct.dataclass
class State:
    step: Any
    stats: Any


def images(n=11):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 2, 3, 3), np.uint8), rng.integers(0, C, n).astype(np.int32)


def predict(params, state, x):
    return x.reshape(len(x), -1).astype(jnp.float32) @ params["kernel"] + state.stats["shift"]


def test_arrays_and_pipelines_score_alike_and_pictures_come_at_the_end():
    pictures, labels = images()
    params = {"kernel": np.random.default_rng(1).standard_normal((18, C)).astype(np.float32)}
    state = State(3, {"shift": np.arange(C, dtype=np.float32)})
    logits = pictures.reshape(11, -1) @ params["kernel"].astype(np.float64) + state.stats["shift"]
    expected = classification_scores(logits, labels)
    names = [f"class {i}" for i in range(C)]
    evaluation_on_arrays = ClassificationEvaluation(
        logits=predict, images=pictures, labels=labels, class_names=names, batch_size=4, final_step=5
    )
    source = ArraySource(image=pictures, label=labels)
    for evaluation in (
        evaluation_on_arrays,
        ClassificationEvaluation(logits=predict, images=Pipeline(source, 4), batch_size=4),
    ):
        scores = evaluation.scores(params, state)
        assert scores.keys() == {f"classification_{name}" for name in ("top1", "top5", "mean_per_class", "loss")}
        assert scores["classification_top1"] == expected["top1"]
        assert scores["classification_loss"].value == pytest.approx(expected["loss"].value, rel=1e-4)
    during = evaluation_on_arrays.run(params, state)
    assert during["classification_n"] == 11 and not any(isinstance(v, np.ndarray) for v in during.values())
    end = metrics(evaluation_on_arrays.run(params, State(5, state.stats)))
    assert end["classification_confusion"].dtype == end["classification_mistakes"].dtype == np.uint8
    assert "classification_top1_low" in end


def test_each_mistake_is_shown_with_its_line():
    one = mistakes_picture(np.zeros((1, 5, 7, 3), np.uint8), ["shirt, not coat (97 %)"])
    many = mistakes_picture(np.zeros((11, 5, 7, 1), np.uint8), ["$x"] * 11)
    assert many.shape[1] == 8 * one.shape[1] and many.shape[0] > 1.7 * one.shape[0]
    # Black images, and black words below them.
    assert (one[: one.shape[0] // 2] == 0).all(-1).mean() > 0.3
    with pytest.raises(MmjaxError, match="lines: 0 lines for 1 images"):
        mistakes_picture(np.zeros((1, 5, 7, 3), np.uint8), [])
