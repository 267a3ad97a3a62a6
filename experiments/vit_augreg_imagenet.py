"""ViT on ImageNet from scratch, by "How to train your ViT?" (AugReg, arXiv 2106.10270): 300 epochs in batches of 4,096.

    mmjax plan experiments/vit_augreg_imagenet.py --topology v5e:4x4    # what it takes, without data or devices
    mmjax train experiments/vit_augreg_imagenet.py --data imagenet --workdir runs/vit
    mmjax train experiments/vit_augreg_imagenet.py --data imagenet --variant S/16 --augment light1 --drop_path 0.1

The constants are those of big_vision `configs/vit_i1k.py`: softmax, a tanh layer before the head, decay of kernels
alone. Two differences: Adam's first moment is float32, and an image's partner in mixup is its neighbour in the whole
batch, not in a device's share of it.
"""

import dataclasses
import functools
from typing import Literal

from mmjax.data.pipeline import Transform
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.randaugment import RandAugment
from mmjax.data.transforms import RandomFlip
from mmjax.models.vit.network import ViTConfig
from mmjax.models.vit.supervised import ViTClassifier
from mmjax.recipes.imagenet import ImageNetRecipe
from mmjax.training.classification import Classification
from mmjax.training.mixing import Mixing
from mmjax.training.optimizer import Optimizer, adamw, excluding, linear_warmup_cosine

HALF = (0.5, 0.5, 0.5)
SIZES = {
    "Ti/16": ViTConfig.ti16,
    "S/32": ViTConfig.s32,
    "S/16": ViTConfig.s16,
    "B/32": ViTConfig.b32,
    "B/16": ViTConfig.b16,
    "L/16": ViTConfig.l16,
}
LEVELS: dict[str, tuple[int | None, float]] = {
    "none": (None, 0.0),
    "light1": (0, 0.0),
    "light2": (10, 0.2),
    "medium1": (15, 0.2),
    "medium2": (15, 0.5),
    "strong1": (20, 0.5),
    "strong2": (20, 0.8),
}
"""(magnitude of RandAugment's two operations, alpha of mixup) by the paper's names. Magnitude 0 is not nothing."""


@dataclasses.dataclass(frozen=True)
class Config(ImageNetRecipe):
    """The recipe for B/16 at its default strength, "medium2".

    Attributes:
        variant: size of the network and its patches.
        augment: strength of RandAugment and mixup.
        objective: "sigmoid" treats each class as a binary problem, and starts the head's bias at -6.9.
        dropout, drop_path: the paper's grid has 0 and 0.1 for both.
        learning_rate: peak; from 0 over `warmup` steps, then half a cosine.
        weight_decay: relative to the rate, of matrices and kernels; the paper's grid has 0.03 and 0.1.
        clip_norm: of the whole gradient.
        remat: blocks are computed again in the backward pass.
    """

    steps: int = 300 * 312
    batch_size: int = 4_096
    eval_every: int = 2_500
    crop_min: float = 0.05
    variant: Literal["Ti/16", "S/32", "S/16", "B/32", "B/16", "L/16"] = "B/16"
    augment: Literal["none", "light1", "light2", "medium1", "medium2", "strong1", "strong2"] = "medium2"
    objective: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0
    learning_rate: float = 1e-3
    warmup: int = 10_000
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    remat: bool = False

    @property
    def network(self) -> ViTConfig:
        sized = SIZES[self.variant]
        return sized(
            image_size=(self.size, self.size),
            num_classes=self.classes,
            representation=sized().width,
            act="gelu_tanh",
            dropout=self.dropout,
            drop_path=self.drop_path,
            head_bias=-6.9 if self.objective == "sigmoid" else 0.0,
            remat=self.remat,
            dtype=self.dtype,
        )

    @functools.cached_property
    def classification(self) -> Classification:
        return Classification(
            ViTClassifier(self.network),
            self.classes,
            objective=self.objective,
            label_smoothing=self.label_smoothing,
            mixing=Mixing(mixup=LEVELS[self.augment][1], keep_larger=True),
            mean=HALF,
            std=HALF,
        )

    def method(self) -> Classification:
        return self.classification

    def host_transforms(self) -> tuple[Transform, ...]:
        magnitude = LEVELS[self.augment][0]
        return (RandomFlip(),) if magnitude is None else (RandAugment(2, magnitude), RandomFlip())

    def optimizer(self) -> Optimizer:
        schedule = linear_warmup_cosine(self.learning_rate, self.steps, self.warmup)
        kernels = excluding("cls", "positions")
        return Optimizer(adamw(schedule, self.weight_decay, mask=kernels), clip_norm=self.clip_norm)

    @property
    def preprocess(self) -> ImagePreprocessing:
        """The short side to 8/7 of the crop's."""
        return ImagePreprocessing(self.size * 8 // 7, (self.size, self.size), resample="bilinear", mean=HALF, std=HALF)

    def model(self) -> tuple[str, ViTConfig]:
        return "vit", self.network
