"""Captions against several references as COCO's scripts score them (pycocoevalcap 1.2): BLEU, ROUGE-L and CIDEr-D.

METEOR and SPICE are Java programs and are not included. Texts become words by `caption_words`, which replaces another
Java program: check figures for a paper's table with the original.

    >>> references = [["a dog runs", "a dog is running"], ["two red cars"]]
    >>> scores = caption_scores(["a dog runs", "two cars"], references, intervals=False)
    >>> print(f"{scores['bleu_1'].value:.1f} {scores['rouge_l'].value:.1f}")
    81.9 88.6
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
"""The weight of recall relative to precision in ROUGE-L."""
SIGMA = 6.0
"""The standard deviation, in words, of CIDEr-D's penalty on another length than the reference's."""
SHOWN = 20
"""Number of captions that are reported as text."""

Words = Sequence[str]
Counts = collections.Counter[tuple[str, ...]]


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], intervals: bool = True
) -> dict[str, Score]:
    """ "bleu_1" to "bleu_4", "rouge_l" and "cider", all times 100 as papers print them: a perfect CIDEr is 1000.

    captions: one per image. references: any number of texts for each image. CIDEr weights n-grams by their rarity
    among these images' references, so the CIDEr of a subset is not comparable with that of the whole set. A single
    image has no "cider": the script's is then always 0. Intervals resample images; CIDEr's weights stay those of the
    full set.
    Raises MmjaxError: captions and references differ in number, there are none, or an image has no reference.
    """
    if not references or len(captions) != len(references):
        raise MmjaxError(f"{len(captions)} captions for references of {len(references)} images: expected one per image")
    empty = [index for index, texts in enumerate(references) if isinstance(texts, str) or not len(texts)]
    if empty:
        raise MmjaxError(f"references[{empty[0]}]: expected a list of at least one text, not {references[empty[0]]!r}")
    candidates = [caption_words(text) for text in captions]
    tokenized_references = [[caption_words(text) for text in texts] for texts in references]
    counts = np.array([bleu_counts(*pair) for pair in zip(candidates, tokenized_references)], np.float64)
    scores = {
        f"bleu_{order}": _score(counts, functools.partial(_bleu_percent, order=order), intervals)
        for order in range(1, ORDERS + 1)
    }
    rouge = np.array([rouge_l(*pair) for pair in zip(candidates, tokenized_references)])
    several = {"cider": cider(candidates, tokenized_references)} if len(candidates) > 1 else {}
    for name, values in ({"rouge_l": rouge} | several).items():
        scores[name] = _score(np.stack([values, np.ones(len(candidates))], 1), ratio, intervals)
    return scores


def _score(statistics: np.ndarray, metric: Callable[[np.ndarray], np.ndarray], intervals: bool) -> Score:
    low, high = bootstrap_interval(statistics, metric) if intervals else (None, None)
    return Score(float(metric(statistics.sum(0))), len(statistics), low, high, unit="")


def _ngrams(words: Words) -> Counts:
    return collections.Counter(
        tuple(words[start : start + order]) for order in range(1, ORDERS + 1) for start in range(len(words) - order + 1)
    )


def bleu_counts(candidate: Words, references: Sequence[Words]) -> list[int]:
    """Counts of one caption: its length, the length of the closest reference (the shorter of equally close ones), then
    for each order the number of its n-grams and of those matched, clipped to the largest count in any reference."""
    length, ngrams = len(candidate), _ngrams(candidate)
    most: Counts = collections.Counter()
    for words in references:
        most |= _ngrams(words)
    matches = [0] * ORDERS
    for ngram, count in (ngrams & most).items():
        matches[len(ngram) - 1] += count
    closest = min((abs(len(words) - length), len(words)) for words in references)[1]
    return [length, closest, *(max(0, length - order) for order in range(ORDERS)), *matches]


def bleu(sums: Float[np.ndarray, "*r 10"]) -> Float[np.ndarray, "*r 4"]:
    """BLEU-1 to BLEU-4 of a corpus, from 0 to 1, from its captions' summed counts: no smoothing."""
    lengths, guesses, matches = np.split(np.asarray(sums, np.float64), (2, 2 + ORDERS), axis=-1)
    precisions = (matches + 1e-15) / (guesses + 1e-9)  # the script's guards against division by zero
    means = np.cumprod(precisions, -1) ** (1 / np.arange(1, ORDERS + 1))
    share = (lengths[..., :1] + 1e-15) / (lengths[..., 1:] + 1e-9)
    return means * np.exp(1 - 1 / np.minimum(share, 1))


def _bleu_percent(sums: np.ndarray, order: int) -> np.ndarray:
    return 100.0 * bleu(sums)[..., order - 1]


def rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    """F of the longest common subsequence, from 0 to 1; precision and recall may come from different references."""
    candidate = list(candidate) or [""]  # the script splits at single spaces: an empty text is then one empty word
    precision = recall = 0.0
    for words in references:
        common = _common(candidate, list(words) or [""])
        precision, recall = max(precision, common / len(candidate)), max(recall, common / max(len(words), 1))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0


def _common(one: Words, other: Words) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for index, other_word in enumerate(other, 1):
            before, row[index] = row[index], before + 1 if word == other_word else max(row[index], row[index - 1])
    return row[-1]


def cider(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> Float[np.ndarray, " n"]:
    """CIDEr-D of each image (Vedantam et al. 2015), from 0 to 10; their mean is the corpus score.

    The weight of an n-gram is ln(images / images whose references contain it), counted over these references.
    """
    counted = [[_ngrams(words) for words in texts] for texts in references]
    images = collections.Counter(ngram for texts in counted for ngram in set[tuple[str, ...]]().union(*texts))
    weights = _Weights(math.log(len(counted)), images)
    scores = []
    for words, texts in zip(candidates, counted):
        vectors = weights.vectors(_ngrams(words))
        scores.append(10.0 * sum(vectors.similarity(weights.vectors(text)) for text in texts) / len(texts))
    return np.array(scores)


@dataclasses.dataclass(frozen=True)
class _Vectors:
    """A text's n-grams with their weighted counts, the norm of each order's vector, and the number of its bigrams."""

    weighted: dict[tuple[str, ...], float]
    norms: list[float]
    bigrams: int

    def similarity(self, reference: "_Vectors") -> float:
        """The mean cosine over the orders, with the counts of n-grams clipped to the reference's."""
        products = [0.0] * ORDERS
        for ngram, weight in self.weighted.items():
            reference_weight = reference.weighted.get(ngram)
            if reference_weight is not None:
                products[len(ngram) - 1] += min(weight, reference_weight) * reference_weight
        cosines = (p / (a * b) if a and b else p for p, a, b in zip(products, self.norms, reference.norms))
        longer = self.bigrams - reference.bigrams
        return math.exp(-(longer**2) / (2 * SIGMA**2)) * sum(cosines) / ORDERS


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Document frequencies of n-grams: ln of the number of images, and the number of images with each n-gram."""

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
        caption: (params, state) -> a caption for each image.
        references: the reference texts of each image.
        thumbnails: uint8 [n, height, width, 3], for the picture.
        attribution: a line under the picture.
    """

    name: str = "captions"
    caption: Callable[[Params, Any], Sequence[str]]
    references: Sequence[Sequence[str]]
    thumbnails: np.ndarray | None = None
    attribution: str | None = None

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        return self._score(self.caption(params, state), pictures, True)

    def run(self, params: Params, state: Any) -> dict[str, Any]:
        """Scores for the loop; at the end with intervals, and NAME_examples: one line for each of `SHOWN` images."""
        details = self.final_step is None or int(state.step) >= self.final_step
        captions = self.caption(params, state)
        outcome = self._score(captions, details, details)
        logged: dict[str, Any] = dict(outcome.scores) | dict(outcome.counts) | dict(outcome.pictures)
        if details:
            lines = [f"{caption} | {texts[0]}" for caption, texts in zip(captions, self.references)]
            logged[f"{self.name}_examples"] = "\n".join(["caption | a reference", *lines[:SHOWN]]) + "\n"
        return logged

    def _score(self, captions: Sequence[str], pictures: bool, intervals: bool) -> Outcome:
        scores = caption_scores(captions, self.references, intervals)
        named = {f"{self.name}_{name}": score for name, score in scores.items()}
        images = {}
        if pictures and self.thumbnails is not None:
            shown = self.thumbnails[:SHOWN]
            images[f"{self.name}_picture"] = mistakes_picture(shown, captions[: len(shown)], self.attribution)
        return Outcome(named, {f"{self.name}_n": len(self.references)}, images)
