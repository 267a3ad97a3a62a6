"""Prompt ensembles and class scores: by hand, ties, degenerate classes, the evaluation."""

import numpy as np
import pytest
from flax import struct

from mmjax.errors import MmjaxError
from mmjax.evaluation import classification
from mmjax.evaluation.report import proportion
from mmjax.evaluation.zero_shot import (
    TEMPLATES_7,
    ZeroShotEvaluation,
    class_embeddings,
    prompts,
    zero_shot_logits,
    zero_shot_scores,
)
from mmjax.training.scores import metrics


@struct.dataclass
class State:
    step: int


def test_prompts_of_one_and_of_several_names():
    texts, text_class = prompts(["cat", ("happy", "smiling")], ["a {}.", "the {}"])
    assert texts == ["a cat.", "the cat", "a happy.", "the happy", "a smiling.", "the smiling"]
    np.testing.assert_array_equal(text_class, [0, 0, 1, 1, 1, 1])
    assert len(prompts(["cat", "dog"], TEMPLATES_7)[0]) == 14
    for classes, templates, named in (
        (["cat"], ["no braces"], "templates"),
        ([], ["{}"], "classes"),
        ([()], ["{}"], "classes"),
    ):
        with pytest.raises(MmjaxError, match=named):
            prompts(classes, templates)


def test_class_embeddings_by_hand():
    # Lengths of the texts must not matter: (1, 0) and (0, 1) average to the diagonal whatever their lengths.
    texts = np.array([[5.0, 0.0], [0.0, 0.1], [0.0, -2.0]])
    half = 0.5**0.5
    np.testing.assert_allclose(class_embeddings(texts, [0, 0, 1]), [[half, half], [0, -1]], atol=1e-6)
    np.testing.assert_allclose(class_embeddings(texts[[2, 0, 1]], [1, 0, 0]), [[half, half], [0, -1]], atol=1e-6)
    logits = zero_shot_logits(np.array([[3.0, 3.0], [0.0, -7.0]]), class_embeddings(texts, [0, 0, 1]))
    np.testing.assert_allclose(logits, [[100, -100 * half], [-100 * half, 100]], atol=1e-4)
    for features, text_class, named in (
        (texts, [0, 0, 2], "text_class: 1 of 3 classes have no text"),
        (texts, [0, 0], "text_class"),
        (texts * np.nan, [0, 0, 1], "text_features: 6 of 6"),
    ):
        with pytest.raises(MmjaxError, match=named):
            class_embeddings(features, text_class)


def test_top_k_by_hand():
    logits = np.array([[5, 4, 3, 2], [1, 2, 3, 4], [7, 7, 0, 0], [0, 0, 0, 0], [1, 9, 2, 3]])
    labels = np.array([0, 2, 0, 3, 0])
    np.testing.assert_array_equal(classification.class_ranks(logits, labels), [0, 1, 1, 3, 3])
    top = classification.top_k(logits, labels, (1, 2, 3, 4))
    assert [top[k].value for k in (1, 2, 3)] == [20, 60, 60] and 4 not in top
    assert top[2] == proportion(3, 5, 80.0)
    # Always "class 0" is right 3 times of 5; naming two classes, 4 times.
    assert (top[1].chance, top[2].chance) == (60, 80)
    assert list(classification.top_k(np.zeros((3, 1)), np.zeros(3, int))) == [1]


def test_predictions_class_by_class():
    labels, predicted = np.array([0, 0, 0, 1, 3]), np.array([0, 0, 1, 1, 0])
    accuracy, counts = classification.per_class_accuracy(predicted, labels, 4)
    np.testing.assert_allclose(accuracy, [200 / 3, 100, np.nan, 0])
    np.testing.assert_array_equal(counts, [3, 1, 0, 1])
    mean = classification.mean_per_class(predicted, labels, 4)
    assert (
        mean.value == pytest.approx((200 / 3 + 100 + 0) / 3) and mean.n == 5 and mean.chance == pytest.approx(100 / 3)
    )
    np.testing.assert_array_equal(
        classification.confusion(predicted, labels, 4), [[2, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    )
    assert classification.accuracy(predicted, labels) == proportion(3, 5, 60.0)


def test_intervals_are_those_of_independent_items():
    # 500 items a class, of which 400 and 300 are right.
    labels = np.repeat([0, 1], 500)
    predicted = np.where(np.arange(1000) % 500 < np.repeat([400, 300], 500), labels, 1 - labels)
    half = 100 * 1.96 * np.sqrt(0.8 * 0.2 / 500 + 0.6 * 0.4 / 500) / 2
    mean = classification.mean_per_class(predicted, labels, 2)
    np.testing.assert_allclose([mean.low, mean.high], [70 - half, 70 + half], atol=0.3)
    # Two classes, every logit 0 or 2: losses of log(1 + e^-2) where right and 2 more where wrong.
    logits = 2.0 * np.eye(2)[predicted]
    loss = classification.cross_entropy(logits, labels)
    expected, half = np.log1p(np.exp(-2)) + 0.6, 1.96 * 2 * np.sqrt(0.3 * 0.7 / 1000)
    np.testing.assert_allclose(
        [loss.value, loss.low, loss.high], [expected, expected - half, expected + half], atol=6e-3
    )


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: classification.class_ranks(np.array([[1.0, np.nan]]), np.array([1])), "logits: 1 of 2 are NaN"),
        (lambda: classification.class_ranks(np.ones(3), np.zeros(3, int)), "logits"),
        (lambda: classification.class_ranks(np.ones((3, 2)), np.array([0, 1, 2])), "labels"),
        (lambda: classification.class_ranks(np.ones((3, 2)), np.array([0.0, 1.0, 1.0])), "labels"),
        (lambda: classification.accuracy(np.zeros(0, int), np.zeros(0, int)), "predicted"),
        (lambda: classification.accuracy(np.zeros(2, int), np.zeros(3, int)), "labels"),
        (lambda: classification.confusion(np.array([2]), np.array([1]), 2), "predicted"),
        (lambda: zero_shot_logits(np.ones((2, 3)), np.ones((2, 5))), "embeddings"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(MmjaxError, match=named):
        call()


def test_evaluation():
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((6, 13)).astype(np.float32)
    labels = rng.integers(0, 6, 53)
    images = embeddings[labels] + 1.5 * rng.standard_normal((53, 13)).astype(np.float32)
    texts = np.repeat(embeddings, 2, 0) + 0.1 * rng.standard_normal((12, 13)).astype(np.float32)
    traced = []

    def encode(params, state, inputs):
        traced.append(inputs.shape)
        return inputs * params["scale"]

    made = ZeroShotEvaluation(
        encode_image=encode,
        encode_text=lambda params, state, inputs: inputs["ids"],
        images=images,
        labels=labels,
        texts={"ids": texts},
        text_class=np.repeat(np.arange(6), 2),
        class_names=[f"class {i}" for i in range(6)],
        batch_size=17,
    )
    params = {"scale": np.float32(3)}
    scores = made.scores(params, State(0))
    assert scores["zero_shot_top1"] == zero_shot_scores(images, labels, class_embeddings(texts, np.arange(12) // 2))[1]
    logged = metrics(made.run({"scale": np.float32(5)}, State(1)))
    assert logged["zero_shot_top1"] == scores["zero_shot_top1"].value and logged["zero_shot_n"] == 53
    assert logged["zero_shot_top1"] < logged["zero_shot_top5"] <= 100
    normal = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    guess = np.argmax(normal(images) @ normal(normal(texts).reshape(6, 2, 13).mean(1)).T, 1)
    assert logged["zero_shot_top1"] == pytest.approx(100 * np.mean(guess == labels))
    each = [np.mean(guess[labels == c] == c) for c in range(6)]
    assert logged["zero_shot_mean_per_class"] == pytest.approx(100 * np.mean(each))
    assert logged["zero_shot_confusion"].dtype == np.uint8
    assert traced == [(17, 13)]
