"""MoCo v1, ResNet-50 (arXiv 1911.05722): 200 epochs of ImageNet in batches of 256; linear probe 60.6 % in the original.

    mmjax plan experiments/moco_v1_resnet50.py --topology v5e:2x4        # what it takes, without data or devices
    mmjax train experiments/moco_v1_resnet50.py --data imagenet/train
    mmjax ablate experiments/moco_v1_resnet50.py --data imagenet/train --queue 4096 --over momentum=0.9,0.99,0.999

The constants are the defaults of facebookresearch/moco main_moco.py. Batch normalisation sees groups of 32, as on the
original's 8 GPUs, on any number of devices. Crops are made on the host, colour and flips on the device.
"""

import dataclasses

from mmjax.models.moco.network import MoCoConfig
from mmjax.models.moco.pretrain import MoCoMethod
from mmjax.recipes.moco import MoCoRecipe, on_device
from mmjax.training.augment import View
from mmjax.training.method import Augmented
from mmjax.training.optimizer import Optimizer, per_epoch, sgd, staircase


@dataclasses.dataclass(frozen=True)
class Config(MoCoRecipe):
    """The published recipe. The rate is not scaled with the batch: half the batch needs half the rate.

    Attributes:
        learning_rate: of the first epoch. milestones: epochs at which it falls to a tenth.
        weight_decay: of every parameter, norms and biases included.
        queue: number of keys, a multiple of batch_size.
        momentum, temperature: of the momentum encoder and of the loss.
        bn_groups: parts of the batch, each normalised separately.
        drift_rows: number of images that the drift of the key encoder is measured on; 0: none.
    """

    steps: int = 200 * 5_004
    batch_size: int = 256
    learning_rate: float = 0.03
    milestones: tuple[int, ...] = (120, 160)
    weight_decay: float = 1e-4
    queue: int = 65_536
    momentum: float = 0.999
    temperature: float = 0.07
    bn_groups: int = 8
    drift_rows: int = 0

    @property
    def network(self) -> MoCoConfig:
        return MoCoConfig.v1(queue=self.queue, momentum=self.momentum, temperature=self.temperature, dtype=self.dtype)

    def method(self) -> Augmented:
        view = View.moco_v1(self.size)
        method = MoCoMethod(self.network, bn_groups=self.bn_groups, drift_rows=self.drift_rows)
        return Augmented(method, on_device(view, view))

    def optimizer(self) -> Optimizer:
        schedule = per_epoch(staircase(self.learning_rate, self.milestones), self.epoch)
        return Optimizer(sgd(schedule, momentum=0.9, weight_decay=self.weight_decay))
