"""ALBEF's answers to VQA v2 (arXiv 2107.07651; configs/VQA.yaml): 8 epochs in batches of 256.

    mmjax train experiments/albef_vqa.py --data data --images coco --genome visual_genome --init_from ALBEF.pth
    mmjax evaluate workdirs/albef_vqa --task vqa --data data/vqa_val.json --images coco --answers data/answer_list.json

The number of entries is an estimate: another one is an error that names the flags.
"""

import dataclasses
import functools
from typing import ClassVar

from mmjax.models.albef.finetune import AlbefAnswering
from mmjax.models.albef.network import AlbefConfig
from mmjax.recipes.albef import AlbefRecipe
from mmjax.recipes.image_text import QuestionData
from mmjax.text.captions import albef_question


@dataclasses.dataclass(frozen=True)
class Config(AlbefRecipe, QuestionData):
    """The published recipe. Questions have 30 words at most, cut at `length` tokens."""

    clean = staticmethod(functools.partial(albef_question, words=30))
    alone: ClassVar[float] = 0.5

    steps: int = 8 * 5_468
    batch_size: int = 256
    examples: int = 1_400_000
    length: int = 25
    learning_rate: float = 2e-5
    warmup: int = 4

    @property
    def network(self) -> AlbefConfig:
        return self.sized(AlbefConfig.vqa(self.size, **self.fields))

    def method(self) -> AlbefAnswering:
        return AlbefAnswering(self.network, alpha_steps=self.epoch)
