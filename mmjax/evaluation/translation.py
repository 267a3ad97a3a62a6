"""Translations against references: BLEU and chrF as sacrebleu counts them, and exact matches."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score, metrics, proportion
from mmjax.generation.decodable import Decodable
from mmjax.generation.engine import generate
from mmjax.generation.options import GenerationOptions
from mmjax.types import ArrayLike, Params

RESAMPLES = 1000
SHOWN = 20
"""So many translations are told as text."""


def translation_scores(
    translations: Sequence[str], references: Sequence[str], tokenize: str = "13a", intervals: bool = True
) -> dict[str, Score]:
    """ "bleu" and "chrf" of the corpus (sacrebleu's defaults, 0 to 100), and "exact_match" in percent.

    tokenize: sacrebleu's name of BLEU's tokenizer; 13a is what it reports by default. intervals: sacrebleu's bootstrap
    of 1,000 resamples of sentences, mean +- half its width.
    Raises MmjaxError: not a reference a translation, none at all, or sacrebleu is not installed.
    """
    if len(translations) != len(references) or not references:
        raise MmjaxError(f"{len(translations)} translations and {len(references)} references: want as many, and some")
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise MmjaxError(f"BLEU needs the package {error.name}: pip install sacrebleu") from error
    scores = {}
    for name, metric in (("bleu", BLEU(tokenize=tokenize)), ("chrf", CHRF())):
        found = metric.corpus_score(list(translations), [list(references)], RESAMPLES if intervals else 1)
        told = json.loads(found.format(width=6, is_json=True, signature=metric.get_signature().format()))
        mean, half = told.get("confidence_mean"), told.get("confidence_var")
        low, high = (None, None) if mean is None or half is None else (mean - half, mean + half)
        scores[name] = Score(float(told["score"]), len(references), low, high, unit="")
    right = sum(one == other for one, other in zip(translations, references))
    return scores | {"exact_match": proportion(right, len(references))}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TranslationEvaluation(ScoredEvaluation):
    """NAME_OPTIONS_bleu, _chrf and _exact_match, for each of several ways to generate; examples as text at the end.

    Attributes:
        decodable: the model as the engine sees it.
        inputs: by name, arrays [n, ...]: see `Decodable`.
        sources, references: n strings each; the first are for the examples alone.
        decode: a row of ids -> a string, without what stands at its end.
        options: a word for the metrics' names -> how to generate.
        batch_size: items that are generated together.
    """

    name: str = "translation"
    decodable: Decodable
    inputs: Mapping[str, ArrayLike]
    sources: Sequence[str]
    references: Sequence[str]
    decode: Callable[[Sequence[int]], str]
    options: Mapping[str, GenerationOptions]
    batch_size: int = 128

    def translate(self, params: Params, options: GenerationOptions) -> list[str]:
        """The best text of each item; the last batch is filled up, so that one program serves all."""
        n, texts = len(self.references), []
        for start in range(0, n, self.batch_size):
            rows = np.arange(start, start + self.batch_size) % n
            inputs = {name: jnp.asarray(np.asarray(value)[rows]) for name, value in self.inputs.items()}
            ids = np.asarray(generate(self.decodable, {"params": params}, inputs, options).ids[:, 0])
            texts += [self.decode(row.tolist()) for row in ids[: n - start]]
        return texts

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        return self._judged({name: self.translate(params, options) for name, options in self.options.items()}, True)

    def run(self, params: Params, state: Any) -> dict[str, Any]:
        """Numbers for the loop; at the end with intervals, and NAME_examples: a line an item of `SHOWN`."""
        details = self.final_step is None or int(state.step) >= self.final_step
        texts = {name: self.translate(params, options) for name, options in self.options.items()}
        outcome = self._judged(texts, details)
        told: dict[str, Any] = metrics(outcome.scores, details) | dict(outcome.counts)
        if details:
            rows = zip(self.sources, self.references, *texts.values())
            lines = [" | ".join(("source", "reference", *texts)), *(" | ".join(row) for row in rows)]
            told[f"{self.name}_examples"] = "\n".join(lines[: SHOWN + 1]) + "\n"
        return told

    def _judged(self, texts: Mapping[str, Sequence[str]], intervals: bool) -> Outcome:
        judge = functools.partial(translation_scores, references=self.references, intervals=intervals)
        scores = {
            f"{self.name}_{way}_{metric}": score
            for way, translations in texts.items()
            for metric, score in judge(translations).items()
        }
        return Outcome(scores, {f"{self.name}_n": len(self.references)})
