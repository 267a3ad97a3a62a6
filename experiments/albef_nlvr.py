"""ALBEF on NLVR2, statements about two images (arXiv 2107.07651; configs/NLVR.yaml): 10 epochs in batches of 128.

    mmjax train experiments/albef_nlvr.py --data data --images nlvr2 --init_from workdirs/albef_nlvr_pretrain
    mmjax evaluate workdirs/albef_nlvr --task nlvr2 --data data/nlvr_test.json --images nlvr2

It starts from text assignment (`experiments/albef_nlvr_pretrain.py`, or pretrain_model_nlvr.pth). The momentum encoders
are copies of what is loaded; the original copies the network before it loads (NLVR.py:141-144).
"""

import dataclasses

from mmjax.models.albef.finetune import AlbefClassification
from mmjax.models.albef.network import AlbefConfig
from mmjax.recipes.albef import AlbefRecipe
from mmjax.recipes.image_text import ImagePairData


@dataclasses.dataclass(frozen=True)
class Config(AlbefRecipe, ImagePairData):
    """The published recipe. Sentences are not truncated by the original: 64 tokens hold 30 words."""

    steps: int = 10 * 674
    batch_size: int = 128
    examples: int = 86_373
    learning_rate: float = 2e-5

    @property
    def network(self) -> AlbefConfig:
        return self.sized(AlbefConfig.nlvr(self.size, **self.fields))

    def method(self) -> AlbefClassification:
        return AlbefClassification(self.network, alpha_steps=self.epoch)
