"""ALBEF on statements about two scenes, as NLVR2's: true or false?

    mmjax ablate experiments/albef_scenes.py --over negatives=easy --seeds 0,1,2 --sequential --workdir runs/scenes
    mmjax ablate experiments/albef_scene_statements.py --init_from "runs/scenes/arms/negatives=easy,seed={seed}" \
        --over images=shown,blank --seeds 0,1,2 --sequential --kinds both one --steps 200 --learning_rate 5e-4

It failed at this size. Accuracy after 200 steps of 64 statements of two kinds ("both", "one"), three seeds, in percent,
200 statements a split:

| images | validation | held-out sprites | held-out pairs |
|---|---|---|---|
| shown | 55.7 ± 3.2 | 48.0 ± 4.3 | 50.2 ± 7.8 |
| blank | 52.8 ± 9.8 | 48.0 ± 6.9 | 47.5 ± 8.7 |
| the more frequent answer | 58.5 | 56.0 | 57.5 |

The loss stays at log 2. The network that it starts from names things in one scene hardly better than chance either
(albef_scenes.py), so that there is little to compare. Longer runs were not tried.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.pipeline import Transform
from mmjax.data.scenes.sources import SceneStatements
from mmjax.data.scenes.two_images import STATEMENT_KINDS, StatementKind
from mmjax.data.sources import Record
from mmjax.data.transforms import BLANK, BlankImages
from mmjax.evaluation.classification import accuracy
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.models.albef.finetune import AlbefClassification
from mmjax.models.albef.network import ALONE, AlbefConfig
from mmjax.models.albef.start import starting_weights
from mmjax.models.albef.tasks import AlbefModel
from mmjax.models.bert.network import BertConfig
from mmjax.recipes.scenes import AlbefScenes
from mmjax.recipes.small_image_text import MEAN, STD
from mmjax.training.experiment import Evaluation
from mmjax.types import Params

SIDES = ("image_0", "image_1")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StatementEvaluation(ScoredEvaluation):
    """Accuracy on the statements of each split, and on each kind of the first split's."""

    name: str = "statements"
    logits: Any
    records: Mapping[str, Sequence[Record]]

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        scores = {}
        for number, (split, records) in enumerate(self.records.items()):
            predicted = np.argmax(self.logits(params, records), axis=1)
            labels = np.array([record["label"] for record in records])
            scores[f"{self.name}_{split}"] = accuracy(predicted, labels)
            if number == 0:
                kinds = np.array([record["kind"] for record in records])
                for kind in dict.fromkeys(kinds.tolist()):
                    scores[f"{self.name}_{kind}"] = accuracy(predicted[kinds == kind], labels[kinds == kind])
        return Outcome(scores, {})


@dataclasses.dataclass(frozen=True)
class Config(AlbefScenes):
    """From a run of `experiments/albef_scenes.py` or, without `init_from`, from random weights.

    Attributes:
        kinds: of statements.
        images: "blank": grey images in training and evaluation, so that the statements alone are read.
        text_depth: of the pre-trained network; each cross-attention layer becomes two, one for each image.
    """

    steps: int = 400
    length: int = 20
    kinds: tuple[StatementKind, ...] = STATEMENT_KINDS
    images: Literal["shown", "blank"] = "shown"
    momentum: float = 0.99
    alpha: float = 0.0

    def source(self) -> SceneStatements:
        return SceneStatements(self.scenes, size=self.image_size, kinds=self.kinds)

    def image_transforms(self) -> tuple[Transform, ...]:
        return (BlankImages(SIDES),) if self.images == "blank" else ()

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        label = jax.ShapeDtypeStruct((self.batch_size,), jnp.int32)
        texts = {name: column for name, column in super().example_batch().items() if name != "image"}
        return texts | dict.fromkeys(SIDES, self.image_column) | {"label": label}

    @property
    def network(self) -> AlbefConfig:
        first = self.text_depth // 2
        sizes: dict[str, Any] = self.text_sizes | {"depth": 2 * self.text_depth - first}
        text = BertConfig(vocab_size=self.tokenizer.vocab_size, cross_from=first, **sizes)
        fields: dict[str, Any] = {"momentum": self.momentum, "alpha": self.alpha}
        return AlbefConfig(self.vision, text, classes=2, two_images=True, **ALONE, **fields)

    def method(self) -> AlbefClassification:
        return AlbefClassification(self.network, mean=MEAN, std=STD)

    def whole_weights(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        return starting_weights(weights, self.network)

    def evaluations(self) -> tuple[Evaluation, ...]:
        records = {}
        for split in self.splits:
            source = SceneStatements(self.test_scenes, split, size=self.image_size, kinds=self.kinds)
            records[split] = [source[index] for index in range(self.test_scenes)]
        return (StatementEvaluation(logits=self.logits, records=records),)

    def logits(self, params: Params, records: Sequence[Record]) -> np.ndarray:
        model = AlbefModel(self.network, params, tokenizer=self.tokenizer, preprocess=self.preprocess)
        sides = [np.stack([record[side] for record in records]) for side in SIDES]
        if self.images == "blank":
            sides = [np.full_like(side, BLANK) for side in sides]
        pixels = [self.preprocess.normalise(side) for side in sides]
        return np.asarray(model.pair_logits("classify", [record["text"] for record in records], 100, *pixels))
