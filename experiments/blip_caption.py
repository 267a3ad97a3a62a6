"""BLIP's captions on COCO (arXiv 2201.12086; configs/caption_coco.yaml): 5 epochs in batches of 256.

    mmjax train experiments/blip_caption.py --data annotation --images coco --init_from model_base_capfilt_large.pth
    mmjax evaluate workdirs/blip_caption --task captions --data annotation/coco_karpathy_test.json --images coco

With ViT-L: `--large --learning_rate 2e-6`. The captioner is also CapFilt's.
"""

import dataclasses

from mmjax.data.caption_text import CleanText, EncodeCaption
from mmjax.data.pipeline import Transform
from mmjax.models.blip.finetune import BlipCaptioning
from mmjax.models.blip.network import BlipConfig
from mmjax.models.blip.tasks import PROMPT
from mmjax.recipes.blip import BlipRecipe


@dataclasses.dataclass(frozen=True)
class Config(BlipRecipe):
    """The published recipe. Captions follow "a picture of", which is no target."""

    steps: int = 5 * 2_213
    batch_size: int = 256
    files: tuple[str, ...] = ("coco_karpathy_train.json",)
    examples: int = 566_747
    length: int = 40

    @property
    def network(self) -> BlipConfig:
        return self.sized(BlipConfig.captioner(self.size, self.large, **self.fields))

    def text_transforms(self) -> tuple[Transform, ...]:
        return CleanText(self.clean), EncodeCaption(self.tokenizer, self.length, template=PROMPT + " {}")

    def method(self) -> BlipCaptioning:
        return BlipCaptioning(self.network, groups=self.groups)
