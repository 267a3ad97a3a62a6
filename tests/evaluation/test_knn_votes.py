"""Nearest neighbours: against NumPy and scikit-learn, leave one out, ties, banks smaller than k, broken input."""

import numpy as np
import pytest
from flax import struct

from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource
from mmjax.errors import MmjaxError
from mmjax.evaluation import knn
from mmjax.evaluation.knn import KNNEvaluation, knn_scores, knn_votes, nearest
from mmjax.training.scores import metrics


@struct.dataclass
class State:
    step: int


def blobs(n, classes, seed, d=7, spread=1.5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(99).standard_normal((classes, d))
    return (centres[labels] + spread * rng.standard_normal((n, d))).astype(np.float32), labels


def brute_votes(bank, labels, queries, k, temperature, classes, leave_one_out=False):
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    votes_by_class = np.zeros((len(queries), classes))
    for i, row in enumerate(queries.astype(np.float64) @ bank.T):
        candidates = [j for j in np.argsort(-row, kind="stable") if not (leave_one_out and j == i)][:k]
        for j in candidates:
            votes_by_class[i, labels[j]] += np.exp(row[j] / temperature)
    return votes_by_class / votes_by_class.sum(1, keepdims=True)


@pytest.mark.parametrize("k", [1, 13, 101, 5000])
@pytest.mark.parametrize("block", [knn.BLOCK, 1000], ids=["one block", "many blocks"])
def test_votes_equal_the_definition(monkeypatch, k, block):
    monkeypatch.setattr(knn, "BLOCK", block)
    bank, labels = blobs(211, 5, 0)
    queries, _ = blobs(37, 5, 1)
    votes = knn_votes(bank, labels, queries, k, 0.07, classes=6)
    np.testing.assert_allclose(votes, brute_votes(bank, labels, queries, k, 0.07, 6), atol=2e-5)
    assert (votes[:, 5] == 0).all()


@pytest.mark.parametrize("k", [3, 10_000])
def test_leave_one_out_excludes_the_query(k):
    bank, labels = blobs(101, 3, 2)
    votes = knn_votes(bank, labels, None, k, 0.1)
    np.testing.assert_allclose(votes, brute_votes(bank, labels, bank, k, 0.1, 3, leave_one_out=True), atol=2e-5)
    alone = knn_votes(np.eye(3, dtype=np.float32), np.array([0, 1, 2]), None, 1)
    assert (alone.argmax(1) != np.arange(3)).all()


def test_accuracy_equals_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, labels = blobs(307, 5, 3)
    queries, truth = blobs(101, 5, 4)
    scores = knn_scores(bank, labels, queries, truth, ks=(5, 20), temperature=0.07)
    for k in (5, 20):
        model = neighbors.KNeighborsClassifier(
            k, weights=lambda distance: np.exp((1 - distance) / 0.07), metric="cosine"
        )
        predicted = model.fit(bank.astype(np.float64), labels).predict(queries.astype(np.float64))
        assert scores[k].value == pytest.approx(100 * np.mean(predicted == truth))
        assert scores[k].n == 101
    assert scores[5].chance == pytest.approx(100 * np.bincount(truth).max() / 101)


def test_temperature_extremes_stay_finite():
    bank, labels = blobs(53, 3, 5)
    queries, _ = blobs(11, 3, 6)
    sharp = knn_votes(bank, labels, -queries, 7, 1e-4)  # every cosine far below 1: exp alone would be 0 everywhere
    _, index = nearest(bank, -queries, 1)
    np.testing.assert_array_equal(sharp.argmax(1), labels[index[:, 0]])
    flat = knn_votes(bank, labels, queries, 53, 1e6)
    np.testing.assert_allclose(flat, np.tile(np.bincount(labels) / 53, (11, 1)), atol=1e-5)


def test_order_of_bank_and_queries_does_not_matter():
    bank, labels = blobs(83, 4, 7)
    queries, _ = blobs(19, 4, 8)
    bank_order, query_order = np.random.default_rng(9).permutation(83), np.random.default_rng(10).permutation(19)
    one, two = (
        knn_votes(bank, labels, queries, 9),
        knn_votes(bank[bank_order], labels[bank_order], queries[query_order], 9),
    )
    np.testing.assert_allclose(two, one[query_order], atol=1e-6)


def test_equal_neighbours_come_in_bank_order_and_one_class_is_certain():
    _, index = nearest(np.ones((7, 3)), np.ones((2, 3)), 4)
    np.testing.assert_array_equal(index, [[0, 1, 2, 3]] * 2)
    score = knn_scores(np.eye(3), np.zeros(3, int), np.eye(3), np.zeros(3, int))[200]
    assert (score.value, score.chance) == (100, 100)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: knn_votes(np.full((3, 2), np.nan), np.arange(3), np.ones((1, 2))), "bank: 6 of 6"),
        (lambda: knn_votes(np.eye(3), np.arange(3), np.ones((1, 2))), "queries"),
        (lambda: knn_votes(np.eye(3), np.arange(2), np.ones((1, 3))), "bank_labels"),
        (lambda: knn_votes(np.eye(3), np.arange(3), np.ones((1, 3)), classes=2), "bank_labels"),
        (lambda: knn_votes(np.eye(3), np.arange(3), np.ones((1, 3)), k=0), "k=0"),
        (lambda: knn_votes(np.eye(3), np.arange(3), np.ones((1, 3)), temperature=0), "temperature"),
        (lambda: knn_votes(np.eye(1), np.arange(1), None), "k=200 neighbours out of 0"),
        (lambda: knn_scores(np.eye(3), np.arange(3), np.eye(3), np.arange(2)), "query_labels"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(MmjaxError, match=named):
        call()


def test_evaluation():
    bank, labels = blobs(101, 3, 11)
    queries, truth = blobs(37, 3, 12)
    traced = []

    def encode(params, state, images):
        traced.append(images.shape)
        return images @ params["kernel"]

    common = {"encode": encode, "train_images": bank, "train_labels": labels, "batch_size": 17}
    made = KNNEvaluation(**common, test_images=queries, test_labels=truth, ks=(3, 20))
    kernel = np.random.default_rng(13).standard_normal((7, 5)).astype(np.float32)
    logged = metrics(made.run({"kernel": kernel}, State(5)))
    expected = knn_scores(bank @ kernel, labels, queries @ kernel, truth, ks=(3, 20))
    assert logged["knn_top1_k3"] == expected[3].value and logged["knn_top1_k20"] == expected[20].value
    assert logged["knn_n"] == 37 and logged["knn_top1_k3_low"] < logged["knn_top1_k3"] < logged["knn_top1_k3_high"]
    made.run({"kernel": kernel * 2}, State(6))
    assert traced == [(17, 7)]
    alone = KNNEvaluation(**common).scores({"kernel": kernel})["knn_top1"]
    assert alone == knn_scores(bank @ kernel, labels, None, None)[200]


def test_evaluation_of_pipelines():
    bank, labels = blobs(53, 3, 14)
    queries, truth = blobs(29, 3, 15)
    encode = lambda params, state, images: images * params  # noqa: E731
    train = Pipeline(ArraySource(image=bank, label=labels), batch_size=7)
    test = Pipeline(ArraySource(image=queries, label=truth), batch_size=7)
    made = KNNEvaluation(encode=encode, train_images=train, test_images=test, ks=(5,), batch_size=11)
    assert made.scores(np.float32(2))["knn_top1"] == knn_scores(bank, labels, queries, truth, ks=(5,))[5]
    with pytest.raises(MmjaxError, match="train_images: an array of images needs labels"):
        KNNEvaluation(encode=encode, train_images=bank).scores(np.float32(2))
    unlabelled = Pipeline(ArraySource(image=bank, name="nameless"), batch_size=7)
    with pytest.raises(MmjaxError, match="nameless has no column 'label'"):
        KNNEvaluation(encode=encode, train_images=unlabelled).scores(np.float32(2))
