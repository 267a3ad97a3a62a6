"""ALBEF's retrieval on COCO (arXiv 2107.07651; configs/Retrieval_coco.yaml): 5 epochs in batches of 256.

    mmjax train experiments/albef_retrieval.py --data data --images coco --init_from ALBEF.pth
    mmjax evaluate workdirs/albef_retrieval --task retrieval --data data/coco_test.json --images coco

Flickr30K: 10 epochs, `--files flickr30k_train.json --examples 145000 --steps 5660`.
"""

import dataclasses

from mmjax.models.albef.finetune import AlbefRetrieval
from mmjax.models.albef.network import AlbefConfig
from mmjax.recipes.albef import AlbefRecipe
from mmjax.recipes.image_text import RetrievalData


@dataclasses.dataclass(frozen=True)
class Config(AlbefRecipe, RetrievalData):
    """The published recipe.

    Attributes:
        length: the original does not truncate: 64 tokens hold all captions of 30 words.
        queue: keys of earlier batches, a multiple of batch_size.
    """

    steps: int = 5 * 2_213
    batch_size: int = 256
    files: tuple[str, ...] = ("coco_train.json",)
    examples: int = 566_747
    queue: int = 65_536

    @property
    def network(self) -> AlbefConfig:
        return self.sized(AlbefConfig.retrieval(self.size, queue=self.queue, **self.fields))

    def method(self) -> AlbefRetrieval:
        return AlbefRetrieval(self.network, alpha_steps=self.epoch, groups=self.groups)
