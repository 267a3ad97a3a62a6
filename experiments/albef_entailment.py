"""ALBEF on SNLI-VE, does an image entail a sentence? (arXiv 2107.07651; configs/VE.yaml): 5 epochs in batches of 256.

    mmjax train experiments/albef_entailment.py --data data --images flickr30k --init_from ALBEF.pth
    mmjax evaluate workdirs/albef_entailment --task entailment --data data/ve_test.json --images flickr30k

The published figures are those of the best epoch on the validation file.
"""

import dataclasses

import jax

from mmjax.data.sources import Source
from mmjax.data.task_lists import EntailmentList
from mmjax.models.albef.finetune import AlbefClassification
from mmjax.models.albef.network import AlbefConfig
from mmjax.recipes.albef import AlbefRecipe


@dataclasses.dataclass(frozen=True)
class Config(AlbefRecipe):
    """The published recipe. alpha does not rise: it is there from the first step."""

    steps: int = 5 * 2_068
    batch_size: int = 256
    files: tuple[str, ...] = ("ve_train.json",)
    examples: int = 529_527
    learning_rate: float = 2e-5

    def source(self) -> Source:
        return EntailmentList(self.paths, self.images)

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        return super().example_batch() | self.label_column("label")

    @property
    def network(self) -> AlbefConfig:
        return self.sized(AlbefConfig.entailment(self.size, **self.fields))

    def method(self) -> AlbefClassification:
        return AlbefClassification(self.network)
