"""Answers from a few examples in the prompt, as OpenFlamingo's evaluation makes them (eval/evaluate.py).

few_shot = FewShot(model, examples, QUESTIONS, shots=4, selection="rices")
few_shot(images, questions)          # ["a red hen", ...]
few_shot.facts()                     # shots, selection, seed: what the numbers depend on
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.evaluation.features import similarities
from mmjax.text.interleaved import END_OF_CHUNK, IMAGE

Selection: TypeAlias = Literal["fixed", "random", "rices"]
BATCH = 16
"""Queries that are answered at a time."""


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
        separator: after each example.
        ends: an answer ends before the first of these. removed: a string that is taken out of answers.
        new_tokens: the default of max_new_tokens.
    """

    query: str
    separator: str = "\n"
    ends: tuple[str, ...] = ()
    removed: str = ""
    new_tokens: int = 20

    def prompt(self, question: str) -> str:
        return self.query.format(question=question)

    def example(self, example: Example, image: bool = True) -> str:
        """image: False: without `<image>`, for the examples of zero shots, which are text alone."""
        text = f"{self.prompt(example.question)}{example.answer}{END_OF_CHUNK}{self.separator}"
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
        model: a `mmjax.models.flamingo.tasks.FlamingoModel`.
        shots: examples before a query; None: all. 0: two examples without their images, as in the paper.
        selection: "fixed": the first ones before every query, encoded once. "random": drawn for each query.
            "rices": those whose images are most similar to the query's, the most similar last (Retrieval-based
            In-Context Example Selection, arXiv 2109.05014).
        seed: of the drawing.
    Raises MmjaxError for fewer examples than shots.
    """

    model: Any
    examples: Sequence[Example]
    template: Template = CAPTIONS
    shots: int | None = None
    selection: Selection = "fixed"
    seed: int = 42

    def __post_init__(self) -> None:
        self.shots = len(self.examples) if self.shots is None else self.shots
        if not 0 <= self.shots <= len(self.examples) or self.selection not in ("fixed", "random", "rices"):
            raise MmjaxError(f"shots={self.shots}, selection={self.selection!r} of {len(self.examples)} examples")

    def facts(self) -> dict[str, Any]:
        """What the answers depend on beside the model."""
        template = {"query": self.template.query, "separator": self.template.separator}
        return {"shots": self.shots, "selection": self.selection, "seed": self.seed, **template}

    def __call__(self, images: Sequence[Any], questions: Sequence[str] | None = None, **options: Any) -> list[str]:
        """The answer to each query. options: of `generate`; by default 3 beams compared by their plain sums.

        Raises MmjaxError for another number of questions than of images.
        """
        options = {"max_new_tokens": self.template.new_tokens, "num_beams": 3, "length_penalty": 0.0, **options}
        answers = self._by_batches(functools.partial(self.model.generate, **options), images, questions)
        return [self.template.cleaned(answer) for answer in answers]

    def rank(
        self, images: Sequence[Any], questions: Sequence[str] | None, answers: Sequence[str], k: int = 128
    ) -> list[list[tuple[str, float]]]:
        """For each query the answers of a list, the best first: see `FlamingoModel.rank`."""
        return self._by_batches(functools.partial(self.model.rank, answers=answers, k=k), images, questions)

    def _by_batches(self, run: Any, images: Sequence[Any], questions: Sequence[str] | None) -> list[Any]:
        questions = [""] * len(images) if questions is None else list(questions)
        if len(questions) != len(images):
            raise MmjaxError(f"{len(images)} images and {len(questions)} questions: one image for each")
        results, chosen = list[Any](), self.select(images)
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            results += self._batch(run, images[part], questions[part], chosen[part])
        return results

    def select(self, images: Sequence[Any]) -> list[list[int]]:
        """The indices of the examples before each query, in the prompt's order."""
        count = self.shots or min(2, len(self.examples))
        if self.selection == "rices" and count:
            return rices(np.asarray(self.model.encode_image(list(images))), self._features, count)
        if self.selection == "random":
            rng = random.Random(self.seed)
            return [rng.sample(range(len(self.examples)), count) for _ in images]
        return [list(range(count))] * len(images)

    @functools.cached_property
    def _features(self) -> np.ndarray:
        return np.asarray(self.model.encode_image([example.image for example in self.examples]))

    def _batch(self, run: Any, images: Sequence[Any], questions: Sequence[str], chosen: list[list[int]]) -> list[Any]:
        prompts = [self.template.prompt(question) for question in questions]
        if self.selection == "fixed" and self.examples:
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


def rices(queries: np.ndarray, examples: np.ndarray, shots: int) -> list[list[int]]:
    """For each query the `shots` examples of the highest cosine, the highest last.

    queries, examples: unit-norm features [n, e].

    >>> rices(np.eye(2), np.array([[1.0, 0], [0.6, 0.8], [0, 1.0]]), 2)
    [[1, 0], [1, 2]]
    """
    cosines = np.asarray(similarities(jnp.asarray(queries), jnp.asarray(examples)))
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :shots]
    return order[:, ::-1].tolist()
