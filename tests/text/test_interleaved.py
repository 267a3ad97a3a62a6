"""Texts with images in them: the original's cleaning of spaces, and which tokens are learned."""

import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.text.interleaved import document_labels, document_text, pair_labels, pair_text

I, E, PAD = 90, 91, 0


def test_texts():
    """The string operations of open_flamingo's train/data.py, on the same sentences."""
    sentences = ["First. ", "a hen", " sits.", "The end"]
    marked = [f"<|endofchunk|><image>{text}" if i in (1, 2) else text for i, text in enumerate(sentences)]
    text = " ".join(marked).replace("<|endofchunk|>", "", 1)
    for old in (" <|endofchunk|>", "<image> ", " <image>"):
        text = text.replace(old, old.strip())
    assert document_text(sentences, [1, 2]) == f"{text}<|endofchunk|>"
    assert document_text(["a", "b"], [0]) == "<image>a b<|endofchunk|>"
    assert pair_text(" a hen \n") == "<image>a hen<|endofchunk|>"
    with pytest.raises(MmjaxError, match="a document of 1 sentences has an image before sentence 2"):
        document_text(["a"], [2])


def original_labels(ids, image, end):
    """train_utils.py:101-140, loop for loop."""
    labels = np.where(ids == PAD, -100, ids)
    for row, source in zip(labels, ids):
        token = 0
        while token < len(row) and source[token] != image:
            row[token] = -100
            token += 1
        for start in np.flatnonzero(source == end):
            token = start + 1
            while token < len(row) and source[token] != image:
                row[token] = -100
                token += 1
    labels[ids == image] = -100
    return labels


def test_labels_of_documents_are_the_originals():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.choice([I, E, 1, 2, 3, 4, 5, 6], (3, 17))
        mask = (np.arange(17) < rng.integers(1, 18, 3)[:, None]).astype(np.int32)
        ids = np.where(mask == 1, ids, PAD)
        np.testing.assert_array_equal(document_labels(ids, mask, I, E), original_labels(ids, I, E))


def test_labels_of_pairs():
    ids = np.array([[I, 5, 6, E, PAD]])
    assert pair_labels(ids, np.array([[1, 1, 1, 1, 0]]), I).tolist() == [[-100, 5, 6, E, -100]]
