"""ALBEF's pre-training on 14 M images (arXiv 2107.07651; configs/Pretrain.yaml): 30 epochs in batches of 512.

    mmjax plan experiments/albef_pretrain.py --topology v5e:4x4        # what it takes, without data or devices
    mmjax train experiments/albef_pretrain.py --data pretrain --images / --init_vision facebook/deit-base-patch16-224 \
        --init_text bert-base-uncased

On v5e:4x4 a step with `--dtype bfloat16` takes 13.2 of a chip's 16 GiB: the state 3.3 (parameters and momentum encoders
0.78 each, Adam's moments 1.56, queues 0.13), temporaries 9.0, code about 1.0. It is bound by memory traffic: 218 ms at
least (47 of arithmetic), at most 2,348 pairs a second. The plan took 6 minutes on a busy core. `--mesh.fsdp 4` cuts the
state to 0.8. On v4:2x2x4 it takes 13.7 of 32 GiB and 159 ms at least, bound likewise.

The 4 M set, without CC12M: `--files coco.json vg.json cc3m_train.json cc3m_val.json sbu.json --examples 5146000 --steps
301530`. The numbers of entries are the paper's, rounded; other ones are an error that names the flags.
"""

import dataclasses

from mmjax.models.albef.network import AlbefConfig
from mmjax.models.albef.pretrain import AlbefPretraining
from mmjax.recipes.albef import AlbefRecipe


@dataclasses.dataclass(frozen=True)
class Config(AlbefRecipe):
    """The published recipe.

    Attributes:
        queue: keys of earlier batches, a multiple of batch_size.
    """

    steps: int = 30 * 29_699
    batch_size: int = 512
    files: tuple[str, ...] = ("coco.json", "vg.json", "cc12m.json", "cc3m_train.json", "cc3m_val.json", "sbu.json")
    examples: int = 15_206_000
    size: int = 256
    length: int = 25
    learning_rate: float = 1e-4
    warmup: int = 20
    last_rate: float = 1e-5
    queue: int = 65_536

    crop_min = 0.2

    @property
    def network(self) -> AlbefConfig:
        return self.sized(AlbefConfig.base(self.size, queue=self.queue, **self.fields))

    def method(self) -> AlbefPretraining:
        return AlbefPretraining(self.network, alpha_steps=self.epoch, groups=self.groups)
