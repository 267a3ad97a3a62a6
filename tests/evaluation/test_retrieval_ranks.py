"""Ranks and recalls: by hand, against an exhaustive sort, ties, permutations, broken input."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from mmjax.data.decoding import BadRecord
from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource
from mmjax.errors import MmjaxError
from mmjax.evaluation import retrieval
from mmjax.evaluation.retrieval import RetrievalEvaluation, ranks_of_features, ranks_of_scores, top_candidates
from mmjax.training.scores import metrics


@struct.dataclass
class State:
    step: int


def features(n, d, seed):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def sorted_ranks(scores, matching):
    """The best position of a matching candidate in each row's full order, others first among equals."""
    ranks = []
    for row, right in zip(scores, matching):
        order = sorted(range(len(row)), key=lambda j: (-row[j], right[j]))
        positions = [position for position, j in enumerate(order) if right[j]]
        ranks.append(positions[0])
    return np.array(ranks)


def test_values_by_hand():
    # Three images, five captions: image 0 has two, image 1 one, image 2 two.
    scores = [[9, 1, 8, 2, 3], [7, 6, 5, 8, 1], [4, 9, 8, 3, 2]]
    ranks = ranks_of_scores(np.array(scores), [0, 0, 1, 2, 2])
    np.testing.assert_array_equal(ranks.image, [0, 3, 3])
    np.testing.assert_array_equal(ranks.text, [0, 2, 2, 1, 1])
    results = ranks.scores(ks=(1, 3))
    assert results["image_to_text_R@1"].value == pytest.approx(100 / 3)
    assert results["text_to_image_R@1"].value == pytest.approx(20)
    assert results["text_to_image_R@3"].value == pytest.approx(100)
    assert (results["image_to_text_R@1"].n, results["text_to_image_R@1"].n) == (3, 5)
    assert results["image_to_text_median_rank"].value == 4 and results["text_to_image_median_rank"].value == 2
    # A random order of 5 texts has one of 2 (1, 2) first with chance 2/5 (1/5, 2/5).
    assert results["image_to_text_R@1"].chance == pytest.approx(100 * (0.4 + 0.2 + 0.4) / 3)
    # ... among the first three: 1 - C(3, 3)/C(5, 3) = 0.9 of two captions, 0.6 of one.
    assert results["image_to_text_R@3"].chance == pytest.approx(100 * (0.9 + 0.6 + 0.9) / 3)
    assert results["text_to_image_R@1"].chance == pytest.approx(100 / 3)


@pytest.mark.parametrize("block", [retrieval.BLOCK, 100], ids=["one block", "many blocks"])
def test_equals_an_exhaustive_sort(monkeypatch, block):
    monkeypatch.setattr(retrieval, "BLOCK", block)
    images, texts = features(17, 7, 0), features(43, 7, 1)
    owner = np.concatenate([np.arange(17), np.random.default_rng(2).integers(0, 17, 26)])
    ranks = ranks_of_features(images * 5, texts, owner)
    cosine = images @ texts.T / np.linalg.norm(images, axis=1)[:, None] / np.linalg.norm(texts, axis=1)
    matching = owner[None] == np.arange(17)[:, None]
    np.testing.assert_array_equal(ranks.image, sorted_ranks(cosine, matching))
    np.testing.assert_array_equal(ranks.text, sorted_ranks(cosine.T, matching.T))
    again = ranks_of_scores(cosine, owner)
    np.testing.assert_array_equal(again.image, ranks.image)
    np.testing.assert_array_equal(again.text, ranks.text)


def test_ties_rank_before_the_matching_candidate():
    ranks = ranks_of_features(np.ones((11, 3)), np.ones((23, 3)), np.arange(23) % 11)
    # Of 23 texts, image 0 owns three (0, 11, 22), the others two.
    np.testing.assert_array_equal(ranks.image, [20] + [21] * 10)
    np.testing.assert_array_equal(ranks.text, [10] * 23)
    scores = np.full((3, 3), -100.0)
    scores[:, 0] = [5, 4, 3]  # a shortlist of one: the rest ties at -100
    np.testing.assert_array_equal(ranks_of_scores(scores).image, [0, 2, 2])


def test_directions_may_have_separate_scores():
    forward, backward = np.array([[2.0, 1.0], [2.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    ranks = ranks_of_scores(forward, text_image_scores=backward)
    np.testing.assert_array_equal(ranks.image, [0, 1])
    np.testing.assert_array_equal(ranks.text, [0, 0])


def test_does_not_depend_on_the_order_of_items():
    images, texts = features(13, 5, 3), features(29, 5, 4)
    owner = np.concatenate([np.arange(13), np.arange(13), np.array([0, 4, 9])])
    new_images, new_texts = np.random.default_rng(5).permutation(13), np.random.default_rng(6).permutation(29)
    new_positions = np.argsort(new_images)
    one = ranks_of_features(images, texts, owner)
    two = ranks_of_features(images[new_images], texts[new_texts], new_positions[owner[new_texts]])
    np.testing.assert_array_equal(two.image, one.image[new_images])
    np.testing.assert_array_equal(two.text, one.text[new_texts])
    assert one.scores() == two.scores()


def test_random_features_get_chance():
    images, texts = features(997, 11, 7), features(1994, 11, 8)
    results = ranks_of_features(images, texts, np.arange(1994) % 997).scores(ks=(10, 100))
    for name in ("image_to_text_R@100", "text_to_image_R@100", "image_to_text_R@10", "text_to_image_R@10"):
        score = results[name]
        assert abs(score.value - score.chance) < 4 * (score.chance * (100 - score.chance) / 997) ** 0.5
        assert score.low < score.value < score.high


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((np.zeros((0, 3)), np.ones((2, 3)), [0, 0]), "image_features"),
        ((np.ones((2, 3)), np.ones((2, 5)), None), "text_features"),
        ((np.full((2, 3), np.nan), np.ones((2, 3)), None), "image_features: 6 of 6"),
        ((np.ones((2, 3)), np.array([[1, 2, np.inf], [0, 0, 1]]), None), "text_features: 1 of 6"),
        ((np.ones((2, 3)), np.ones((4, 3)), None), "text_image"),
        ((np.ones((2, 3)), np.ones((4, 3)), [0, 1, 2, 0]), "text_image"),
        ((np.ones((2, 3)), np.ones((4, 3)), [0, 0, 0, 0]), "1 of 2 images have no text"),
        ((np.ones((2, 3)), np.ones((4, 3)), [0.0, 1.0, 0.0, 1.0]), "text_image"),
    ],
)
def test_bad_input_is_named(arguments, named):
    with pytest.raises(MmjaxError, match=named):
        ranks_of_features(*arguments)


def test_scores_are_checked():
    with pytest.raises(MmjaxError, match="image_text_scores"):
        ranks_of_scores(np.array([[1.0, np.nan], [0.0, 1.0]]))
    with pytest.raises(MmjaxError, match=r"text_image_scores: need \[2, 2\]"):
        ranks_of_scores(np.eye(2), text_image_scores=np.ones((2, 3)))


def test_top_candidates_are_the_nearest():
    queries, candidates = features(3, 5, 9), features(19, 5, 10)
    cosine = queries @ candidates.T / np.linalg.norm(candidates, axis=1)
    np.testing.assert_array_equal(top_candidates(queries, candidates, 4), np.argsort(-cosine, 1)[:, :4])
    assert top_candidates(queries, candidates[:2], 5).shape == (3, 2)


def evaluation(**fields):
    """Images are one-hot bytes, texts one-hot floats; parameters turn one into the other."""
    calls = []

    def encode_image(params, state, images):
        calls.append(images.shape)
        return images.reshape(len(images), -1).astype(jnp.float32) @ params["image"]

    images = np.zeros((7, 2, 2, 3), np.uint8)
    images.reshape(7, -1)[np.arange(7), np.arange(7)] = 255
    texts = {"ids": np.tile(np.eye(12, dtype=np.float32)[:7], (2, 1))}
    made = RetrievalEvaluation(
        encode_image=encode_image,
        encode_text=lambda params, state, texts: texts["ids"],
        images=images,
        texts=texts,
        text_image=np.tile(np.arange(7), 2),
        batch_size=3,
        **fields,
    )
    return made, calls


def test_evaluation_in_the_loop_and_at_its_end():
    made, calls = evaluation(captions=[f"text {i}" for i in range(14)], attribution="By nobody", final_step=20)
    shifted = np.roll(np.eye(12, dtype=np.float32), 1, axis=0)
    early = metrics(made.run({"image": shifted}, State(10)))
    assert early["image_to_text_R@1"] == 0 and early["retrieval_n"] == 7 and early["retrieval_n_texts"] == 14
    assert early["image_to_text_R@1_low"] == pytest.approx(0, abs=1e-9)
    assert early["image_to_text_R@1_high"] > 30 and "retrieval_picture" not in early
    late = metrics(made.run({"image": np.eye(12, dtype=np.float32)}, State(20)))
    assert late["image_to_text_R@1"] == late["text_to_image_R@1"] == 100
    assert late["text_to_image_R@1_chance"] == pytest.approx(100 / 7)
    # All right out of seven: Wilson's interval, not one without width.
    assert late["image_to_text_R@1_low"] == pytest.approx(100 / (1 + 1.959964**2 / 7), abs=1e-3)
    assert late["image_to_text_R@1_high"] == pytest.approx(100)
    picture = late["retrieval_picture"]
    assert picture.dtype == np.uint8 and picture.ndim == 3
    assert calls == [(3, 2, 2, 3)]  # traced once, for both parameters and every batch


def test_scores_and_a_second_data_set():
    made, _ = evaluation(name="zoo")
    params = {"image": np.eye(12, dtype=np.float32)}
    scores = made.scores(params)
    assert scores["zoo_image_to_text_R@5"].n == 7 and scores["zoo_text_to_image_R@5"].value == 100
    assert "zoo_n" in made.run(params, State(1))
    np.testing.assert_array_equal(made.ranks(params).text, np.zeros(14))


def test_a_broken_encoder_is_refused():
    made, _ = evaluation()
    with pytest.raises(MmjaxError, match="images: 84 of 84"):
        made.scores({"image": np.full((12, 12), np.nan, np.float32)})


class Damaged(ArraySource):
    def __getitem__(self, index):
        if index == 3:
            raise BadRecord("image: truncated", "3.png")
        return super().__getitem__(index)


def test_unreadable_images_are_dropped_with_their_texts():
    images, texts, owner = features(7, 5, 11), features(17, 5, 12), np.arange(17) % 7
    pipeline = Pipeline(Damaged(image=images), batch_size=2, max_bad_fraction=0.5)
    made = RetrievalEvaluation(
        encode_image=lambda params, state, x: x * params,
        encode_text=lambda params, state, x: x,
        images=pipeline,
        texts=texts,
        text_image=owner,
    )
    readable = owner != 3
    expected = ranks_of_features(np.delete(images, 3, 0), texts[readable], owner[readable] - (owner[readable] > 3))
    ranks = made.ranks(np.float32(2))
    np.testing.assert_array_equal(ranks.image, expected.image)
    np.testing.assert_array_equal(ranks.text, expected.text)
    results = made.run(np.float32(2), State(1))
    assert (results["retrieval_n"], results["retrieval_n_texts"], results["retrieval_unreadable"]) == (6, 15, 1)
