"""Grounding by boxes: against torch's resize, a transcription of the original's loop, and by hand."""

import dataclasses

import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.evaluation.grounding import (
    GroundingEvaluation,
    Referred,
    box_scores,
    chosen_boxes,
    grounding_scores,
    intersection_over_union,
    pointing_scores,
)
from mmjax.training.scores import metrics


def boxes(rng, k, height, width):
    corner = rng.uniform(0, 0.8, (k, 2)) * (width, height)
    return np.concatenate([corner, rng.uniform(1.5, 60, (k, 2))], 1)  # some reach beyond the image


@pytest.mark.torch
@pytest.mark.parametrize("size", [(97, 131), (24, 24), (13, 11), (384, 200)])
def test_scores_equal_a_resize_by_torch(size):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(size[0])
    heat, proposed = rng.standard_normal((24, 24)), boxes(rng, 17, *size)
    resized = torch.nn.functional.interpolate(torch.tensor(heat)[None, None], size=size, mode="bicubic")[0, 0].numpy()
    expected = [resized[int(y) : int(y + h), int(x) : int(x + w)].sum() / (w * h) ** 0.5 for x, y, w, h in proposed]
    predicted = box_scores(heat, size, proposed)
    np.testing.assert_allclose(predicted, expected, atol=1e-6 * np.abs(expected).max())


def test_a_flat_map_gives_each_box_its_pixels():
    predicted = box_scores(np.full((5, 7), 2.0), (30, 40), np.array([[3, 4, 10, 5], [0.9, 0.2, 4, 4], [35, 0, 10, 30]]))
    np.testing.assert_allclose(predicted, 2 * np.array([50 / 50**0.5, 4 * 4 / 4, 5 * 30 / 300**0.5]), rtol=1e-6)
    assert box_scores(np.ones((2, 2)), (8, 8), np.zeros((0, 4))).shape == (0,)


def test_intersection_over_union_by_hand():
    assert intersection_over_union((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert intersection_over_union((0, 0, 10, 10), (5, 0, 10, 10)) == pytest.approx(50 / 150)
    assert intersection_over_union((0, 0, 10, 10), (0, 0, 10, 5)) == 0.5
    # One line of pixels in common counts for nothing, two count for two.
    assert intersection_over_union((0, 0, 10, 10), (9, 0, 10, 10)) == 0
    assert intersection_over_union((0, 0, 10, 10), (8, 0, 10, 10)) == pytest.approx(20 / 180)
    assert intersection_over_union((0, 0, 3, 3), (50, 50, 3, 3)) == 0


def expression(box, proposals, split="val", image=0, size=(40, 40)):
    return Referred(box, np.array(proposals, float).reshape(-1, 4), size, split, image)


def test_the_box_is_the_one_with_the_most_heat_for_its_size():
    heat = np.zeros((8, 8))
    heat[:4, 4:] = 1  # the upper right quarter
    quarter, half, all = (20, 0, 20, 20), (20, 0, 20, 40), (0, 0, 40, 40)
    [predicted], reused = chosen_boxes([heat], [expression(quarter, [all, half, quarter])])
    assert predicted == quarter and reused == 0
    # By hand, away from the edges of the map: 400 / 20 against 400 / 800^.5 and 400 / 40.
    np.testing.assert_allclose(box_scores(heat, (40, 40), [quarter, half, all])[1:], [400 / 800**0.5, 10], rtol=0.02)
    # The first of equals stays.
    [predicted], _ = chosen_boxes([np.ones((4, 4))], [expression(quarter, [(0, 0, 20, 20), (20, 20, 20, 20)])])
    assert predicted == (0, 0, 20, 20)


def test_the_previous_box_is_reused_where_no_score_is_positive():
    hot, cold = np.ones((4, 4)), -np.ones((4, 4))
    expressions = [expression((0, 0, 9, 9), [(0, 0, 9, 9)]), expression((5, 5, 9, 9), [(5, 5, 9, 9)])]
    assert chosen_boxes([hot, cold], expressions) == ([(0, 0, 9, 9), (0, 0, 9, 9)], 1)
    assert chosen_boxes([cold, hot], expressions) == ([None, (5, 5, 9, 9)], 1)
    assert chosen_boxes([0 * hot, hot], [expression((0, 0, 9, 9), []), expressions[1]]) == ([None, (5, 5, 9, 9)], 1)
    scores, reused = grounding_scores([cold, hot], expressions)
    assert scores["val"].value == 50 and reused == 1


def transcribed(heats, expressions):
    """The original's loop on maps as large as their images, which no resize changes."""
    right, count, before = {}, {}, None
    for heat, one in zip(heats, expressions):
        most = 0
        for x, y, w, h in one.proposals:
            score = heat[int(y) : int(y + h), int(x) : int(x + w)].sum() / (w * h) ** 0.5
            if score > most:
                before, most = (x, y, w, h), score
        a, b = one.box, before
        wide = min(a[0] + a[2] - 1, b[0] + b[2] - 1) - max(a[0], b[0])
        high = min(a[1] + a[3] - 1, b[1] + b[3] - 1) - max(a[1], b[1])
        overlap = (wide + 1) * (high + 1) if wide > 0 and high > 0 else 0
        hit = overlap / (a[2] * a[3] + b[2] * b[3] - overlap) >= 0.5
        right[one.split], count[one.split] = right.get(one.split, 0) + hit, count.get(one.split, 0) + 1
    return {split: 100 * right[split] / count[split] for split in count}


def test_equals_a_transcription_on_random_maps():
    rng = np.random.default_rng(0)
    expressions, heats = [], []
    for i in range(90):
        proposed = boxes(rng, 4, 40, 40)
        shifted = proposed[rng.integers(4)] + rng.uniform(-3, 3, 4).clip(min=-1)
        expressions.append(expression(tuple(shifted), proposed, ("val", "testA", "testB")[i % 3], i // 5))
        heats.append(rng.standard_normal((40, 40)) + (0 if i else 3))  # sums below zero: some boxes are the one before
    scores, reused = grounding_scores(np.array(heats), expressions)
    assert {split: score.value for split, score in scores.items()} == pytest.approx(transcribed(heats, expressions))
    assert 0 < reused < 45 and all(10 < score.value < 90 and score.n == 30 for score in scores.values())
    assert all(score.low < score.value < score.high and 10 < score.chance < 60 for score in scores.values())


def test_bad_input_is_named():
    expressions = [expression((0, 0, 9, 9), [(0, 0, 9, 9)])]
    with pytest.raises(MmjaxError, match="2 maps for 1 expressions"):
        grounding_scores(np.ones((2, 4, 4)), expressions)
    with pytest.raises(MmjaxError, match="heats: 16 of 16"):
        grounding_scores(np.full((1, 4, 4), np.nan), expressions)
    with pytest.raises(MmjaxError, match=r"boxes: \[1.0, 1.0, 0.0, 4.0\] has no area"):
        box_scores(np.ones((4, 4)), (8, 8), np.array([[1.0, 1, 0, 4]]))
    with pytest.raises(MmjaxError, match=r"heat \[16\] and boxes \[4\]"):
        box_scores(np.ones(16), (8, 8), np.ones(4))


def test_the_maximum_of_a_map_points_into_a_box_or_not():
    """Of a 4 x 4 map over 40 pixels: the centre of cell (row 1, column 2) is (25, 15)."""
    hot = np.zeros((4, 4))
    hot[1, 2] = 1
    around, left_of, below = (20, 10, 10, 10), (5, 10, 20, 10), (20, 15.5, 10, 10)
    expressions = [expression(box, [], "val", i) for i, box in enumerate((around, left_of, below, (25, 15, 1, 1)))]
    score = pointing_scores([hot] * 4, expressions)["val"]
    assert score.value == 50 and score.n == 4
    assert score.chance == pytest.approx(100 * (100 + 200 + 100 + 1) / 4 / 1600)
    with pytest.raises(MmjaxError, match="1 maps for 4 expressions"):
        pointing_scores([hot], expressions)


def test_evaluation():
    class State:
        step = 1

    expressions = [
        expression((0, 0, 9, 9), [(0, 0, 9, 9)], "testA"),
        expression((5, 5, 9, 9), [(30, 5, 9, 9)], "testB"),
    ]
    evaluation = GroundingEvaluation(heats=lambda params, state: params, expressions=expressions)
    logged = metrics(evaluation.run(np.ones((2, 4, 4)), State))
    assert (
        logged["grounding_testA"] == 100 and logged["grounding_testB"] == 0 and logged["grounding_testA_chance"] == 100
    )
    assert logged["grounding_n"] == 2 and logged["grounding_reused"] == 0
    assert "grounding_pointing_testA" not in logged
    pointing = dataclasses.replace(evaluation, pointing=True)
    assert metrics(pointing.run(np.ones((2, 4, 4)), State))["grounding_pointing_testA"] == 100
