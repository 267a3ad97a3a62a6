"""mIoU by hand and against scikit-learn; the evaluation over a pipeline."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource
from mmjax.errors import MmjaxError
from mmjax.evaluation.segmentation import SegmentationEvaluation, class_counts, class_ious, mean_iou


class State(NamedTuple):
    step: int


def masks(n=7, classes=4, size=(9, 8), seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, (n, *size)).astype(np.uint8)
    predicted = np.where(rng.random((n, *size)) < 0.6, truth, rng.integers(0, classes, (n, *size)))
    truth[rng.random((n, *size)) < 0.1] = 255
    return truth, predicted


def test_it_is_sklearns_jaccard_score_on_the_pixels_with_a_class():
    metrics = pytest.importorskip("sklearn.metrics")
    truth, predicted = masks()
    counted = truth != 255
    expected = 100 * metrics.jaccard_score(truth[counted], predicted[counted], average=None)
    counts = class_counts(truth, predicted, 4)
    np.testing.assert_allclose(class_ious(counts.sum(0)), expected, rtol=1e-12)
    assert mean_iou(counts.sum(0)) == pytest.approx(expected.mean())
    # Of the set's counts, not the mean of the images'.
    assert mean_iou(counts).mean() != pytest.approx(expected.mean(), abs=1e-3)


def test_a_class_that_is_nowhere_does_not_count_and_one_that_is_only_predicted_does():
    truth = np.array([[[0, 0, 1, 1]]])
    ious = class_ious(class_counts(truth, np.array([[[0, 2, 1, 1]]]), 5).sum(0))
    np.testing.assert_array_equal(ious, [50, 100, 0, np.nan, np.nan])
    assert mean_iou(class_counts(truth, truth, 5).sum(0)) == 100


def evaluation(n=7, size=3):
    truth, predicted = masks(n)
    images = np.repeat(predicted[..., None], 3, -1).astype(np.uint8)
    source = ArraySource(image=images, mask=truth, name="masks")
    return (
        truth,
        predicted,
        SegmentationEvaluation(
            predict=lambda params, state, x: x[..., 0].astype(jnp.int32) + params,
            data=Pipeline(source, size),
            class_names=("a", "b", "c", "d"),
        ),
    )


def test_every_image_counts_once_whatever_the_batch():
    state = State(3)
    results = []
    for size in (3, 7):
        truth, predicted, judge = evaluation(size=size)
        results.append(judge.scores(0, state))
        score = results[-1]["segmentation_mIoU"]
        assert score.value == pytest.approx(mean_iou(class_counts(truth, predicted, 4).sum(0))) and score.n == 7
        assert score.low < score.value < score.high
    assert results[0] == results[1]
    counted = truth != 255
    accuracy = results[0]["segmentation_accuracy"]
    assert accuracy.value == pytest.approx(100 * (truth == predicted)[counted].mean())
    shares = np.bincount(truth[counted]) / counted.sum()
    assert accuracy.chance == pytest.approx(100 * shares.max())
    assert results[0]["segmentation_mIoU"].chance == pytest.approx(100 * shares.max() / 4)
    assert {f"segmentation_IoU/{name}" for name in "abcd"} < results[0].keys()
    outcome = judge.run(0, state)
    assert outcome["segmentation"].ndim == 3 and outcome["segmentation_n"] == 7


def test_chance_is_what_a_constant_gets():
    truth = np.zeros((3, 4, 4), np.uint8)
    truth[:, 0] = 1
    source = ArraySource(image=np.zeros((3, 4, 4, 3), np.uint8), mask=truth)
    judge = SegmentationEvaluation(
        predict=lambda *_: jnp.zeros((3, 4, 4), jnp.int32), data=Pipeline(source, 3), class_names=("floor", "wall")
    )
    score = judge.scores(None)["segmentation_mIoU"]
    assert score.value == score.chance == 37.5


def test_wrong_predictions_are_one_error():
    truth, predicted, judge = evaluation()
    with pytest.raises(MmjaxError, match="predicted: classes from 1 to 4, not below 4"):
        judge.scores(1)
    with pytest.raises(MmjaxError, match=r"expected \[n, height, width\]"):
        class_counts(truth, predicted[:2], 4)
