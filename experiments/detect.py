"""Trains a detector on any image encoder that `mmjax.load` reads: FCOS on a pyramid of its features, your boxes.

    mmjax train experiments/detect.py --init_from facebook/dinov2-small --data coco/train.json --test coco/val.json \\
        --images coco/images --workdir mine
    mmjax train experiments/detect.py --init_from workdirs/moco_v2_resnet50 --data scenes --tune all
    mmjax detect mine street.jpg

data: a COCO file of instances (mmjax.data.boxes); or the word scenes: pictures of sprites made on demand, whose
held-out sprites are an evaluation of their own. AP needs pycocotools: pip install "mmjax[detection]".

    --tune head          pyramid and head on the frozen encoder; with --store_maps --no-flip its maps are computed once
    --tune 3             also the encoder's last three blocks
    --tune all           everything, deeper layers more slowly (--layer_decay)

experiments/dense_transfer.py has the figures that different encoders reach on scenes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.data.boxes import CocoBoxes, ResizeWithBoxes, scenes_as_coco
from mmjax.data.openmoji import ATTRIBUTION
from mmjax.data.pipeline import Pipeline
from mmjax.data.scenes.sources import SceneBoxes
from mmjax.errors import MmjaxError
from mmjax.evaluation.detection import DetectionEvaluation
from mmjax.models.dense.detect import Detection
from mmjax.models.dense.detector import DetectionConfig
from mmjax.recipes.dense import SCENES, DenseRecipe
from mmjax.training.experiment import Evaluation


@dataclasses.dataclass(frozen=True)
class Config(DenseRecipe):
    """init_from and data are required; the other fields are those of `DenseRecipe`.

    Attributes:
        test: a COCO file to evaluate on, with the same categories; None: no evaluation.
        images: the folder of the files' images; None: each file's own.
        head_width, convs, coarse: see `DetectionConfig`; coarse=2 (FCOS) is for images of 500 pixels and more.
        most: boxes of an image in training; the largest stay.
        flip: mirrors half of the training images.
    """

    test: str | None = None
    images: str | None = None
    head_width: int = 256
    convs: int = 4
    coarse: int = 2
    most: int = 100
    flip: bool = True

    # ----------------------------------------------------------------------------------------------------------- inputs

    @functools.cached_property
    def sources(self) -> dict[str, CocoBoxes | SceneBoxes]:
        """ "train", and the name of each evaluation."""
        if not self.data:
            raise MmjaxError("--data FILE.json: a COCO file of instances; or --data scenes")
        if self.data == SCENES:
            splits: dict[str, Any] = {"detection": "validation", "detection_held_out_sprites": "sprites"}
            tests = {name: SceneBoxes(self.test_scenes, split, size=self.side) for name, split in splits.items()}
            return {"train": SceneBoxes(self.scenes, "train", seed=self.seed, size=self.side), **tests}
        train = CocoBoxes(self.data, self.images)
        if self.test is None:
            return {"train": train}
        test = CocoBoxes(self.test, self.images)
        if test.classes != train.classes:
            raise MmjaxError(f"{self.test}: other categories than {self.data}")
        return {"train": train, "detection": test}

    @property
    def classes(self) -> tuple[str, ...]:
        return self.sources["train"].classes

    # ----------------------------------------------------------------------------------------------------------- recipe

    @functools.cached_property
    def network(self) -> DetectionConfig:
        sizes = self.head_width, self.convs, self.coarse
        return DetectionConfig(self.start.config, len(self.classes), *sizes, dtype=self.dtype)

    def method(self) -> Detection:
        frozen = self.tune != "all"
        return Detection(self.network, self.preprocess.mean, self.preprocess.std, stored_statistics=frozen)

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        b, side, most = self.batch_size, self.side, self.most
        shapes = {"image": ((b, side, side, 3), jnp.uint8), "boxes": ((b, most, 4), jnp.float32)}
        shapes["labels"] = ((b, most), jnp.int32)
        return self.with_maps({name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()})

    # ------------------------------------------------------------------------------------------------------------- data

    def train_data(self) -> Pipeline:
        resize = ResizeWithBoxes(self.side, self.most, self.flip)
        if self.store_maps:
            return self.pipeline(self.stored(self.sources["train"], resize, self.flip))
        return self.pipeline(self.sources["train"], resize)

    def evaluations(self) -> tuple[Evaluation, ...]:
        return tuple(self._evaluation(*item) for item in self.sources.items() if item[0] != "train")

    def _evaluation(self, name: str, source: CocoBoxes | SceneBoxes) -> DetectionEvaluation:
        resize = ResizeWithBoxes(self.side, self.most)
        size, bad = min(16, len(source)), self.max_bad_fraction
        scenes = isinstance(source, SceneBoxes)
        return DetectionEvaluation(
            name=name,
            predict=self.method().predict,
            data=Pipeline(source, size, transforms=(resize,), workers=self.workers, max_bad_fraction=bad),
            ground_truth=scenes_as_coco(source) if scenes else source.ground_truth,
            attribution=ATTRIBUTION if scenes else None,
            final_step=self.steps,
        )

    def model(self) -> tuple[str, Any]:
        return "detection", self.network
