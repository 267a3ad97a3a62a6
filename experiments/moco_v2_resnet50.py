"""MoCo v2, ResNet-50 (arXiv 2003.04297): 200 epochs of ImageNet in batches of 256; linear probe 67.7 % in the original.

    mmjax plan experiments/moco_v2_resnet50.py --topology v5e:2x4        # what it takes, without data or devices
    mmjax train experiments/moco_v2_resnet50.py --data imagenet/train
    mmjax train experiments/moco_v2_resnet50.py --data imagenet/train --steps 4003200      # 800 epochs, 71.1 %

The constants are those of facebookresearch/moco main_moco.py with `--mlp --moco-t 0.2 --aug-plus --cos`. Batch
normalisation sees groups of 32, as on the original's 8 GPUs, on any number of devices. Crops are made on the host, the
rest of the augmentation on the device with a true Gaussian blur, where PIL has three box filters.
"""

import dataclasses

from mmjax.models.moco.network import MoCoConfig
from mmjax.models.moco.pretrain import MoCoMethod
from mmjax.recipes.moco import MoCoRecipe, on_device
from mmjax.training.augment import View
from mmjax.training.method import Augmented
from mmjax.training.optimizer import Optimizer, per_epoch, sgd, warmup_cosine


@dataclasses.dataclass(frozen=True)
class Config(MoCoRecipe):
    """The published recipe. The rate is not scaled with the batch: half the batch needs half the rate.

    Attributes:
        learning_rate: of the first epoch; falls by a half cosine over the epochs, constant within each.
        weight_decay: of every parameter, norms and biases included.
        queue: number of keys, a multiple of batch_size.
        momentum, temperature: of the momentum encoder and of the loss.
        bn_groups: parts of the batch, each normalised separately.
        drift_rows: number of images that the drift of the key encoder is measured on; 0: none.
    """

    steps: int = 200 * 5_004
    batch_size: int = 256
    learning_rate: float = 0.03
    weight_decay: float = 1e-4
    queue: int = 65_536
    momentum: float = 0.999
    temperature: float = 0.2
    bn_groups: int = 8
    drift_rows: int = 0

    @property
    def network(self) -> MoCoConfig:
        return MoCoConfig.v2(queue=self.queue, momentum=self.momentum, temperature=self.temperature, dtype=self.dtype)

    def method(self) -> Augmented:
        view = View.moco_v2(self.size)
        method = MoCoMethod(self.network, bn_groups=self.bn_groups, drift_rows=self.drift_rows)
        return Augmented(method, on_device(view, view))

    def optimizer(self) -> Optimizer:
        schedule = per_epoch(warmup_cosine(self.learning_rate, self.epochs), self.epoch)
        return Optimizer(sgd(schedule, momentum=0.9, weight_decay=self.weight_decay))
