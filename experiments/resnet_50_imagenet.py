"""ResNet-50 on ImageNet: 90 epochs, torchvision's classic recipe; 76.13 % top-1 in the original (IMAGENET1K_V1).

    mmjax plan experiments/resnet_50_imagenet.py --topology v5e:2x4      # what it takes, without data or devices
    mmjax train experiments/resnet_50_imagenet.py --data imagenet --workdir runs/resnet50
    mmjax evaluate runs/resnet50 --task classification

torchvision's newer recipe (IMAGENET1K_V2, 80.86 %), but for its repeated augmentation: 600 epochs of 1,251 steps with

    --steps 750600 --batch_size 1024 --size 176 --resize 232 --learning_rate 0.5 --schedule cosine --warmup_epochs 5
    --weight_decay 2e-5 --no-decay_norms --label_smoothing 0.1 --mixup 0.2 --cutmix 1.0 --trivial_augment
    --random_erasing 0.1 --weight_ema 0.99997

Batch normalisation sees groups of 32, as on the original's 8 GPUs, on any number of devices (128 in the newer recipe).
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax.numpy as jnp

from mmjax import tree
from mmjax.data.pipeline import Transform
from mmjax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, ImagePreprocessing
from mmjax.data.randaugment import TrivialAugmentWide
from mmjax.data.transforms import RandomFlip
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.resnet.supervised import ResNetClassifier
from mmjax.recipes.imagenet import ImageNetRecipe
from mmjax.training.classification import Classification
from mmjax.training.erasing import RandomErasing
from mmjax.training.method import Augmented, Method
from mmjax.training.mixing import Mixing
from mmjax.training.optimizer import Optimizer, Schedule, per_epoch, sgd
from mmjax.types import Params


@dataclasses.dataclass(frozen=True)
class Config(ImageNetRecipe):
    """The classic recipe (pytorch/vision references/classification). The rate is 0.1 for 256 images; it does not scale.

    Attributes:
        resize: short side of the evaluated images, before their central crop of 224 pixels.
        learning_rate: peak, constant within each epoch.
        schedule: a tenth every 30 epochs ("steps"), or half a cosine to 0.
        warmup_epochs: from a hundredth of the rate upwards.
        weight_decay: of every parameter; decay_norms=False leaves out those of the norms.
        mixup, cutmix: alphas; with both a coin picks one for each batch.
        trivial_augment: TrivialAugmentWide after the crop.
        random_erasing: the probability of a blank rectangle in an image.
        bn_groups: parts of the batch, each normalised separately.
        weight_ema: share of the averaged weights that each step keeps; None: there are none.
        zero_init_residual: every block begins as the identity.
    """

    steps: int = 90 * 5_004
    batch_size: int = 256
    eval_every: int = 5_004
    resize: int = 256
    learning_rate: float = 0.1
    schedule: Literal["steps", "cosine"] = "steps"
    warmup_epochs: int = 0
    weight_decay: float = 1e-4
    decay_norms: bool = True
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    trivial_augment: bool = False
    random_erasing: float = 0.0
    bn_groups: int = 8
    weight_ema: float | None = None
    zero_init_residual: bool = False

    @property
    def network(self) -> ResNetConfig:
        return ResNetConfig.r50(num_classes=self.classes, zero_init_residual=self.zero_init_residual, dtype=self.dtype)

    @functools.cached_property
    def classification(self) -> Classification:
        return Classification(
            ResNetClassifier(self.network),
            self.classes,
            label_smoothing=self.label_smoothing,
            mixing=Mixing(self.mixup, self.cutmix),
            bn_groups=self.bn_groups,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            weight_ema=self.weight_ema,
        )

    def method(self) -> Method:
        if not self.random_erasing:
            return self.classification
        return Augmented(self.classification, RandomErasing(self.random_erasing, IMAGENET_MEAN, IMAGENET_STD))

    def host_transforms(self) -> tuple[Transform, ...]:
        return (TrivialAugmentWide(), RandomFlip()) if self.trivial_augment else (RandomFlip(),)

    def rate(self) -> Schedule:
        """The learning rate as a function of the step."""
        epochs, warmup = self.epochs, self.warmup_epochs

        def at(epoch: Any) -> Any:
            if self.schedule == "steps":
                rate = self.learning_rate * 0.1 ** (epoch // 30)
            else:
                progress = jnp.clip((epoch - warmup) / max(epochs - warmup, 1), 0.0, 1.0)
                rate = self.learning_rate * 0.5 * (1 + jnp.cos(math.pi * progress))
            rising = self.learning_rate * (0.01 + 0.99 * epoch / max(warmup, 1))
            return jnp.where(epoch < warmup, rising, rate)

        return per_epoch(at, self.epoch)

    def optimizer(self) -> Optimizer:
        mask = None if self.decay_norms else all_but_norms
        return Optimizer(sgd(self.rate(), momentum=0.9, weight_decay=self.weight_decay, mask=mask))

    @property
    def preprocess(self) -> ImagePreprocessing:
        return ImagePreprocessing.imagenet(resize=self.resize)

    def model(self) -> tuple[str, ResNetConfig]:
        return "resnet", self.network


def all_but_norms(params: Params) -> Any:
    """Weight-decay mask: kernels, and the head's bias."""
    return tree.map_with_path(lambda path, _: "bn" not in path.split("/")[-2], params)
