"""BLIP-2's first stage of pre-training on COCO and Visual Genome, as LAVIS releases it (arXiv 2301.12597; LAVIS
projects/blip2/train/pretrain_stage1.yaml): 10 epochs in batches of 1,600, with the image encoder frozen.

    mmjax plan experiments/blip2_stage1.py --topology v5e:8x8         # what it takes, without data or devices
    mmjax train experiments/blip2_stage1.py --data pretrain --images / --init_vision eva_vit_g.pth \
        --init_text bert-base-uncased

With CLIP's ViT-L/14: `--tower clip_l --init_vision openai/clip-vit-large-patch14`. The paper's own run, on 129 M
images, has 250,000 steps in batches of 1,680 (ViT-L: 2,320), `--b2 0.98 --warmup 2000`. The number of entries is that
of BLIP's paper, rounded; another one is an error that names the flags. The warmup is longer than an epoch of these two
data sets, and the schedule cuts it off, as the original's does. RandAugment, which the original has for Visual Genome
alone, is left out.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from mmjax import tree
from mmjax.data.pipeline import Transform
from mmjax.data.transforms import RandomFlip, RandomResizedCrop
from mmjax.models.blip2.network import FROZEN_TOWER, Blip2Config
from mmjax.models.blip2.pretrain import Blip2Pretraining
from mmjax.models.blip2.tasks import DEC
from mmjax.recipes.image_text import PublishedRecipe
from mmjax.text.captions import BLIP2_RULES
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.training.experiment import LoadWeights
from mmjax.training.optimizer import Optimizer, Schedule, adamw, all_but_vectors, warmup_epoch_cosine
from mmjax.training.partition import Partition


@dataclasses.dataclass(frozen=True)
class Config(PublishedRecipe):
    """The published recipe.

    Attributes:
        tower: the image encoder: EVA-CLIP's g/14 or CLIP's L/14, each without its last block.
        groups: the original's 16 processes: captions have a mean in each; contrast and matching are over all.
        learning_rate, start_rate, end_rate, warmup: see `warmup_epoch_cosine`.
        weight_decay: of the queries, matrices, tables and the temperature, not of norms and biases.
        b2: AdamW's.
        vision_dtype: of the frozen encoder's computation, and of its matrices where a source provides them.
    """

    clean = staticmethod(BLIP2_RULES.caption)
    sep = True
    crop_min = 0.5

    steps: int = 10 * 867
    batch_size: int = 1_600
    files: tuple[str, ...] = ("coco_karpathy_train.json", "vg_caption.json")
    examples: int = 1_388_000
    size: int = 224
    length: int = 32
    groups: int = 16
    tower: Literal["eva_g", "clip_l"] = "eva_g"
    learning_rate: float = 1e-4
    start_rate: float = 1e-6
    end_rate: float = 1e-5
    warmup: int = 5_000
    weight_decay: float = 0.05
    b2: float = 0.999
    vision_dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @functools.cached_property
    def tokenizer(self) -> WordPieceTokenizer:
        """With [DEC]."""
        return super().tokenizer.with_appended((DEC,))

    @property
    def network(self) -> Blip2Config:
        kind = Blip2Config.eva_g if self.tower == "eva_g" else Blip2Config.clip_l
        config = kind(self.size, dtype=self.dtype, vision_dtype=self.vision_dtype)
        return dataclasses.replace(config, qformer=dataclasses.replace(config.qformer, remat=self.remat))

    def image_transforms(self) -> tuple[Transform, ...]:
        """A crop and a flip, no RandAugment (blip_processors.py, blip2_image_train)."""
        return RandomResizedCrop(self.size, (self.crop_min, 1.0), resample="bicubic"), RandomFlip()

    def schedule(self) -> Schedule:
        rates = {"start": self.start_rate, "end": self.end_rate}
        return warmup_epoch_cosine(self.learning_rate, self.epochs, self.epoch, self.warmup, **rates)

    def optimizer(self) -> Optimizer:
        transform = adamw(self.schedule(), self.weight_decay, b2=self.b2, mask=all_but_vectors)
        return Optimizer(transform, Partition(FROZEN_TOWER))

    def method(self) -> Blip2Pretraining:
        return Blip2Pretraining(self.network, groups=self.groups, detached=True)

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        """The encoder's last norm starts afresh, unless `init_from` is a whole network."""
        weights = dict(super().initial_weights(load))
        params = tree.flatten(weights["params"])
        if self.init_from is None:
            params = {path: leaf for path, leaf in params.items() if not path.startswith("vision/norm/")}
        if self.vision_dtype == "bfloat16":
            matrices = (path for path in params if tree.matches(path, "vision/**/kernel"))
            params |= {path: jnp.asarray(params[path]).astype(jnp.bfloat16) for path in matrices}
        origins = {path: source for path, source in weights.get("origins", {}).items() if path in params}
        return weights | {"params": tree.unflatten(params)} | ({"origins": origins} if origins else {})

    def model(self) -> tuple[str, Blip2Config]:
        return "blip2", self.network
