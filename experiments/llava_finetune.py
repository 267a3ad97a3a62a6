"""LLaVA's second stage: the connector and the language model, whole or by adapters, learn to answer.

    mmjax train experiments/llava_finetune.py --init_from workdirs/llava_pretrain --data llava_v1_5_mix665k.json \\
        --images images
    mmjax chat workdirs/llava_finetune --image photo.jpg

scripts/v1_5/finetune.sh: one epoch of 665,298 conversations, batches of 128, rate 2e-5; finetune_lora.sh (--tune lora):
rank 128, alpha 256, dropout 0.05 on all matrices of the language model, rate 2e-4, and 2e-5 for the connector. Answers
alone are learned. Images are padded to squares; the tower stays frozen. Batches are of rows of nearly one length and of
one modality, as the original's group_by_modality_length has them.
"""

import dataclasses
from typing import Literal

from mmjax.recipes.llava import Whole
from mmjax.training.lora import LoRA, LoRAConfig
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer, adamw, linear_warmup_cosine
from mmjax.training.partition import FROZEN, TRAINABLE, Partition

CONNECTOR = "connector"


@dataclasses.dataclass(frozen=True)
class Config(Whole):
    """init_from and data are required.

    Attributes:
        tune: "all": the language model; "lora": adapters on its layers that `lora` names.
        learning_rate: of the language model or its adapters. connector_rate: of the connector with tune="lora".
    """

    steps: int = 5198
    batch_size: int = 128
    checkpoint_every: int = 1000
    grouped: bool = True
    learning_rate: float = 2e-5
    tune: Literal["all", "lora"] = "all"
    lora: LoRAConfig = dataclasses.field(
        default_factory=lambda: LoRAConfig(
            ("language/block_*/attention/*", "language/block_*/mlp/*"), 128, 256.0, dropout=0.05
        )
    )
    connector_rate: float = 2e-5

    def method(self) -> Method:
        return LoRA(self.plain, self.lora) if self.tune == "lora" else self.plain

    def optimizer(self) -> Optimizer:
        def chain(peak: float):
            return adamw(linear_warmup_cosine(peak, self.steps, self.warmup_steps), 0.0)

        if self.tune == "all":
            rules = {"vision/**": FROZEN, "**": TRAINABLE}
            return Optimizer(chain(self.learning_rate), Partition(rules), clip_norm=1.0)
        rules = {"connector/**": CONNECTOR, **self.lora.partition().rules}
        transforms = {TRAINABLE: chain(self.learning_rate), CONNECTOR: chain(self.connector_rate)}
        return Optimizer(transforms, Partition(rules), clip_norm=1.0)
