"""BLIP on NLVR2, statements about two images (arXiv 2201.12086; configs/nlvr.yaml): 15 epochs in batches of 256.

    mmjax train experiments/blip_nlvr.py --data annotation --images nlvr2 --init_from model_base.pth
    mmjax evaluate workdirs/blip_nlvr --task nlvr2 --data annotation/nlvr_test.json --images nlvr2

Half of the time the images are swapped, and the words left and right with them; in evaluation never, unlike in the
original, whose scores are random.
"""

import dataclasses
import functools

from mmjax.data.caption_text import CleanText, EncodeCaption
from mmjax.data.image_pairs import SwapImages
from mmjax.data.pipeline import Transform
from mmjax.models.blip.finetune import BlipClassification
from mmjax.models.blip.network import BlipConfig
from mmjax.recipes.blip import BlipRecipe
from mmjax.recipes.image_text import ImagePairData
from mmjax.text.captions import blip_caption


@dataclasses.dataclass(frozen=True)
class Config(BlipRecipe, ImagePairData):
    """The published recipe. Sentences of 40 words are not truncated by the original: 64 tokens hold them."""

    clean = staticmethod(functools.partial(blip_caption, words=40))

    steps: int = 15 * 337
    batch_size: int = 256
    examples: int = 86_373
    learning_rate: float = 3e-5

    @property
    def network(self) -> BlipConfig:
        return self.sized(BlipConfig.nlvr(self.size, **self.fields))

    def text_transforms(self) -> tuple[Transform, ...]:
        encode = EncodeCaption(self.tokenizer, self.length)
        return CleanText(self.clean), SwapImages(), encode

    def method(self) -> BlipClassification:
        return BlipClassification(self.network)
