"""BLIP's pre-training on the 14 M images with bootstrapped captions (arXiv 2201.12086; configs/pretrain.yaml): 20
epochs in batches of 2,880, as in the paper (the repository's file has 75 pairs a process).

    mmjax plan experiments/blip_pretrain.py --topology v5e:8x8        # what it takes, without data or devices
    mmjax train experiments/blip_pretrain.py --data pretrain --images / --init_vision facebook/deit-base-patch16-224 \
        --init_text bert-base-uncased

On v5e:8x8 a step with `--dtype bfloat16` takes 14.7 GiB and about 1.25 of code: 0.24 more than the 15.75 that a
program gets there. The state takes 3.8 (with ViT-L 7.1), temporaries 11.0. It is bound by memory traffic: 303 ms at
least (71 of arithmetic), at most 9,506 pairs a second. On v4:4x4x4 it
fits, with 17.8 of 32 GiB: 232 ms at least, 12,416 pairs a second at most.

With ViT-L: `--large --batch_size 2400 --learning_rate 2e-4` (queue and batch still fit). The numbers of entries are the
paper's, rounded; other ones are an error that names the flags. The 129 M of the paper, with LAION's 115 M, of which an
epoch has a fifth, and so the next file: `--rotating laion_0.json laion_1.json laion_2.json laion_3.json laion_4.json`,
with the `--examples` of an epoch.
"""

import dataclasses
import pathlib

from mmjax.data.image_text import ImageTextList
from mmjax.data.sources import Rotation, Source
from mmjax.models.blip.network import BlipConfig
from mmjax.models.blip.pretrain import BlipPretraining
from mmjax.recipes.blip import BlipRecipe
from mmjax.training.optimizer import Schedule, warmup_epoch_decay


@dataclasses.dataclass(frozen=True)
class Config(BlipRecipe):
    """The published recipe.

    Attributes:
        rotating: more files, of which each epoch has one, in turn; of as many entries each as the shortest.
        groups: the paper's 32 processes.
        warmup: steps of the first epoch, from 1e-6 to learning_rate.
        decay: of the rate from epoch to epoch, to 1e-6 at least (the paper's text says 0.85).
        queue: keys of earlier batches, a multiple of batch_size.
    """

    steps: int = 20 * 8_576
    batch_size: int = 2_880
    files: tuple[str, ...] = (
        "coco_karpathy_train.json",
        "vg_caption.json",
        "ccs_filtered.json",
        "ccs_synthetic_filtered.json",
    )
    rotating: tuple[str, ...] = ()
    examples: int = 24_700_000
    size: int = 224
    length: int = 30
    groups: int = 32
    learning_rate: float = 3e-4
    warmup: int = 3_000
    decay: float = 0.9
    queue: int = 57_600

    crop_min = 0.2

    def source(self) -> Source:
        """The files, and with `rotating` one more in each epoch."""
        parts = [ImageTextList(pathlib.Path(self.data) / file, self.images) for file in self.rotating]
        return Rotation(super().source(), parts) if parts else super().source()

    @property
    def network(self) -> BlipConfig:
        kind = BlipConfig.large if self.large else BlipConfig.base
        return self.sized(kind(self.size, queue=self.queue, **self.fields))

    def schedule(self) -> Schedule:
        return warmup_epoch_decay(self.learning_rate, self.epoch, self.warmup, self.decay, start=1e-6, end=1e-6)

    def method(self) -> BlipPretraining:
        return BlipPretraining(self.network, alpha_steps=2 * self.epoch, groups=self.groups)
