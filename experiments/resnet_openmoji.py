"""A small ResNet on the nine groups of OpenMoji's drawings: what MoCo's features are compared with.

    mmjax train experiments/resnet_openmoji.py --workdir workdirs/resnet_openmoji

The network, the drawings, the random views and the optimizer are those of experiments/moco_openmoji.py; here the groups
are trained on. Evaluated on the held-out drawings' groups, on the same emoji among other vendors' drawings, and by
segmentation of scenes with a linear head on the frozen feature maps.

Means and standard deviations of three seeds after 500 steps (`mmjax ablate`, --over learning_rate=0.12):

| | instances R@1 | instances R@5 | scenes mIoU | held-out sprites |
|---|---|---|---|---|
| supervised | 19.2 ± 0.2 | 31.6 ± 0.8 | 30.7 ± 0.6 | 29.1 ± 0.6 |
| MoCo, m = 0.99 | 22.3 ± 0.6 | 38.5 ± 1.0 | 29.6 ± 0.9 | 28.3 ± 0.9 |
| untrained | 16.7 ± 1.7 | 27.8 ± 3.1 | 24.8 ± 1.1 | 24.6 ± 0.3 |

The groups of 61.5 ± 1.5 % of the held-out drawings are right (largest group: 18.1 %) at 32 pixels a side, the size of
the training views; at 64 pixels, of 17.6 %. Instance retrieval is at 64 pixels in all rows. There MoCo's features are
better; in scenes they are not, and experiments/dense_transfer.py has detection too.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.labels import write_labels
from mmjax.data.openmoji import ATTRIBUTION, load_openmoji
from mmjax.evaluation.classification import ClassificationEvaluation
from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.models.resnet.supervised import ResNetClassifier
from mmjax.recipes.drawings import MEAN, STD, DrawingRecipe
from mmjax.training.augment import one_view
from mmjax.training.classification import Classification
from mmjax.training.experiment import Evaluation
from mmjax.training.method import Augmented
from mmjax.types import Array, Float, Params


@dataclasses.dataclass(frozen=True)
class Config(DrawingRecipe):
    """Sizes of a run of a minute; the fields are those of `DrawingRecipe`."""

    @property
    def network(self) -> ResNetConfig:
        return dataclasses.replace(self.backbone, num_classes=len(self.pairs.groups))

    @functools.cached_property
    def classification(self) -> Classification:
        return Classification(ResNetClassifier(self.network), len(self.pairs.groups), mean=MEAN, std=STD)

    def method(self) -> Augmented:
        return Augmented(self.classification, one_view(self.view))

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        return {"image": self.images, "label": jax.ShapeDtypeStruct((self.batch_size,), jnp.int32)}

    def encode(self, params: Params, state: Any, images: Array) -> Float[Array, "b d"]:
        """Pooled features of whole drawings, uint8 [b, height, width, 3]."""
        encoder, stats = self.encoder(params, state)
        pixels = self.classification.pixels(images)
        outputs: Any = ResNet(self.backbone).apply({"params": encoder, "batch_stats": stats}, pixels)
        return outputs["pooled"]

    def encoder(self, params: Params, state: Any) -> tuple[Params, Params]:
        """(parameters, batch statistics) without the head."""
        return {name: leaf for name, leaf in params.items() if name != "head"}, state.stats

    def evaluations(self) -> tuple[Evaluation, ...]:
        # At the size of the views: the head was trained on drawings of that scale.
        held_out = load_openmoji(self.view_size).held_out.columns
        groups = ClassificationEvaluation(
            logits=self.classification.predict,
            images=np.asarray(held_out["image"]),
            labels=np.asarray(held_out["label"]),
            class_names=self.pairs.groups,
            final_step=self.steps,
            attribution=ATTRIBUTION,
        )
        instances, scenes = self.judges(self.encode, self.encoder)
        return groups, *instances, *scenes

    def model(self) -> tuple[str, ResNetConfig]:
        return "resnet", self.network

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """The names of the groups, and the preprocessing to the size of the views."""
        workdir.mkdir(parents=True, exist_ok=True)
        write_labels(self.pairs.groups, workdir)
        return {"preprocess": dataclasses.asdict(self.preprocess(self.view_size))}
