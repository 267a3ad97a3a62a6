"""BLIP's retrieval on COCO (arXiv 2201.12086; configs/retrieval_coco.yaml): 6 epochs in batches of 256.

    mmjax train experiments/blip_retrieval.py --data annotation --images coco --init_from model_base.pth
    mmjax evaluate workdirs/blip_retrieval --task retrieval --data annotation/coco_karpathy_test.json --images coco

Flickr30K: `--files flickr30k_train.json --examples 145000 --steps 3396 --negative_groups 8`. With ViT-L: `--large
--learning_rate 5e-6`. The network is also CapFilt's filter.
"""

import dataclasses
from typing import Any

from mmjax.models.blip.finetune import BlipRetrieval
from mmjax.models.blip.network import BlipConfig
from mmjax.recipes.blip import BlipRecipe
from mmjax.recipes.image_text import RetrievalData


@dataclasses.dataclass(frozen=True)
class Config(BlipRecipe, RetrievalData):
    """The published recipe.

    Attributes:
        negative_groups: parts of the batch that hard negatives are of: all processes together on COCO.
        queue: keys of earlier batches, a multiple of batch_size.
    """

    steps: int = 6 * 2_213
    batch_size: int = 256
    files: tuple[str, ...] = ("coco_karpathy_train.json",)
    examples: int = 566_747
    length: int = 35
    negative_groups: int = 1
    queue: int = 57_600

    @property
    def network(self) -> BlipConfig:
        return self.sized(BlipConfig.retrieval(self.size, self.large, queue=self.queue, **self.fields))

    def method(self) -> BlipRetrieval:
        groups: dict[str, Any] = {"groups": self.groups, "negative_groups": self.negative_groups}
        return BlipRetrieval(self.network, alpha_steps=self.epoch, **groups)
