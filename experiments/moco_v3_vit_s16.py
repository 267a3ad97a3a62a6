"""MoCo v3, ViT-S/16 (arXiv 2104.02057): 300 epochs of ImageNet in batches of 4,096; 73.2 % in the original's probe.

    mmjax plan experiments/moco_v3_vit_s16.py --topology v5e:4x8        # what it takes, without data or devices
    mmjax train experiments/moco_v3_vit_s16.py --data imagenet/train

The constants are those of facebookresearch/moco-v3 CONFIG.md. The patch projection keeps its random initialisation. The
original computes in float16 with a loss scale, this in bfloat16 without. Crops are made on the host, the rest of the
augmentation on the device with a true Gaussian blur, where PIL has three box filters.
"""

import dataclasses
from typing import Literal

from mmjax.models.moco.network import FROZEN_STEM, MoCoConfig
from mmjax.models.moco.pretrain import MoCoMethod
from mmjax.recipes.moco import MoCoRecipe, on_device
from mmjax.training.augment import View
from mmjax.training.method import Augmented
from mmjax.training.optimizer import Optimizer, adamw, linear_warmup_cosine
from mmjax.training.partition import Partition


@dataclasses.dataclass(frozen=True)
class Config(MoCoRecipe):
    """The published recipe: AdamW, a frozen patch projection, statistics of the whole batch in the heads.

    Attributes:
        learning_rate: for a batch of 256; scaled with the batch. From 0 over `warmup` epochs, then half a cosine to 0.
        weight_decay: of everything that is trained, norms, biases and the class token included.
        momentum: of the momentum encoder; rises to 1 by half a cosine. temperature: of the loss.
        blocks: parts in which the logits are made.
    """

    steps: int = 300 * 312
    batch_size: int = 4_096
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    crop_min: float = 0.08
    learning_rate: float = 1.5e-4
    warmup: int = 40
    weight_decay: float = 0.1
    momentum: float = 0.99
    temperature: float = 0.2
    blocks: int = 1

    @property
    def network(self) -> MoCoConfig:
        return MoCoConfig.v3_s16(momentum=self.momentum, temperature=self.temperature, dtype=self.dtype)

    def method(self) -> Augmented:
        views = View.moco_v3_1(self.size, self.crop_min), View.moco_v3_2(self.size, self.crop_min)
        return Augmented(MoCoMethod(self.network, cosine_steps=self.steps, blocks=self.blocks), on_device(*views))

    def optimizer(self) -> Optimizer:
        peak = self.learning_rate * self.batch_size / 256
        schedule = linear_warmup_cosine(peak, self.steps, self.warmup * self.epoch)
        return Optimizer(adamw(schedule, self.weight_decay, mask=None), Partition(FROZEN_STEM))
