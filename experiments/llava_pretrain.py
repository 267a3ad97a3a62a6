"""LLaVA's first stage: the connector alone learns to put images in the prompts of a frozen language model.

    mmjax train experiments/llava_pretrain.py --data blip_laion_cc_sbu_558k.json --images images \\
        --init_vision openai/clip-vit-large-patch14-336 --init_language lmsys/vicuna-13b-v1.5

scripts/v1_5/pretrain.sh: one epoch of 558,128 images with captions, batches of 256, rate 1e-3; a text is an image with
its caption (template plain), images are cropped. v1: --layers 1 --learning_rate 2e-3. Tower and language model are
frozen: they have no gradient, no optimizer state, and come out bit-identical.
"""

import dataclasses

from mmjax.models.llava.templates import TEMPLATES, Template
from mmjax.recipes.llava import Parts
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer, adamw, linear_warmup_cosine
from mmjax.training.partition import FROZEN, TRAINABLE, Partition


@dataclasses.dataclass(frozen=True)
class Config(Parts):
    """init_vision, init_language and data are required."""

    steps: int = 2181
    batch_size: int = 256
    checkpoint_every: int = 500

    @property
    def template(self) -> Template:
        return TEMPLATES["plain"]

    def method(self) -> Method:
        return self.plain

    def optimizer(self) -> Optimizer:
        rate = linear_warmup_cosine(self.learning_rate, self.steps, self.warmup_steps)
        return Optimizer(adamw(rate, 0.0), Partition({"connector/**": TRAINABLE, "**": FROZEN}), clip_norm=1.0)
