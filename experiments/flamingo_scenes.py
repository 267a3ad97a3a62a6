"""Flamingo on scenes: questions after other pictures' questions and answers, and what examples in the prompt add.

    mmjax train experiments/flamingo_scenes.py --language SmolLM2-135M-Instruct.Q4_1.gguf --vision DINOV2_FOLDER
    mmjax ablate experiments/flamingo_scenes.py --sequential --over latents=8,16,64 --language ... --vision ...

A training text has `shots` + 1 pictures with a question and its answer each, in the form of the evaluation; answers
alone are learned. Questions about held-out scenes follow 0, 1, ... examples of training scenes.

Measured with SmolLM2-135M-Instruct and a DINOv2 ViT-S/14 at 98 pixels, one seed, 120 steps of 8 texts with 4 pictures
(18.7 M trained parameters of 175 M; 4 to 7 s a step on one busy core), 40 held-out questions of each kind, in percent:

    examples               0      1      2      4      8    most frequent answer
    presence            52.5   52.5   52.5   52.5   52.5    52.5
    counting             7.5   10.0   20.0   15.0   15.0    22.5
    colour               5.0    7.5    0.0   10.0   12.5    25.0
    all                 21.7   23.3   24.2   25.8   26.7    33.3

This run did not learn to use the pictures: after 3,840 of them no row is above the most frequent answer. More examples
give more right answers, from 21.7 to 26.7, but the 95 % intervals are 7 to 8 points to either side, so the rise is
not established. experiments/results/flamingo_scenes.json has all intervals. Gates and latents were not compared.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from grain import transforms

from mmjax.data.interleaved import special_id
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.scenes.questions import Kind
from mmjax.data.scenes.sources import SceneQuestions
from mmjax.data.scenes.splits import Split
from mmjax.data.sources import Record
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import clustered_proportion
from mmjax.interface.few_shot import QUESTIONS, Example, FewShot
from mmjax.models.flamingo.config import ResamplerConfig
from mmjax.models.flamingo.tasks import FlamingoModel
from mmjax.recipes.flamingo import FlamingoRecipe, TrainingSource
from mmjax.text.interleaved import END_OF_CHUNK, IGNORED
from mmjax.text.tokenizer import Tokenizer
from mmjax.training.experiment import Evaluation
from mmjax.types import Params

SMALLEST = 32
"""Pixels of the smallest scene; the preprocessing makes it `side` wide."""


class QuestionGroups:
    """Records of `size` questions about as many scenes, all of one kind."""

    def __init__(self, length: int, size: int, seed: int, side: int, kinds: Sequence[Kind]):
        self.size, self.kinds = size, kinds
        self.sources = [SceneQuestions(length * size, "train", seed=seed, size=side, kinds=(kind,)) for kind in kinds]
        self.length, self.name = length, "question groups"
        self.fingerprint = f"{size} {[source.fingerprint for source in self.sources]}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        source, first = self.sources[index % len(self.sources)], range(self.length)[index] * self.size
        records = [source[first + i] for i in range(self.size)]
        return {"images": tuple(record["image"] for record in records),
                "questions": tuple(record["text"] for record in records),
                "answers": tuple(record["answers"][0] for record in records)}  # fmt: skip

    def record_name(self, index: int) -> str:
        return f"{self.name}[{index}]"


@dataclasses.dataclass(frozen=True)
class EncodeGroup(transforms.Map):
    """A record of `QuestionGroups` -> what `FlamingoLM` takes; labels are answers and `<|endofchunk|>`."""

    tokenizer: Tokenizer
    length: int
    preprocess: ImagePreprocessing

    def map(self, element: Record) -> Record:
        special_id(self.tokenizer, END_OF_CHUNK)
        ids: list[int] = []
        labels: list[int] = []
        for question, answer in zip(element["questions"], element["answers"]):
            texts = [QUESTIONS.prompt(question), f"{answer}{END_OF_CHUNK}", QUESTIONS.separator]
            parts = self.tokenizer.encode(texts, False)
            for number, part in enumerate(parts):
                ids += part
                labels += part if number == 1 else [IGNORED] * len(part)
        row, target = (np.full(self.length, fill, np.int32) for fill in (self.tokenizer.pad or 0, IGNORED))
        row[: len(ids)], target[: len(ids)] = ids[: self.length], labels[: self.length]
        mask = (np.arange(self.length) < len(ids)).astype(np.int32)
        pixels = np.stack([self.preprocess.to_uint8(image) for image in element["images"]])
        return {"image": pixels, "input_ids": row, "attention_mask": mask, "labels": target}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ShotsEvaluation(ScoredEvaluation):
    """`shots_{k}_{kind}` and `shots_{k}`: answers equal to the right one, after k examples of the question's kind.

    Attributes:
        model: of which the parameters are replaced.
        support, queries: records of each kind. shots: numbers of examples.
    """

    name: str = "shots"
    model: FlamingoModel
    support: dict[Kind, SceneQuestions]
    queries: dict[Kind, SceneQuestions]
    shots: tuple[int, ...]

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        model = self.model.replace(params=params)
        right: dict[int, list[bool]] = {k: [] for k in self.shots}
        scores = {}
        for kind, source in self.queries.items():
            records = [source[index] for index in range(len(source))]
            examples = [_example(self.support[kind][index]) for index in range(len(self.support[kind]))]
            images, texts = [record["image"] for record in records], [record["text"] for record in records]
            few_shot = FewShot(model, examples, QUESTIONS, max(self.shots), "shared", 0)
            answers = [record["answers"][0] for record in records]
            common = max(answers.count(answer) for answer in answers)
            for k in self.shots:
                outputs = few_shot.with_shots(k)(images, texts, num_beams=1, max_new_tokens=5)
                hits = [text.strip().lower() == answer for text, answer in zip(outputs, answers)]
                right[k] += hits
                scores[f"{self.name}_{k}_{kind}"] = _share(hits, 100 * common / len(hits))
        return Outcome(scores | {f"{self.name}_{k}": _share(hits) for k, hits in right.items()}, {})


def _share(hits: Sequence[bool], chance: float | None = None) -> Any:
    return clustered_proportion(np.asarray(hits, float), np.ones(len(hits)), chance)


def _example(record: Record) -> Example:
    return Example(record["image"], record["answers"][0], record["text"])


@dataclasses.dataclass(frozen=True)
class Config(FlamingoRecipe):
    """Sizes for a few minutes on one core.

    Attributes:
        groups: training texts. shots: the examples before the last question of one. length: ids of a text.
        kinds: of questions. side: pixels of a picture, a multiple of the image encoder's patch.
        tested_shots: numbers of examples in the evaluation. queries: held-out scenes of each kind.
        split: of the held-out scenes, see `mmjax.data.scenes.splits`.
    """

    steps: int = 150
    batch_size: int = 8
    log_every: int = 5
    eval_every: int = 0
    workers: int = 0
    every: int = 6
    head_width: int = 64
    heads: int = 6
    resampler: ResamplerConfig = dataclasses.field(default_factory=lambda: ResamplerConfig(1, 6, 64, latents=16))
    learning_rate: float = 1e-3
    warmup: int = 20
    groups: int = 100_000
    shots: int = 3
    length: int = 80
    kinds: tuple[Kind, ...] = ("presence", "counting", "colour")
    side: int = 98
    tested_shots: tuple[int, ...] = (0, 1, 2, 4, 8)
    queries: int = 40
    split: Split = "validation"

    @functools.cached_property
    def start(self) -> FlamingoModel:
        """The models, whose pictures are `side` pixels wide and not cropped."""
        model = super().start
        preprocess = dataclasses.replace(model.preprocess, resize=(self.side, self.side), crop=None)
        return model.replace(preprocess=preprocess)

    def sources(self) -> dict[str, TrainingSource]:
        size = self.shots + 1
        source = QuestionGroups(self.groups, size, self.seed, max(self.side, SMALLEST), self.kinds)
        encode = EncodeGroup(self.start.tokenizer, self.length, self.start.preprocess)
        return {"questions": TrainingSource(source, self.batch_size, encode, size, self.length)}

    def example_batch(self) -> Any:
        batch = super().example_batch()
        shape = (*batch["questions_image"].shape[:2], self.side, self.side, 3)
        return batch | {"questions_image": batch["questions_image"].update(shape=shape)}

    def evaluations(self) -> tuple[Evaluation, ...]:
        options: dict[str, Any] = {"size": max(self.side, SMALLEST)}

        def questions(length: int, split: Split, seed: int) -> dict[Kind, SceneQuestions]:
            return {kind: SceneQuestions(length, split, seed=seed, kinds=(kind,), **options) for kind in self.kinds}

        support, queries = (
            questions(max(self.tested_shots) + 2, "train", 10_000),
            questions(self.queries, self.split, 0),
        )
        every = self.eval_every or self.steps
        common: dict[str, Any] = {"every": every, "final_step": self.steps, "model": self.start}
        return (ShotsEvaluation(support=support, queries=queries, shots=self.tested_shots, **common),)
