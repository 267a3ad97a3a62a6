"""Entities from tags by conlleval's rules, their scores, and the lexicon baseline."""

import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.evaluation.entities import entities, entity_counts, f1, lexicon_tags, tag_scores
from mmjax.text.tagged_words import TaggedWords


@pytest.mark.parametrize(
    "tags, expected",
    [
        ("O B-PER I-PER O B-PER", [("PER", 1, 2), ("PER", 4, 4)]),
        ("I-PER I-PER B-PER I-ORG", [("PER", 0, 1), ("PER", 2, 2), ("ORG", 3, 3)]),  # IOB1
        ("B-PER B-PER I-LOC", [("PER", 0, 0), ("PER", 1, 1), ("LOC", 2, 2)]),
        ("B-PER E-PER I-PER S-PER E-PER", [("PER", 0, 1), ("PER", 2, 2), ("PER", 3, 3), ("PER", 4, 4)]),  # IOBES
        ("NOUN NOUN VERB O VERB", [("NOUN", 0, 1), ("VERB", 2, 2), ("VERB", 4, 4)]),
        ("O O", []),
    ],
)
def test_entities_of_tags(tags, expected):
    assert entities(tags.split()) == expected


def test_scores_by_hand():
    expected = [["B-A", "I-A", "O", "B-B"], ["O", "O", "B-A"], ["O", "B-B"]]
    predicted = [["B-A", "O", "O", "B-B"], ["O", "O", "B-A"], ["B-B", "B-B"]]
    assert [entity_counts(*pair) for pair in zip(predicted, expected)] == [(1, 2, 2), (1, 1, 1), (1, 2, 1)]
    scores = tag_scores(predicted, expected, ["x", "y", "y"], guess=[["O"] * len(tags) for tags in expected])
    assert scores["f1"].value == pytest.approx(200 * 3 / (5 + 4)) and scores["f1"].n == 4
    assert scores["precision"].value == pytest.approx(60) and scores["recall"].value == pytest.approx(75)
    assert scores["accuracy"].value == pytest.approx(100 * 7 / 9) and scores["accuracy"].chance == pytest.approx(
        400 / 9
    )
    assert scores["f1"].chance == 0 and scores["precision"].chance is None
    # Two groups: the resampled F1 is that of x alone, of y alone or of both.
    assert scores["f1"].low == pytest.approx(50) and scores["f1"].high == pytest.approx(80)
    assert f1(np.zeros(3)) == 0
    with pytest.raises(MmjaxError, match="as many tags"):
        tag_scores(predicted, [["O"], *expected[1:]], ["x", "y", "y"])


def test_a_lexicon_gives_words_their_most_frequent_tag():
    train = [TaggedWords(("a", "b", "a"), ("B-X", "O", "B-X")), TaggedWords(("a", "c", "d"), ("O", "O", "O"))]
    assert lexicon_tags(train, [("a", "b", "new")]) == [["B-X", "O", "O"]]
