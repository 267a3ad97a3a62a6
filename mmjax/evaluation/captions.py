"""Captions against several references as COCO's scripts count them (pycocoevalcap 1.2): BLEU, ROUGE-L and CIDEr-D.

METEOR and SPICE are Java programs and not here. Texts become words by `caption_words`, which is a stand-in for a Java
program too: figures for a paper's table are to be checked with that one.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmjax.evaluation.bootstrap import bootstrap_interval, ratio
from mmjax.evaluation.caption_words import caption_words
from mmjax.evaluation.pictures import mistakes_picture
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score
from mmjax.types import Float, MmjaxError, Params

ORDERS = 4
"""N-grams of one to four words."""
BETA = 1.2
"""How much more recall weighs than precision in ROUGE-L."""
SIGMA = 6.0
"""The standard deviation, in words, of CIDEr-D's penalty on another length than the reference's."""
SHOWN = 20
"""So many captions are told as text."""

Words = Sequence[str]
Counts = collections.Counter[tuple[str, ...]]


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], intervals: bool = True
) -> dict[str, Score]:
    """ "bleu_1" to "bleu_4", "rouge_l" and "cider", all times 100 as papers print them: a perfect CIDEr is 1000.

    captions: one an image. references: the texts of each image, as many as it has. CIDEr weighs n-grams by how few of
    these images' references have them: that of a subset is not to be compared with that of the whole, and one image
    alone gets 0. Intervals resample images; CIDEr's weights stay those of all of them.
    Raises MmjaxError: another number of captions than of references' lists, none, or an image without a reference.
    """
    if not references or len(captions) != len(references):
        raise MmjaxError(f"{len(captions)} captions for references of {len(references)} images: want as many, and some")
    empty = [place for place, texts in enumerate(references) if isinstance(texts, str) or not len(texts)]
    if empty:
        raise MmjaxError(f"references[{empty[0]}]: want a list of at least one text, not {references[empty[0]]!r}")
    found = [caption_words(text) for text in captions]
    wanted = [[caption_words(text) for text in texts] for texts in references]
    counts = np.array([bleu_counts(*pair) for pair in zip(found, wanted)], np.float64)
    scores = {
        f"bleu_{order}": _score(counts, functools.partial(_bleu_percent, order=order), intervals)
        for order in range(1, ORDERS + 1)
    }
    rouge = np.array([rouge_l(*pair) for pair in zip(found, wanted)])
    for name, values in (("rouge_l", rouge), ("cider", cider(found, wanted))):
        scores[name] = _score(np.stack([values, np.ones(len(found))], 1), ratio, intervals)
    return scores


def _score(statistics: np.ndarray, metric: Callable[[np.ndarray], np.ndarray], intervals: bool) -> Score:
    low, high = bootstrap_interval(statistics, metric) if intervals else (None, None)
    return Score(float(metric(statistics.sum(0))), len(statistics), low, high, unit="")


def _ngrams(words: Words) -> Counts:
    return collections.Counter(
        tuple(words[start : start + order]) for order in range(1, ORDERS + 1) for start in range(len(words) - order + 1)
    )


def bleu_counts(found: Words, references: Sequence[Words]) -> list[int]:
    """Of one caption: its length, that of the closest reference (the shorter of two as close), then for each order the
    n-grams that it has, and how many of them a reference has too, no oftener than the one that has them most."""
    length, own = len(found), _ngrams(found)
    most: Counts = collections.Counter()
    for words in references:
        most |= _ngrams(words)
    matches = [0] * ORDERS
    for ngram, count in (own & most).items():
        matches[len(ngram) - 1] += count
    closest = min((abs(len(words) - length), len(words)) for words in references)[1]
    return [length, closest, *(max(0, length - order) for order in range(ORDERS)), *matches]


def bleu(sums: Float[np.ndarray, "*r 10"]) -> Float[np.ndarray, "*r 4"]:
    """BLEU-1 to BLEU-4 of a corpus, from 0 to 1, from its captions' summed counts: no smoothing."""
    lengths, guesses, matches = np.split(np.asarray(sums, np.float64), (2, 2 + ORDERS), axis=-1)
    precisions = (matches + 1e-15) / (guesses + 1e-9)  # the script's own guards
    means = np.cumprod(precisions, -1) ** (1 / np.arange(1, ORDERS + 1))
    share = (lengths[..., :1] + 1e-15) / (lengths[..., 1:] + 1e-9)
    return means * np.exp(1 - 1 / np.minimum(share, 1))


def _bleu_percent(sums: np.ndarray, order: int) -> np.ndarray:
    return 100.0 * bleu(sums)[..., order - 1]


def rouge_l(found: Words, references: Sequence[Words]) -> float:
    """From 0 to 1: F of the longest common subsequence; precision and recall may come from different references."""
    found = list(found) or [""]  # the script splits at single spaces, and nothing is then one empty word
    precision = recall = 0.0
    for words in references:
        common = _common(found, list(words) or [""])
        precision, recall = max(precision, common / len(found)), max(recall, common / max(len(words), 1))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0


def _common(one: Words, other: Words) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, against in enumerate(other, 1):
            before, row[place] = row[place], before + 1 if word == against else max(row[place], row[place - 1])
    return row[-1]


def cider(found: Sequence[Words], references: Sequence[Sequence[Words]]) -> Float[np.ndarray, " n"]:
    """CIDEr-D of each image (Vedantam et al. 2015), from 0 to 10: their mean is the corpus' score.

    An n-gram's weight is ln(images / images whose references have it); both numbers are of these references.
    """
    counted = [[_ngrams(words) for words in texts] for texts in references]
    images = collections.Counter(ngram for texts in counted for ngram in set[tuple[str, ...]]().union(*texts))
    weights = _Weights(math.log(len(counted)), images)
    scores = []
    for words, texts in zip(found, counted):
        own = weights.vectors(_ngrams(words))
        scores.append(10.0 * sum(own.similarity(weights.vectors(text)) for text in texts) / len(texts))
    return np.array(scores)


@dataclasses.dataclass(frozen=True)
class _Vectors:
    """A text's n-grams with their weighted counts, the norm of each order's vector, and the number of its bigrams."""

    weighted: dict[tuple[str, ...], float]
    norms: list[float]
    bigrams: int

    def similarity(self, reference: "_Vectors") -> float:
        """The mean over the orders of cosines, where no n-gram counts for more than the reference has of it."""
        products = [0.0] * ORDERS
        for ngram, mine in self.weighted.items():
            theirs = reference.weighted.get(ngram)
            if theirs is not None:
                products[len(ngram) - 1] += min(mine, theirs) * theirs
        cosines = (p / (a * b) if a and b else p for p, a, b in zip(products, self.norms, reference.norms))
        longer = self.bigrams - reference.bigrams
        return math.exp(-(longer**2) / (2 * SIGMA**2)) * sum(cosines) / ORDERS


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Of n-grams: ln of the number of images, and how many of them have each."""

    log_images: float
    images: collections.Counter[tuple[str, ...]]

    def vectors(self, counts: Counts) -> _Vectors:
        weighted, squares = {}, [0.0] * ORDERS
        for ngram, count in counts.items():
            weighted[ngram] = count * (self.log_images - math.log(max(1, self.images[ngram])))
            squares[len(ngram) - 1] += weighted[ngram] ** 2
        bigrams = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return _Vectors(weighted, [math.sqrt(square) for square in squares], bigrams)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CaptionsEvaluation(ScoredEvaluation):
    """`captions_bleu_1` to `_4`, `captions_rouge_l` and `captions_cider`; at the end examples as text, and a picture.

    Attributes:
        caption: (params, state) -> a caption of each image.
        references: each image's texts.
        thumbnails: uint8 [n, height, width, 3]; they make the picture.
        attribution: a line under the picture.
    """

    name: str = "captions"
    caption: Callable[[Params, Any], Sequence[str]]
    references: Sequence[Sequence[str]]
    thumbnails: np.ndarray | None = None
    attribution: str | None = None

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        return self._judged(self.caption(params, state), pictures, True)

    def run(self, params: Params, state: Any) -> dict[str, Any]:
        """Scores for the loop; at the end with intervals, and NAME_examples: a line an image of `SHOWN`."""
        details = self.final_step is None or int(state.step) >= self.final_step
        captions = self.caption(params, state)
        outcome = self._judged(captions, details, details)
        told: dict[str, Any] = dict(outcome.scores) | dict(outcome.counts) | dict(outcome.pictures)
        if details:
            lines = [f"{found} | {texts[0]}" for found, texts in zip(captions, self.references)]
            told[f"{self.name}_examples"] = "\n".join(["caption | a reference", *lines[:SHOWN]]) + "\n"
        return told

    def _judged(self, captions: Sequence[str], pictures: bool, intervals: bool) -> Outcome:
        scores = caption_scores(captions, self.references, intervals)
        told = {f"{self.name}_{name}": score for name, score in scores.items()}
        drawn = {}
        if pictures and self.thumbnails is not None:
            shown = self.thumbnails[:SHOWN]
            drawn[f"{self.name}_picture"] = mistakes_picture(shown, captions[: len(shown)], self.attribution)
        return Outcome(told, {f"{self.name}_n": len(self.references)}, drawn)
