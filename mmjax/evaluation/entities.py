"""Tags of words against the right ones: entities as conlleval counts them, and words one by one."""

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
from mmjax.text.tagged_words import TaggedWords, WordRow, words_of
from mmjax.types import ArrayLike, Float, MmjaxError, Params

Entity = tuple[str, int, int]
"""(type, first word, last word)."""
PREFIXES = ("B-", "I-", "E-", "S-")


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities that a sentence's tags mark, by conlleval's rules: IOB1, IOB2, or with E for ends and S for singles.

    One begins at B, at S, behind E, S or O, and where the type changes; so I-PER behind O begins one too. A tag without
    a prefix is its own type, and goes on as I does.
    """
    found: list[Entity] = []
    before, kind = "O", ""
    for place, tag in enumerate(tags):
        prefix, own = (tag[0], tag[2:]) if tag[:2] in PREFIXES else ("O" if tag == "O" else "I", tag)
        if prefix != "O":
            if prefix in "BS" or before in "ESO" or own != kind:
                found.append((own, place, place))
            else:
                found[-1] = (own, found[-1][1], place)
        before, kind = prefix, own
    return found


def f1(sums: Float[np.ndarray, "*r 3"]) -> Float[np.ndarray, "*r"]:
    """Percent, from how many are right, found and wanted; 0 where there are none of any."""
    right, found, wanted = np.moveaxis(sums, -1, 0)
    return 200.0 * right / np.maximum(found + wanted, 1e-9)


def entity_counts(found: Sequence[str], wanted: Sequence[str]) -> tuple[int, int, int]:
    """(right, found, wanted) entities of a sentence: right is the same words with the same type."""
    one, other = set(entities(found)), set(entities(wanted))
    return len(one & other), len(one), len(other)


def tag_scores(
    found: Sequence[Sequence[str]],
    wanted: Sequence[Sequence[str]],
    groups: Sequence[str],
    guess: Sequence[Sequence[str]] | None = None,
) -> dict[str, Score]:
    """ "f1", "precision" and "recall" of all entities, and "accuracy" of words, in percent.

    groups: of each sentence, what it was drawn with; intervals resample groups. guess: other tags, whose scores are
    told as the chance level.
    Raises MmjaxError where a sentence has another number of tags, or there is none.
    """
    if not found or [*map(len, found)] != [*map(len, wanted)]:
        raise MmjaxError(f"{len(found)} tagged sentences for {len(wanted)}: want as many, with as many tags, and some")
    chance = {} if guess is None else {k: s.value for k, s in tag_scores(guess, wanted, groups).items()}
    _, places = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.array([entity_counts(*pair) for pair in zip(found, wanted)], np.float64)
    right = [sum(map(str.__eq__, *pair)) for pair in zip(found, wanted)]
    rights, words = (np.bincount(places, column) for column in (right, [*map(len, wanted)]))
    sums = np.stack([np.bincount(places, column) for column in counts.T], 1)
    low, high = bootstrap_interval(sums, f1)
    totals = sums.sum(0)
    scores = {"f1": Score(float(f1(totals)), int(totals[2]), low, high, chance.get("f1"))}
    for name, of in (("precision", 1), ("recall", 2)):
        if totals[of]:
            scores[name] = clustered_proportion(sums[:, 0], sums[:, of], chance.get(name))
    return scores | {"accuracy": clustered_proportion(rights, words, chance.get("accuracy"))}


def lexicon_tags(train: Sequence[TaggedWords], words: Sequence[Sequence[str]]) -> list[list[str]]:
    """Every word with the tag that it most often had in training, a new one with the commonest of all.

    What a model gets that knows words and no context: the kind of baseline that CoNLL-2003 has.
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
        columns: what it takes, [n, ...] each. rows: which words the rows are of.
        tags: names of the classes.
        sentences: the right tags. guess: tags to compare with, such as `lexicon_tags`.
    """

    name: str = "tags"
    logits: Encode
    columns: Mapping[str, ArrayLike]
    rows: Sequence[WordRow]
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
        found = [names[row].tolist() for row in words_of(self.rows, classes, len(self.sentences))]
        groups = [sentence.group for sentence in self.sentences]
        scores = tag_scores(found, [sentence.tags for sentence in self.sentences], groups, self.guess)
        counts = {f"{self.name}_sentences": len(found)}
        return Outcome({f"{self.name}_{name}": score for name, score in scores.items()}, counts)
