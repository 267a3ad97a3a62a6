"""Instance retrieval: against the definition, ties, one view too few, and in a run."""

import itertools
from typing import Any

import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.evaluation.instances import InstanceRetrievalEvaluation, instance_ranks, instance_scores


def views(n: int = 40, noise: float = 1.0) -> dict[str, np.ndarray]:
    """The same n items with noise of their own in each of three views."""
    rng = np.random.default_rng(0)
    items = rng.standard_normal((n, 6))
    return {name: (items + noise * rng.standard_normal(items.shape)).astype(np.float32) for name in "abc"}


def test_scores_equal_the_definition():
    features = views()
    unit = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in features.items()}
    expected = []
    for first, second in itertools.permutations("abc", 2):
        cosines = unit[first] @ unit[second].T
        expected.append([int((row >= row[i]).sum()) - 1 for i, row in enumerate(cosines)])
    ranks = instance_ranks(features)
    np.testing.assert_array_equal(ranks, expected)
    scores = instance_scores(features, ks=(1, 5))
    for k in (1, 5):
        score = scores[f"R@{k}"]
        assert score.value == pytest.approx(100 * np.mean(np.array(expected) < k))
        assert score.chance == 100 * k / 40 and score.low is not None and score.high is not None
        assert score.low < score.value < score.high


def test_equal_views_are_found_and_a_constant_encoder_finds_nothing():
    x = views()["a"]
    assert instance_scores({"a": x, "b": x, "c": x})["R@1"].value == 100
    constant = np.ones_like(x)
    assert instance_scores({"a": constant, "b": constant})["R@5"].value == 0


def test_an_encoder_is_evaluated_under_its_name():
    images = {name: x[:, None] for name, x in views(n=7).items()}

    def encode(params: Any, state: Any, x: Any) -> Any:
        return x[:, 0] @ params["kernel"]

    evaluation = InstanceRetrievalEvaluation(name="drawings", encode=encode, views=images, ks=(2,), batch_size=4)
    outputs = evaluation.run({"kernel": np.eye(6, dtype=np.float32)}, None)
    assert outputs["drawings_n"] == 7
    assert outputs["drawings_R@2"].value == instance_scores(views(n=7), ks=(2,))["R@2"].value
    assert set(outputs) == {"drawings_n", "drawings_R@2"}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"a": np.ones((3, 2))}, "at least two"),
        ({"a": np.ones((3, 2)), "b": np.ones((4, 2))}, r"a has features \[3, 2\], b \[4, 2\]"),
        ({"a": np.ones((3, 2)), "b": np.full((3, 2), np.nan)}, "not finite"),
    ],
)
def test_broken_views_are_refused(broken, message):
    with pytest.raises(MmjaxError, match=message):
        instance_scores(broken)
