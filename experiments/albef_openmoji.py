"""ALBEF in small, on real pairs that pip brings: OpenMoji's drawings and their names; minutes on a laptop's CPU.

    mmjax train experiments/albef_openmoji.py --workdir workdirs/albef_openmoji

The whole of pre-training from random weights: contrast with momentum keys and queues, matching with hard negatives,
masked words under an image, momentum distillation. During training, on drawings whose names no training text has
(`mmjax.data.openmoji`): retrieval by the features alone, and with the ITM head on the nearest of them.

On two cores (Python 3.11, 400 steps in 5 minutes) the features find the right one of 370 names among their first ten
for 15.7 % of the drawings (95 % interval 11.9 to 19.5), and of the drawings for 15.4 % of the names; chance is 2.7 %.
The ITM head needs a longer run: with it 10.5 and 10.0 %. `albef_encoders.py` starts from pre-trained encoders.
"""

import dataclasses
from typing import ClassVar

from mmjax.models.albef.network import AlbefConfig
from mmjax.models.albef.pretrain import AlbefPretraining
from mmjax.models.bert.network import BertConfig
from mmjax.recipes.openmoji import OpenMojiPairs
from mmjax.recipes.small_image_text import MEAN, STD
from mmjax.text.captions import albef_caption


@dataclasses.dataclass(frozen=True)
class Config(OpenMojiPairs):
    """The second half of the text's layers has cross-attention."""

    clean = staticmethod(albef_caption)
    sep: ClassVar[bool] = False
    add_similarity: ClassVar[bool] = False

    @property
    def network(self) -> AlbefConfig:
        fields = {"vocab_size": self.tokenizer.vocab_size, "mlm": True, "cross_from": self.text_depth // 2}
        return AlbefConfig(self.vision, BertConfig(**fields, **self.text_sizes), **self.contrast)

    def method(self) -> AlbefPretraining:
        tokenizer = self.tokenizer
        return AlbefPretraining(
            self.network,
            alpha_steps=self.alpha_steps,
            mean=MEAN,
            std=STD,
            mask_id=tokenizer.mask,
            special=(tokenizer.pad, tokenizer.cls),
        )

    def model(self) -> tuple[str, AlbefConfig]:
        return "albef", self.network
