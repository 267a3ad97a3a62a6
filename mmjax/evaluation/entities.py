"""Metrics of token classification: entity F1 as conlleval counts it, and accuracy of words.

>>> entities(["B-PER", "I-PER", "O", "B-LOC"])
[('PER', 0, 1), ('LOC', 3, 3)]
>>> entity_counts(["B-PER", "O", "O", "B-LOC"], ["B-PER", "I-PER", "O", "B-LOC"])
(1, 2, 2)
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.evaluation.bootstrap import bootstrap_interval
from mmjax.evaluation.features import Encode, Extractor
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score, clustered_proportion
from mmjax.text.tagged_words import TaggedWords, WordSequence, words_of
from mmjax.types import ArrayLike, Float, MmjaxError, Params

Entity = tuple[str, int, int]
"""(type, first word, last word)."""
PREFIXES = ("B-", "I-", "E-", "S-")


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities that a sentence's tags mark, by conlleval's rules: IOB1, IOB2, or with E for ends and S for singles.

    An entity begins at B, at S, after E, S or O, and where the type changes, so I-PER after O begins one too. A tag
    without a prefix is a type, and continues an entity as I does.
    """
    result: list[Entity] = []
    previous, kind = "O", ""
    for index, tag in enumerate(tags):
        prefix, type = (tag[0], tag[2:]) if tag[:2] in PREFIXES else ("O" if tag == "O" else "I", tag)
        if prefix != "O":
            if prefix in "BS" or previous in "ESO" or type != kind:
                result.append((type, index, index))
            else:
                result[-1] = (type, result[-1][1], index)
        previous, kind = prefix, type
    return result


def f1(sums: Float[np.ndarray, "*r 3"]) -> Float[np.ndarray, "*r"]:
    """F1 in percent from the numbers of correct, predicted and expected entities; 0 where all are 0."""
    right, predicted, expected = np.moveaxis(sums, -1, 0)
    return 200.0 * right / np.maximum(predicted + expected, 1e-9)


def entity_counts(predicted: Sequence[str], expected: Sequence[str]) -> tuple[int, int, int]:
    """Numbers of (correct, predicted, expected) entities of a sentence; correct means the same words and type."""
    one, other = set(entities(predicted)), set(entities(expected))
    return len(one & other), len(one), len(other)


def tag_scores(
    predicted: Sequence[Sequence[str]],
    expected: Sequence[Sequence[str]],
    groups: Sequence[str],
    guess: Sequence[Sequence[str]] | None = None,
) -> dict[str, Score]:
    """ "f1", "precision" and "recall" of all entities, and "accuracy" of words, in percent.

    groups: the group (document) of each sentence; intervals resample groups. guess: baseline tags, whose scores are
    reported as the chance level.
    Raises MmjaxError if there are no sentences, or predicted and expected tags differ in number.
    """
    if not predicted or [*map(len, predicted)] != [*map(len, expected)]:
        raise MmjaxError(f"{len(predicted)} tagged sentences for {len(expected)}: expected as many, with as many tags")
    chance = {} if guess is None else {k: s.value for k, s in tag_scores(guess, expected, groups).items()}
    _, groups_index = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.array([entity_counts(*pair) for pair in zip(predicted, expected)], np.float64)
    right = [sum(map(str.__eq__, *pair)) for pair in zip(predicted, expected)]
    rights, words = (np.bincount(groups_index, column) for column in (right, [*map(len, expected)]))
    sums = np.stack([np.bincount(groups_index, column) for column in counts.T], 1)
    low, high = bootstrap_interval(sums, f1)
    totals = sums.sum(0)
    scores = {"f1": Score(float(f1(totals)), int(totals[2]), low, high, chance.get("f1"))}
    for name, column in (("precision", 1), ("recall", 2)):
        if totals[column]:
            scores[name] = clustered_proportion(sums[:, 0], sums[:, column], chance.get(name))
    return scores | {"accuracy": clustered_proportion(rights, words, chance.get("accuracy"))}


def lexicon_tags(train: Sequence[TaggedWords], words: Sequence[Sequence[str]]) -> list[list[str]]:
    """Tags each word with its most frequent training tag, an unknown word with the most frequent tag of all.

    A baseline without context, as CoNLL-2003 has it.
    """
    counts: dict[str, collections.Counter[str]] = {}
    overall: collections.Counter[str] = collections.Counter()
    for sentence in train:
        overall.update(sentence.tags)
        for word, tag in zip(sentence.words, sentence.tags):
            counts.setdefault(word, collections.Counter())[tag] += 1
    known = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
    common = overall.most_common(1)[0][0]
    return [[known.get(word, common) for word in sentence] for sentence in words]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TagsEvaluation(ScoredEvaluation):
    """`tags_f1`, `tags_precision`, `tags_recall` and `tags_accuracy`; their chance level is `guess`'s.

    Attributes:
        logits: (params, state, columns [b, ...]) -> [b, l, c].
        columns: inputs of `logits`, [n, ...] each. sequences: the words of each row.
        tags: names of the classes.
        sentences: the reference tags. guess: baseline tags, such as `lexicon_tags`.
    """

    name: str = "tags"
    logits: Encode
    columns: Mapping[str, ArrayLike]
    sequences: Sequence[WordSequence]
    tags: Sequence[str]
    sentences: Sequence[TaggedWords]
    guess: Sequence[Sequence[str]] | None = None
    batch_size: int = 64

    @functools.cached_property
    def _extractor(self) -> Extractor:
        return Extractor(self.logits, self.batch_size)

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        classes: Any = self._extractor(params, state, self.columns, self.name).argmax(-1)
        names = np.asarray(self.tags)
        predicted = [names[row].tolist() for row in words_of(self.sequences, classes, len(self.sentences))]
        groups = [sentence.group for sentence in self.sentences]
        scores = tag_scores(predicted, [sentence.tags for sentence in self.sentences], groups, self.guess)
        counts = {f"{self.name}_sentences": len(predicted)}
        return Outcome({f"{self.name}_{name}": score for name, score in scores.items()}, counts)
