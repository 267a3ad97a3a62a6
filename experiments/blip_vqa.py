"""BLIP's answers to VQA v2 (arXiv 2201.12086; configs/vqa.yaml): 10 epochs in batches of 256, at 480 pixels.

    mmjax train experiments/blip_vqa.py --data annotation --images coco --genome visual_genome \
        --init_from model_base_capfilt_large.pth
    mmjax evaluate workdirs/blip_vqa --task vqa --data annotation/vqa_val.json --images coco

The number of entries is an estimate: another one is an error that names the flags.
"""

import dataclasses
from typing import ClassVar

from mmjax.models.blip.finetune import BlipAnswering
from mmjax.models.blip.network import BlipConfig
from mmjax.recipes.blip import BlipRecipe
from mmjax.recipes.image_text import QuestionData
from mmjax.text.captions import blip_question


@dataclasses.dataclass(frozen=True)
class Config(BlipRecipe, QuestionData):
    """The published recipe. Questions have 50 words at most, cut at `length` tokens."""

    clean = staticmethod(blip_question)
    alone: ClassVar[float] = 0.2

    steps: int = 10 * 5_468
    batch_size: int = 256
    examples: int = 1_400_000
    size: int = 480
    length: int = 35
    learning_rate: float = 2e-5

    @property
    def network(self) -> BlipConfig:
        return self.sized(BlipConfig.vqa(self.size, **self.fields))

    def method(self) -> BlipAnswering:
        return BlipAnswering(self.network)
