"""ALBEF's weakly supervised grounding on RefCOCO+ (arXiv 2107.07651; configs/Grounding.yaml): 5 epochs, batches of 256.

    mmjax train experiments/albef_grounding.py --data data --images coco --init_from ALBEF.pth
    mmjax evaluate workdirs/albef_grounding --task grounding --data data/refcoco+_val.json --images coco \
        --refer refcoco+ --proposals dets.json

The network and its losses are those of retrieval; no box is learned from. Images are not cropped, so that expressions
stay true of them; they are flipped, as in the original: RefCOCO+ has no words of location.
"""

import dataclasses

from mmjax.data.pipeline import Transform
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.transforms import RandomFlip, Resize
from mmjax.data.vision_language_augment import VisionLanguageRandAugment
from mmjax.models.albef.finetune import AlbefRetrieval
from mmjax.models.albef.network import AlbefConfig
from mmjax.recipes.albef import AlbefRecipe
from mmjax.recipes.image_text import RetrievalData


@dataclasses.dataclass(frozen=True)
class Config(AlbefRecipe, RetrievalData):
    """The published recipe.

    Attributes:
        queue: keys of earlier batches, a multiple of batch_size.
    """

    steps: int = 5 * 469
    batch_size: int = 256
    files: tuple[str, ...] = ("refcoco+_train.json",)
    examples: int = 120_191
    queue: int = 65_536

    def image_transforms(self) -> tuple[Transform, ...]:
        return Resize(ImagePreprocessing.albef(self.size)), RandomFlip(), VisionLanguageRandAugment(self.magnitude)

    @property
    def network(self) -> AlbefConfig:
        return self.sized(AlbefConfig.retrieval(self.size, queue=self.queue, **self.fields))

    def method(self) -> AlbefRetrieval:
        return AlbefRetrieval(self.network, alpha_steps=self.epoch, groups=self.groups)
