"""BLIP's visual question answering in small, on easy-VQA: questions that nobody here wrote, minutes on a laptop's CPU.

    mmjax train experiments/blip_easy_vqa.py --workdir workdirs/blip_easy_vqa
    mmjax evaluate workdirs/blip_easy_vqa --task vqa
    mmjax ablate experiments/blip_easy_vqa.py --over images=shown,blank --seeds 0,1,2 --sequential

1.8 million random weights, 600 steps of 64 questions (one epoch; 2 to 5 minutes on one core, by what else runs). Of the
9,673 test questions, ranked among the 13 answers, are right, in percent (mean and standard deviation of three seeds):

                                      all           presence      negation      colour        shape
    network                           81.1 ± 1.4   84.7 ± 1.7   84.0 ± 2.2   98.7 ± 0.4   44.9 ± 0.7
    the same, blank images            66.0 ± 1.5   82.0 ± 0.5   82.5 ± 0.6    8.2 ± 7.1   32.4 ± 2.0
    majority answer to each kind      67.1          82.3          82.8          11.6          35.8
    majority answer to each question  67.0          82.3          82.8          12.0          34.8

The blank network has 100 steps. The colour of the shape is learned in the first half of the run, whether a colour is
there later, the shape hardly at all. Twice as many steps (one seed, the first 1,000 test questions) give 85.4, 91.7,
91.5, 100 and 40.6; 48 % of questions about shapes of training images are then right, so this is no overfitting. Patches
of 8 pixels, sines and cosines as positions, and rates of 1.5e-3 and 2e-3 did not help within 300 to 900 steps.
`experiments/results/blip_easy_vqa.json` has the figures of each seed.
"""

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.caption_text import EncodeAnswers
from mmjax.data.easy_vqa import EasyVqa, easy_vqa_answers, question_kind
from mmjax.data.pipeline import Transform
from mmjax.data.transforms import BLANK, BlankImages
from mmjax.evaluation.vqa import HumanAnswers, VqaEvaluation
from mmjax.models.bert.network import BertConfig
from mmjax.models.blip.finetune import BlipAnswering
from mmjax.models.blip.network import ALONE, BlipConfig
from mmjax.models.blip.tasks import ADDED, BlipModel
from mmjax.recipes.small_blip import special_ids
from mmjax.recipes.small_image_text import MEAN, STD, SmallImageText
from mmjax.text.captions import blip_question
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.training.experiment import Evaluation
from mmjax.types import Params

PEOPLE = 10
"""easy-VQA has one answer a question; the challenge's accuracy counts those of ten people, here the same ten times."""


@dataclasses.dataclass(frozen=True)
class Config(SmallImageText):
    """From random weights. Answers are ranked among the 13.

    Attributes:
        images: "blank": grey images in training and evaluation, so that the questions alone determine the answers.
        answer_length: tokens of an answer, [DEC] and [SEP] included.
        test_questions: the first questions of the test part that are evaluated.
    """

    clean = staticmethod(blip_question)
    sep: ClassVar[bool] = True
    unit: ClassVar[str] = "questions"

    steps: int = 600
    batch_size: int = 64
    images: Literal["shown", "blank"] = "shown"
    patch: int = 16
    vision_depth: int = 3
    text_depth: int = 2
    head_width: int = 32
    dropout: float = 0.0
    length: int = 12
    answer_length: int = 4
    test_questions: int = 9_673

    # ------------------------------------------------------------------------------------------------------------- data

    def source(self) -> EasyVqa:
        return EasyVqa("train")

    def tokenizer_texts(self) -> Iterable[str]:
        return [text for question, answer, _ in self.source().questions for text in (question, answer)]

    @functools.cached_property
    def tokenizer(self) -> WordPieceTokenizer:
        return super().tokenizer.with_appended(ADDED)

    def image_transforms(self) -> tuple[Transform, ...]:
        return (BlankImages(),) if self.images == "blank" else ()

    def text_transforms(self) -> tuple[Transform, ...]:
        return *super().text_transforms(), EncodeAnswers(self.tokenizer, 1, self.answer_length)

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        answers = jax.ShapeDtypeStruct((self.batch_size, 1, self.answer_length), jnp.int32)
        weights = jax.ShapeDtypeStruct((self.batch_size, 1), jnp.float32)
        return super().example_batch() | {"answer_ids": answers, "answer_mask": answers, "answer_weights": weights}

    # ----------------------------------------------------------------------------------------------------------- recipe

    @property
    def network(self) -> BlipConfig:
        """The encoder of questions and the decoder of answers have the same sizes and share nothing."""
        text = BertConfig(vocab_size=self.tokenizer.vocab_size, types=0, cross_from=0, **self.text_sizes)
        decoder = dataclasses.replace(text, causal=True, mlm=True)
        return BlipConfig(self.vision, text, decoder, **special_ids(self.tokenizer), **ALONE)

    def method(self) -> BlipAnswering:
        return BlipAnswering(self.network, mean=MEAN, std=STD)

    def evaluations(self) -> tuple[Evaluation, ...]:
        """The accuracy by kinds of questions; and that of the most frequent answer to each kind in training."""
        source = EasyVqa("test")
        records = [source[index] for index in range(min(self.test_questions, len(source)))]
        questions = [
            HumanAnswers(index, record["answers"] * PEOPLE, record["image_id"], question_type=record["kind"])
            for index, record in enumerate(records)
        ]
        majority = majority_answers(self.source())
        constants = [majority[record["kind"]] for record in records]
        answer = functools.partial(self.answers, records)
        return (
            VqaEvaluation(answer=answer, questions=questions),
            VqaEvaluation(name="majority", answer=lambda params, state: constants, questions=questions),
        )

    def answers(self, records: Sequence[dict[str, Any]], params: Params, state: Any) -> list[str]:
        """The best answer of the 13 to each question."""
        model = BlipModel(self.network, params, tokenizer=self.tokenizer, preprocess=self.preprocess)
        choices, predictions, chunk = easy_vqa_answers(), list[str](), 1024
        for start in range(0, len(records), chunk):
            part = [records[min(index, len(records) - 1)] for index in range(start, start + chunk)]
            images = np.stack([record["image"] for record in part])
            pixels = self.preprocess.normalise(images if self.images == "shown" else np.full_like(images, BLANK))
            ranked = model.answer(pixels, [record["text"] for record in part], choices, batch_size=128)
            predictions += [best[0][0] for best in ranked]
        return predictions[: len(records)]

    def model(self) -> tuple[str, BlipConfig]:
        return "blip", self.network


def majority_answers(source: EasyVqa) -> dict[str, str]:
    """The most frequent answer to each kind of question."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for text, answer, _ in source.questions:
        counts[question_kind(text)][answer] += 1
    return {kind: answers.most_common(1)[0][0] for kind, answers in counts.items()}
