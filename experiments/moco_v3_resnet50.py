"""MoCo v3, ResNet-50 (arXiv 2104.02057): 100 epochs of ImageNet in batches of 4,096; 68.9 % in the original's probe.

    mmjax plan experiments/moco_v3_resnet50.py --topology v5e:4x8        # what it takes, without data or devices
    mmjax train experiments/moco_v3_resnet50.py --data imagenet/train
    mmjax train ... --steps 93600 --learning-rate 0.3                                            # 300 epochs, 72.8 %
    mmjax train ... --steps 312000 --learning-rate 0.3 --weight-decay 1.5e-6 --momentum 0.996    # 1000 epochs, 74.6 %

The constants are those of facebookresearch/moco-v3 CONFIG.md. The original computes in float16 with a loss scale, this
in bfloat16 without. Crops are made on the host, the rest of the augmentation on the device with a true Gaussian blur,
where PIL has three box filters.
"""

import dataclasses
from typing import Literal

from mmjax.models.moco.network import MoCoConfig
from mmjax.models.moco.pretrain import MoCoMethod
from mmjax.recipes.moco import MoCoRecipe, on_device
from mmjax.training.augment import View
from mmjax.training.method import Augmented
from mmjax.training.optimizer import Optimizer, lars, linear_warmup_cosine


@dataclasses.dataclass(frozen=True)
class Config(MoCoRecipe):
    """The published recipe of 100 epochs: LARS, statistics of the whole batch.

    Attributes:
        learning_rate: for a batch of 256; scaled with the batch. From 0 over `warmup` epochs, then half a cosine to 0.
        weight_decay: of matrices and kernels alone.
        momentum: of the momentum encoder; rises to 1 by half a cosine. temperature: of the loss.
        blocks: parts in which the logits are made.
    """

    steps: int = 100 * 312
    batch_size: int = 4_096
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    learning_rate: float = 0.6
    warmup: int = 10
    weight_decay: float = 1e-6
    momentum: float = 0.99
    temperature: float = 1.0
    blocks: int = 1

    @property
    def network(self) -> MoCoConfig:
        return MoCoConfig.v3_resnet50(momentum=self.momentum, temperature=self.temperature, dtype=self.dtype)

    def method(self) -> Augmented:
        views = View.moco_v3_1(self.size, self.crop_min), View.moco_v3_2(self.size, self.crop_min)
        return Augmented(MoCoMethod(self.network, cosine_steps=self.steps, blocks=self.blocks), on_device(*views))

    def optimizer(self) -> Optimizer:
        peak = self.learning_rate * self.batch_size / 256
        schedule = linear_warmup_cosine(peak, self.steps, self.warmup * self.epoch)
        return Optimizer(lars(schedule, momentum=0.9, weight_decay=self.weight_decay, trust=0.001))
