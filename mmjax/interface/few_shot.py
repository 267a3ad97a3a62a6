"""Answers from a few examples in the prompt, as OpenFlamingo's evaluation makes them (eval/evaluate.py).

few_shot = FewShot(model, examples, QUESTIONS, shots=4, selection="rices")
few_shot(images, questions)          # ["a red hen", ...]
few_shot.facts()                     # shots, selection, seed: what the numbers depend on
"""

import abc
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.evaluation.features import similarities
from mmjax.interface.generation import GeneratingModel
from mmjax.text.interleaved import END_OF_CHUNK, IMAGE
from mmjax.types import Array, Float

Selection: TypeAlias = Literal["fixed", "shared", "random", "rices"]
SELECTIONS = ("fixed", "shared", "random", "rices")
BATCH = 16
"""Queries that are answered at a time."""
ENCODED = 64
"""Images of examples whose features are computed at a time."""


class Example(NamedTuple):
    """An image with its caption, or with a question and its answer."""

    image: Any
    answer: str
    question: str = ""


@dataclass(frozen=True)
class Template:
    """The text of a query and of an example.

    Attributes:
        query: ends where the answer begins; "{question}" stands for the question.
        end, separator: after each example.
        ends: an answer ends before the first of these. removed: a string that is taken out of answers.
        new_tokens: the default of max_new_tokens.
    """

    query: str
    end: str = END_OF_CHUNK
    separator: str = "\n"
    ends: tuple[str, ...] = ()
    removed: str = ""
    new_tokens: int = 20

    def prompt(self, question: str) -> str:
        return self.query.format(question=question)

    def example(self, example: Example, image: bool = True) -> str:
        """image: False: without `<image>`, for the examples of zero shots, which are text alone."""
        text = f"{self.prompt(example.question)}{example.answer}{self.end}{self.separator}"
        return text if image else text.replace(IMAGE, "")

    def cleaned(self, text: str) -> str:
        """An answer out of generated text."""
        cuts = [index for index in (text.find(end) for end in self.ends) if index >= 0]
        text = text[: min(cuts)] if cuts else text
        return (text.replace(self.removed, "") if self.removed else text).strip()


CAPTIONS = Template(f"{IMAGE}Output:", ends=("Output",), removed='"')
"""A space after the colon would change scores."""
QUESTIONS = Template(
    f"{IMAGE}Question:{{question}} Short answer:", ends=("Question", "Answer", "Short", ", "), new_tokens=5
)


@dataclass
class FewShot:
    """A model with examples.

    Attributes:
        shots: examples before a query; None: all. 0: two examples without their images, as in the paper.
        selection: "fixed": the first ones before every query; "shared": a sample by the seed, the same before every
            query, of which fewer shots have the first ones. Both are encoded once, and every query continues their
            cache. "random": a sample for each query. "rices": those whose images are most similar to the query's, the
            most similar last (Retrieval-based In-Context Example Selection, arXiv 2109.05014).
        seed: of the samples.
    Raises MmjaxError for fewer examples than shots.
    """

    model: "FewShotModel"
    examples: Sequence[Example]
    template: Template = CAPTIONS
    shots: int | None = None
    selection: Selection = "fixed"
    seed: int = 42

    def __post_init__(self) -> None:
        self.shots = len(self.examples) if self.shots is None else self.shots
        self.template = self.model.fitting(self.template)
        if not 0 <= self.shots <= len(self.examples) or self.selection not in SELECTIONS:
            raise MmjaxError(f"shots={self.shots}, selection={self.selection!r} of {len(self.examples)} examples")

    def with_shots(self, shots: int) -> Self:
        """The same with another number of shots; features of the examples are computed once for all."""
        other = replace(self, shots=shots)
        if self.selection == "rices" and self.examples:
            vars(other)["_features"] = self._features
        return other

    @property
    def generation(self) -> dict[str, Any]:
        """The default options of `generate`: 3 beams that are compared by their plain sums."""
        return {"max_new_tokens": self.template.new_tokens, "num_beams": 3, "length_penalty": 0.0}

    def facts(self) -> dict[str, Any]:
        """What the answers depend on beside the model."""
        template = {name: getattr(self.template, name) for name in ("query", "end", "separator")}
        return {"shots": self.shots, "selection": self.selection, "seed": self.seed, **template}

    def __call__(
        self, images: Sequence[Any], questions: Sequence[str] | None = None, first: int = 0, **options: Any
    ) -> list[str]:
        """The answer to each query. options: of `generate`; defaults: `generation`.

        first: the number of the first query, on which a sample for each query depends.
        Raises MmjaxError for another number of questions than of images.
        """
        run = functools.partial(self.model.generate, **{**self.generation, **options})
        answers = self._by_batches(run, images, questions, first)
        return [self.template.cleaned(answer) for answer in answers]

    def rank(
        self, images: Sequence[Any], questions: Sequence[str] | None, answers: Sequence[str], k: int = 128
    ) -> list[list[tuple[str, float]]]:
        """For each query the answers of a list, the best first: see `FewShotModel.rank`."""
        return self._by_batches(functools.partial(self.model.rank, answers=answers, k=k), images, questions, 0)

    def _by_batches(self, run: Any, images: Sequence[Any], questions: Sequence[str] | None, first: int) -> list[Any]:
        questions = [""] * len(images) if questions is None else list(questions)
        if len(questions) != len(images):
            raise MmjaxError(f"{len(images)} images and {len(questions)} questions: one image for each")
        results, chosen = list[Any](), self.select(images, first)
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            results += self._batch(run, images[part], questions[part], chosen[part])
        return results

    def select(self, images: Sequence[Any], first: int = 0) -> list[list[int]]:
        """The indices of the examples before each query, in the prompt's order. first: see `__call__`."""
        size, count = len(self.examples), self.shots or min(2, len(self.examples))
        if self.selection == "rices" and count:
            return rices(np.asarray(self.model.encode_image(list(images))), self._features, count)
        if self.selection == "random":
            numbers = range(first, first + len(images))
            return [random.Random(f"{self.seed} {number}").sample(range(size), count) for number in numbers]
        order = list(range(size))
        if self.selection == "shared":
            random.Random(self.seed).shuffle(order)
        return [order[:count]] * len(images)

    def prompts(self, images: Sequence[Any], questions: Sequence[str] | None = None, first: int = 0) -> list[str]:
        """The whole text before the answer to each query."""
        texts = [self.template.prompt(question) for question in questions or [""] * len(images)]
        return [self._text(indices) + text for indices, text in zip(self.select(images, first), texts)]

    @functools.cached_property
    def _features(self) -> np.ndarray:
        images = [example.image for example in self.examples]
        parts = [images[start : start + ENCODED] for start in range(0, len(images), ENCODED)]
        return np.concatenate([np.asarray(self.model.encode_image(part)) for part in parts])

    def _batch(self, run: Any, images: Sequence[Any], questions: Sequence[str], chosen: list[list[int]]) -> list[Any]:
        prompts = [self.template.prompt(question) for question in questions]
        if self.selection in ("fixed", "shared") and self.examples:
            return run(prompts, images=list(images), prefix=self._prefix)
        texts = [self._text(indices) + prompt for indices, prompt in zip(chosen, prompts)]
        return run(texts, images=[[*self._images(indices), image] for indices, image in zip(chosen, images)])

    @functools.cached_property
    def _prefix(self) -> Any:
        indices = self.select([None])[0]
        return self.model.encode_prefix(self._text(indices), self._images(indices) or None)

    def _text(self, indices: list[int]) -> str:
        return "".join(self.template.example(self.examples[i], bool(self.shots)) for i in indices)

    def _images(self, indices: list[int]) -> list[Any]:
        return [self.examples[i].image for i in indices] if self.shots else []


class FewShotModel(GeneratingModel):
    """A model whose prompts may have several images, and which answers after examples."""

    def fitting(self, template: Template) -> Template:
        """The template with what this model's texts have at the end of an example."""
        return template

    @abc.abstractmethod
    def encode_image(self, images: Any) -> Float[Array, "b e"]:
        """Unit-norm features of images, by which RICES selects examples."""

    @abc.abstractmethod
    def encode_prefix(self, text: str, images: Any = None, add_special_tokens: bool = True) -> Any:
        """A text with images before several prompts, encoded once: the argument `prefix` of `generate` and `rank`."""

    @abc.abstractmethod
    def rank(
        self,
        prompts: str | Sequence[str],
        answers: Sequence[str],
        *,
        images: Any = None,
        prefix: Any = None,
        k: int = 128,
        add_special_tokens: bool = True,
    ) -> list[list[tuple[str, float]]]:
        """For each prompt the answers as (answer, probability), the best first."""

    def caption(
        self,
        images: Any,
        examples: Sequence[Example] = (),
        *,
        shots: int | None = None,
        selection: Selection = "fixed",
        seed: int = 42,
        template: Template = CAPTIONS,
        **options: Any,
    ) -> list[str]:
        """A caption of each image, after `shots` of the examples (images with captions); see `FewShot`.

        options: as of `generate`; by default as OpenFlamingo's evaluation has them: 3 beams, 20 new tokens.
        """
        return FewShot(self, examples, template, shots, selection, seed)(images, **options)

    def answer(
        self,
        images: Any,
        questions: Sequence[str],
        answers: Sequence[str] | None = None,
        top: int = 1,
        k: int = 128,
        *,
        examples: Sequence[Example] = (),
        shots: int | None = None,
        selection: Selection = "fixed",
        seed: int = 42,
        template: Template = QUESTIONS,
        **options: Any,
    ) -> list[Any]:
        """A short answer to each question, about the image of the same index, after `shots` of the examples.

        answers: a list to choose from; the result is, for each question, `top` pairs (answer, probability), the best
            first; see `rank` for k. options: as of `generate`, for written answers.
        Raises MmjaxError for options with a list.
        """
        few_shot = FewShot(self, examples, template, shots, selection, seed)
        if answers is None:
            return few_shot(images, questions, **options)
        if options:
            raise MmjaxError(f"answers of a list are ranked: {', '.join(options)} would have no effect")
        return [ranked[:top] for ranked in few_shot.rank(images, questions, answers, k)]


def rices(queries: np.ndarray, examples: np.ndarray, shots: int) -> list[list[int]]:
    """For each query the `shots` examples of the highest cosine, the highest last.

    queries, examples: unit-norm features [n, e].

    >>> rices(np.eye(2), np.array([[1.0, 0], [0.6, 0.8], [0, 1.0]]), 2)
    [[1, 0], [1, 2]]
    """
    cosines = np.asarray(similarities(jnp.asarray(queries), jnp.asarray(examples)))
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :shots]
    return order[:, ::-1].tolist()
