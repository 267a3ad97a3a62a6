"""Two-stage retrieval, against a transcription of the originals' loop and evaluation; compilations; the evaluation."""

import dataclasses
import io

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mmjax.errors import MmjaxError
from mmjax.evaluation.rerank import FILL, Reranker, RerankEvaluation
from mmjax.evaluation.retrieval import ranks_of_scores
from mmjax.training.scores import metrics

N, M = 23, 61
OWNER = np.concatenate([np.arange(N), np.random.default_rng(9).integers(0, N, M - N)])


class State:
    step = 3


def problem(seed):
    """Similarities, and a head's scores of every pair: matching ones are slightly higher in both."""
    rng = np.random.default_rng(seed)
    right = (OWNER[None] == np.arange(N)[:, None]).astype(np.float32)
    near = np.tanh(rng.standard_normal((N, M)) / 3 + right / 2).astype(np.float32)
    return near, (rng.standard_normal((N, M)) + right).astype(np.float32)


def head(calls):
    def match(params, known, pairs):
        calls.append((pairs["image"].shape, pairs["texts"].shape))
        return known[pairs["image"][:, None], pairs["texts"]] * params

    return match


def transcribed(near, head, k, add):
    """The score matrices: row by row the k nearest get the head's score, everything else -100."""
    matrices = []
    for similarities, scores in ((near, head), (near.T, head.T)):
        filled = np.full(similarities.shape, -100.0, np.float32)
        for row in range(len(filled)):
            top = np.argsort(-similarities[row], kind="stable")[:k]
            filled[row, top] = scores[row, top] + (similarities[row, top] if add else 0)
        matrices.append(filled)
    return matrices


def itm_eval(image_text, text_image, owner):
    """Recalls as the originals compute them: positions in the sorted rows, the best of an image's texts."""
    best, text_ranks = [], []
    for image, row in enumerate(image_text):
        order = np.argsort(row)[::-1].tolist()
        best.append(min(order.index(text) for text in np.flatnonzero(owner == image)))
    for text, row in enumerate(text_image):
        text_ranks.append(np.argsort(row)[::-1].tolist().index(owner[text]))
    recalls = [[100 * np.mean(np.array(ranks) < k) for k in (1, 5, 10)] for ranks in (best, text_ranks)]
    return [
        *recalls[0],
        *recalls[1],
        np.mean(recalls[0]),
        np.mean(recalls[1]),
        (np.mean(recalls[0]) + np.mean(recalls[1])) / 2,
    ]


@pytest.mark.parametrize("add", [False, True], ids=["ALBEF", "BLIP"])
@pytest.mark.parametrize(("k", "texts", "batch"), [(10, 4, 3), (17, 1, 7), (13, 50, 2), (61, 8, 5), (500, 61, 23)])
def test_equals_the_originals_loop(k, texts, batch, add):
    near, scores = problem(k)
    calls: list = []
    rerank = Reranker(head(calls), k, add, texts, batch)
    shortlists = rerank(np.float32(1), scores, near, OWNER)
    forward, backward = transcribed(near, scores, k, add)
    np.testing.assert_allclose(shortlists.matrices()[0], forward, rtol=1e-6)
    np.testing.assert_allclose(shortlists.matrices()[1], backward, rtol=1e-6)
    ranks = shortlists.ranks()
    expected = ranks_of_scores(forward, OWNER, backward)
    np.testing.assert_array_equal(ranks.image, expected.image)
    np.testing.assert_array_equal(ranks.text, expected.text)
    results = ranks.scores() | ranks.mean_recalls()
    names = [f"{way}_R@{at}" for way in ("image_to_text", "text_to_image") for at in (1, 5, 10)]
    names += ["image_to_text_R_mean", "text_to_image_R_mean", "R_mean"]
    assert [results[name].value for name in names] == pytest.approx(itm_eval(forward, backward, OWNER))
    rerank(np.float32(2), scores, near, OWNER)
    assert calls == [((batch,), (batch, texts))]  # one shape, traced once


def test_each_pair_is_scored_once():
    near, scores = problem(1)
    batches: list = []
    rerank = Reranker(head([]), 11, False, texts=4, batch_size=1)
    extract = rerank.scorer._extractor

    def spy(params, known, groups, *rest):
        batches.append(groups)
        return extract(params, known, groups, *rest)

    rerank.scorer.__dict__["_extractor"] = spy
    shortlists = rerank(np.float32(1), scores, near, OWNER)
    pairs = {(image, text) for image, row in enumerate(shortlists.texts) for text in row}
    pairs |= {(image, text) for text, row in enumerate(shortlists.images) for image in row}
    groups = batches[0]
    distinct = [(image, text) for image, row in zip(groups["image"], groups["texts"]) for text in dict.fromkeys(row)]
    assert sorted(distinct) == sorted(pairs)
    assert len(groups["image"]) == sum(-(-sum(image == i for i, _ in pairs) // 4) for image in range(N))


def test_a_shortlist_without_the_matching_text():
    """Two images, two texts each; the nearest text of the first is the other's, and its list is one long."""
    near = np.array([[0.1, 0.2, 0.9, 0.3], [0.0, 0.1, 0.8, 0.2]])
    shortlists = Reranker(head([]), 1, False)(np.float32(1), np.arange(8.0).reshape(2, 4), near, [0, 0, 1, 1])
    assert shortlists.texts.tolist() == [[2], [2]] and shortlists.text_scores.tolist() == [[2], [6]]
    assert shortlists.matrices()[0].tolist() == [[FILL, FILL, 2, FILL], [FILL, FILL, 6, FILL]]
    ranks = shortlists.ranks()
    assert ranks.image.tolist() == [2, 0] and ranks.text.tolist() == [0, 0, 1, 1]


def test_does_not_depend_on_the_order_of_items():
    near, scores = problem(2)
    images, texts = np.random.default_rng(5).permutation(N), np.random.default_rng(6).permutation(M)
    rerank = Reranker(head([]), 12, True, 5, 3)
    one = rerank(np.float32(1), scores, near, OWNER).ranks()
    turned = near[images][:, texts], scores[images][:, texts], np.argsort(images)[OWNER[texts]]
    two = rerank(np.float32(1), turned[1], turned[0], turned[2]).ranks()
    np.testing.assert_array_equal(two.image, one.image[images])
    np.testing.assert_array_equal(two.text, one.text[texts])
    assert one.mean_recalls() == two.mean_recalls()


def test_means_by_hand():
    ranks = ranks_of_scores(np.array([[9, 1, 8, 2, 3], [7, 6, 5, 8, 1], [4, 9, 8, 3, 2]]), [0, 0, 1, 2, 2])
    results = ranks.mean_recalls((1, 3))  # image ranks 0, 3, 3; text ranks 0, 2, 2, 1, 1
    assert results["image_to_text_R_mean"].value == pytest.approx(100 / 3)
    assert results["text_to_image_R_mean"].value == pytest.approx(60)
    assert results["R_mean"].value == pytest.approx((100 / 3 + 60) / 2)
    assert results["R_mean"].low < results["R_mean"].value < results["R_mean"].high


def test_progress_is_shown_on_a_terminal_only():
    near, scores = problem(3)
    rerank, shown = Reranker(head([]), 10, False, 4, 4), []
    for terminal in (True, False):
        file = io.StringIO()
        shortlists = rerank(np.float32(1), scores, near, OWNER, Console(file=file, force_terminal=terminal, width=80))
        shown.append(file.getvalue())
    assert "matching" in shown[0] and shown[1] == "" and shortlists.texts.shape == (N, 10)
    results: list = []
    rerank.scorer._extractor(
        np.float32(1), scores, {"image": np.zeros(11, int), "texts": np.zeros((11, 4), int)}, "x", results.append
    )
    assert results == [4, 4, 3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": 0}, "k=0"),
        ({"near": np.zeros((2, 3, 4))}, "similarities: need"),
        ({"near": np.full((N, M), np.nan)}, "similarities: 1403 of 1403"),
        ({"owner": None}, "text_image"),
        ({"params": np.float32(np.inf)}, "match: "),
        ({"match": lambda params, known, pairs: jnp.zeros(len(pairs["image"]))}, "match: should return scores"),
    ],
)
def test_bad_input_is_named(change, named):
    near, scores = problem(4)
    inputs = {"k": 10, "near": near, "owner": OWNER, "params": np.float32(1), "match": head([])} | change
    with pytest.raises(MmjaxError, match=named):
        Reranker(inputs["match"], inputs["k"], True)(inputs["params"], scores, inputs["near"], inputs["owner"])


def test_evaluation_in_the_loop():
    near, scores = problem(5)
    right = OWNER[None] == np.arange(N)[:, None]
    made = RerankEvaluation(
        reranker=Reranker(head([]), 60, False, 8, 4),
        first=lambda params, state: (near, np.where(right, 5.0, 0.0) + scores * 1e-3),
        text_image=OWNER,
        captions=[f"text {i}" for i in range(M)],
        thumbnails=np.zeros((N, 3, 3, 3), np.uint8),
        final_step=4,
    )
    early = metrics(made.run(np.float32(1), State))
    lists = made.shortlists(np.float32(1))
    expected = np.mean([(OWNER[row] == image).any() for image, row in enumerate(lists.texts)])
    assert early["image_to_text_R@1"] == pytest.approx(100 * expected) and early["retrieval_n_texts"] == M
    assert early["R_mean"] > 95 and "retrieval_picture" not in early
    worse = metrics(made.run(np.float32(-1), State))
    assert worse["R_mean"] < 5
    # The sum beside the head's scores, from one pass of the head: as a reranker that adds the similarities.
    both = metrics(dataclasses.replace(made, sum_name="sum").run(np.float32(-1), State))
    adding = dataclasses.replace(made, name="sum", reranker=dataclasses.replace(made.reranker, add_similarity=True))
    expected = metrics(adding.run(np.float32(-1), State))
    sums = {name: value for name, value in both.items() if name.startswith("sum_")}
    assert both == worse | sums and sums["sum_matching_gap"] != worse["matching_gap"]
    assert sums.items() <= expected.items() and len(sums) > 8
    assert made.evaluate(np.float32(1), None).pictures["retrieval_picture"].dtype == np.uint8


def test_the_auc_and_the_gap_are_those_of_the_lists():
    near, scores = problem(4)
    reranker = Reranker(head([]), k=6, add_similarity=False)
    shortlists = reranker(jnp.float32(1), jnp.asarray(scores), near, OWNER)
    shares, gaps = [], []
    for direction, (similarities, values) in enumerate(((near, scores), (near.T, scores.T))):
        for query, row in enumerate(similarities):
            listed = np.argsort(-row, kind="stable")[:6]
            match = OWNER[listed] == query if direction == 0 else listed == OWNER[query]
            if match.any() and not match.all():
                best, others = values[query, listed[match]].max(), values[query, listed[~match]]
                shares.append(np.mean(others < best))
                gaps.append(best - others.mean())
    outputs = shortlists.matching()
    assert len(gaps) > 20 and outputs["matching_auc"].n == outputs["matching_gap"].n == len(gaps)
    assert outputs["matching_auc"].value == pytest.approx(100 * np.mean(shares))
    assert outputs["matching_gap"].value == pytest.approx(np.mean(gaps), rel=1e-5)
    constant = reranker(jnp.float32(0), jnp.asarray(scores), near, OWNER).matching()
    assert (constant["matching_auc"].value, constant["matching_gap"].value) == (50, 0)
    assert Reranker(head([]), 1, False)(jnp.float32(1), jnp.ones((2, 2)), np.eye(2)).matching() == {}
