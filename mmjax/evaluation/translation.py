"""Translation metrics: BLEU and chrF as sacrebleu computes them, and exact matches.

>>> statistics = np.array([chrf_statistics("a small cat", "a small cat")])
>>> print(f"{chrf(statistics.sum(0)):.1f}")
100.0
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.evaluation.bootstrap import Metric, bootstrap_interval
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score, proportion
from mmjax.generation.decodable import Decodable
from mmjax.generation.engine import generate
from mmjax.generation.options import GenerationOptions
from mmjax.types import ArrayLike, Float, Params

SHOWN = 20
"""Number of translations that are reported as text."""
ORDERS = 6
"""Longest character n-grams of chrF."""


def translation_scores(
    translations: Sequence[str], references: Sequence[str], tokenize: str = "13a", intervals: bool = True
) -> dict[str, Score]:
    """ "bleu" and "chrf" of the corpus (0 to 100, as sacrebleu's defaults), and "exact_match" in percent.

    BLEU is 0 without a single matching 4-gram, which a corpus of short texts may not have: use chrF there.
    tokenize: sacrebleu's name of BLEU's tokenizer; 13a is its default. intervals: resample sentences.
    Raises MmjaxError: translations and references differ in number, there are none, or sacrebleu is not installed.
    """
    if len(translations) != len(references) or not references:
        raise MmjaxError(
            f"{len(translations)} translations and {len(references)} references: expected one per translation"
        )
    pairs = list(zip(translations, references))
    bleu, statistics = _bleu(pairs, tokenize)
    scores = {
        "bleu": _score(statistics, bleu, intervals),
        "chrf": _score(np.array([chrf_statistics(*pair) for pair in pairs], np.float64), chrf, intervals),
    }
    return scores | {"exact_match": proportion(sum(one == other for one, other in pairs), len(pairs))}


def _score(statistics: np.ndarray, metric: Metric, intervals: bool) -> Score:
    low, high = bootstrap_interval(statistics, metric) if intervals else (None, None)
    return Score(float(metric(statistics.sum(0))), len(statistics), low, high, unit="")


def _bleu(pairs: Sequence[tuple[str, str]], tokenize: str) -> tuple[Metric, np.ndarray]:
    """sacrebleu's formula, and its counts for each sentence: lengths, matches and n-grams of one to four words."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise MmjaxError(f"BLEU needs the package {error.name}: pip install sacrebleu") from error
    metric = BLEU(tokenize=tokenize, effective_order=True)  # affects sentence scores only, not the counts
    counted = [metric.sentence_score(one, [other]) for one, other in pairs]
    statistics = np.array([[t.sys_len, t.ref_len, *t.counts, *t.totals] for t in counted], np.float64)

    def of_sums(row: np.ndarray) -> float:
        length, reference, *counts = row.astype(int).tolist()
        return BLEU.compute_bleu(counts[:4], counts[4:], length, reference, "exp").score

    return functools.partial(np.apply_along_axis, of_sums, -1), statistics


def chrf_statistics(translation: str, reference: str) -> list[int]:
    """For each order the numbers of character n-grams of the translation, of the reference, and in common; spaces are
    ignored."""
    counts = []
    for order in range(1, ORDERS + 1):
        one, other = (_ngrams("".join(text.split()), order) for text in (translation, reference))
        counts += [sum(one.values()) if other else 0, sum(other.values()), sum((one & other).values())]
    return counts


def _ngrams(text: str, order: int) -> collections.Counter[str]:
    return collections.Counter(text[i : i + order] for i in range(len(text) - order + 1))


def chrf(sums: Float[np.ndarray, "*r m"]) -> Float[np.ndarray, "*r"]:
    """chrF2 (Popovic 2016): F2 of the mean precision and recall over the orders that both sides have."""
    candidate, reference, common = np.moveaxis(sums.reshape(*sums.shape[:-1], ORDERS, 3), -1, 0)
    present = (candidate > 0) & (reference > 0)
    orders = np.maximum(present.sum(-1), 1)
    precision, recall = ((present * common / np.maximum(n, 1)).sum(-1) / orders for n in (candidate, reference))
    return 100 * 5 * precision * recall / np.maximum(4 * precision + recall, 1e-16)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TranslationEvaluation(ScoredEvaluation):
    """NAME_OPTIONS_bleu, _chrf and _exact_match for each set of generation options; examples as text at the end.

    Attributes:
        decodable: the model, see `Decodable`.
        inputs: arrays [n, ...] by name, see `Decodable`.
        sources, references: n strings each; sources are only used for the examples.
        decode: a list of ids -> a string, without padding and end tokens.
        options: name, used in the metrics' names -> generation options.
        tokenize: see `translation_scores`; "char" for texts of one word.
        batch_size: items that are generated together.
    """

    name: str = "translation"
    decodable: Decodable
    inputs: Mapping[str, ArrayLike]
    sources: Sequence[str]
    references: Sequence[str]
    decode: Callable[[Sequence[int]], str]
    options: Mapping[str, GenerationOptions]
    tokenize: str = "13a"
    batch_size: int = 128

    def translate(self, params: Params, options: GenerationOptions) -> list[str]:
        """The best text of each item; the last batch is padded, so that one program serves all batches."""
        n, texts = len(self.references), []
        for start in range(0, n, self.batch_size):
            indices = np.arange(start, start + self.batch_size) % n
            inputs = {name: jnp.asarray(np.asarray(value)[indices]) for name, value in self.inputs.items()}
            ids = np.asarray(generate(self.decodable, {"params": params}, inputs, options).ids[:, 0])
            texts += [self.decode(row.tolist()) for row in ids[: n - start]]
        return texts

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        return self._score({name: self.translate(params, options) for name, options in self.options.items()}, True)

    def run(self, params: Params, state: Any) -> dict[str, Any]:
        """Scores for the loop; at the end with intervals, and NAME_examples: one line for each of `SHOWN` items."""
        details = self.final_step is None or int(state.step) >= self.final_step
        texts = {name: self.translate(params, options) for name, options in self.options.items()}
        outcome = self._score(texts, details)
        logged: dict[str, Any] = dict(outcome.scores) | dict(outcome.counts)
        if details:
            examples = zip(self.sources, self.references, *texts.values())
            lines = [" | ".join(("source", "reference", *texts)), *(" | ".join(row) for row in examples)]
            logged[f"{self.name}_examples"] = "\n".join(lines[: SHOWN + 1]) + "\n"
        return logged

    def _score(self, texts: Mapping[str, Sequence[str]], intervals: bool) -> Outcome:
        scores = {
            f"{self.name}_{decoding}_{metric}": score
            for decoding, translations in texts.items()
            for metric, score in translation_scores(translations, self.references, self.tokenize, intervals).items()
        }
        return Outcome(scores, {f"{self.name}_n": len(self.references)})
