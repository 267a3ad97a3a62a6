"""ALBEF's text assignment, the pre-training for pairs of images (arXiv 2107.07651; configs/NLVR_pretrain.yaml): one
epoch of the 4 M set in batches of 512, from a pre-trained ALBEF; `experiments/albef_nlvr.py` starts from it.

    mmjax train experiments/albef_nlvr_pretrain.py --data pretrain --images / --init_from ALBEF.pth
"""

import dataclasses

from mmjax.models.albef.assignment import UNTRAINED, TextAssignment
from mmjax.models.albef.network import AlbefConfig
from mmjax.recipes.albef import AlbefRecipe
from mmjax.training.partition import Partition


@dataclasses.dataclass(frozen=True)
class Config(AlbefRecipe):
    """The published recipe."""

    steps: int = 10_050
    batch_size: int = 512
    files: tuple[str, ...] = ("coco.json", "vg.json", "cc3m_train.json", "cc3m_val.json", "sbu.json")
    examples: int = 5_146_000
    size: int = 256
    length: int = 25
    learning_rate: float = 2e-5
    last_rate: float = 1e-5

    crop_min = 0.2

    @property
    def network(self) -> AlbefConfig:
        return self.sized(AlbefConfig.assignment(self.size, **self.fields))

    def partition(self) -> Partition:
        return Partition(UNTRAINED)

    def method(self) -> TextAssignment:
        return TextAssignment(self.network, groups=self.groups)
