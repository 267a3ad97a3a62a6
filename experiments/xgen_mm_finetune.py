"""xGen-MM's (BLIP-3's) fine-tuning on instructions: resampler and language model learn to answer, the tower is frozen.

    mmjax train experiments/xgen_mm_finetune.py --init_from Salesforce/xgen-mm-phi3-mini-base-r-v1.5 \\
        --data mix.json --images images
    mmjax chat workdirs/xgen_mm_finetune --image photo.jpg

LAVIS's branch xgen-mm, scripts/example_finetune_xgenmmv1-phi3_mini_4k_instruct.sh and instruction_finetune.py:
batches of 64, AdamW without decay, rate 2e-5 after 2000 steps of warmup, half a cosine to 0, gradients clipped at a
norm of 1, batches of rows of nearly one length. One loss, of the answers alone. A text has at most 2048 ids, an image
counting as one; `length` counts each of its features, 128 for the whole image and for each of up to four tiles. The
script runs one epoch of its data; `steps` is that of a million conversations.
"""

import dataclasses

from mmjax.recipes.xgen_mm import XGenMMStage
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer, adamw, linear_warmup_cosine
from mmjax.training.partition import FROZEN, TRAINABLE, Partition


@dataclasses.dataclass(frozen=True)
class Config(XGenMMStage):
    """init_from and data are required."""

    steps: int = 15_625
    batch_size: int = 64
    checkpoint_every: int = 1000
    seed: int = 42

    def method(self) -> Method:
        return self.plain

    def optimizer(self) -> Optimizer:
        rate = linear_warmup_cosine(self.learning_rate, self.steps, self.warmup_steps)
        return Optimizer(adamw(rate, 0.0), Partition({"vision/**": FROZEN, "**": TRAINABLE}), clip_norm=1.0)
