"""Trains a segmentation network on any image encoder that `mmjax.load` reads: its features, a head, your masks.

    mmjax train experiments/segment.py --init_from facebook/dinov2-small --data rooms --workdir mine
    mmjax train experiments/segment.py --init_from workdirs/moco_v2_resnet50 --data scenes --head upernet --tune all
    mmjax segment mine room.jpg

data: a folder with images/, masks/ and classes.txt, or with train/ and val/ of that form (mmjax.data.masks); or the
word scenes: pictures of sprites made on demand, whose held-out sprites are an evaluation of their own.

    --tune head          a head on the frozen encoder; with --store_maps --no-augment its maps are computed once
    --tune 3             also the encoder's last three blocks
    --tune all           everything, deeper layers more slowly (--layer_decay)

experiments/dense_transfer.py has the figures that different encoders reach on scenes.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mmjax.data.masks import MaskFolder, RandomCropWithMask, ResizeWithMask, mask_split
from mmjax.data.openmoji import ATTRIBUTION
from mmjax.data.pipeline import Pipeline
from mmjax.data.scenes.sources import SceneMasks
from mmjax.errors import MmjaxError
from mmjax.evaluation.segmentation import SegmentationEvaluation
from mmjax.models.dense.network import SegmentationConfig
from mmjax.models.dense.segment import Segmentation
from mmjax.recipes.dense import SCENES, DenseRecipe
from mmjax.training.experiment import Evaluation


@dataclasses.dataclass(frozen=True)
class Config(DenseRecipe):
    """init_from and data are required; the other fields are those of `DenseRecipe`.

    Attributes:
        held_out: share of the images that is evaluated on, where there is no val folder.
        head: "linear" or "upernet". head_width: channels of UPerNet's.
        augment: random crops of at least `crop` of the area, and flips.
    """

    held_out: float = 0.1
    head: Literal["linear", "upernet"] = "linear"
    head_width: int = 256
    augment: bool = True
    crop: float = 0.25

    # ----------------------------------------------------------------------------------------------------------- inputs

    @functools.cached_property
    def folders(self) -> tuple[MaskFolder | SceneMasks, MaskFolder | SceneMasks | None]:
        """(training, held-out images)."""
        if not self.data:
            raise MmjaxError("--data DIR: a folder with images/, masks/ and classes.txt; or --data scenes")
        if self.data != SCENES:
            return mask_split(self.data, self.held_out)
        return self._scenes(self.scenes, "train"), self._scenes(self.test_scenes, "validation")

    @property
    def classes(self) -> tuple[str, ...]:
        return self.folders[0].classes

    def _scenes(self, length: int, split: Any) -> SceneMasks:
        return SceneMasks(length, split, seed=self.seed if split == "train" else 0, size=self.side)

    # ----------------------------------------------------------------------------------------------------------- recipe

    @functools.cached_property
    def network(self) -> SegmentationConfig:
        return SegmentationConfig(self.start.config, len(self.classes), self.head, self.head_width, dtype=self.dtype)

    def method(self) -> Segmentation:
        frozen = self.tune != "all"
        return Segmentation(self.network, self.preprocess.mean, self.preprocess.std, stored_statistics=frozen)

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        shape = (self.batch_size, self.side, self.side)
        shapes = {"image": jax.ShapeDtypeStruct((*shape, 3), jnp.uint8), "mask": jax.ShapeDtypeStruct(shape, jnp.uint8)}
        return self.with_maps(shapes)

    # ------------------------------------------------------------------------------------------------------------- data

    def train_data(self) -> Pipeline:
        classes = len(self.classes)
        resize = ResizeWithMask(self.side, classes)
        if self.store_maps:
            return self.pipeline(self.stored(self.folders[0], resize, self.augment))
        if self.augment:
            return self.pipeline(self.folders[0], RandomCropWithMask(self.side, classes, (self.crop, 1.0)))
        return self.pipeline(self.folders[0], resize)

    def evaluations(self) -> tuple[Evaluation, ...]:
        held_out = self.folders[1]
        if held_out is None:
            return ()
        sources = {"segmentation": held_out}
        if self.data == SCENES:
            sources["segmentation_held_out_sprites"] = self._scenes(self.test_scenes, "sprites")
        return tuple(self._evaluation(name, source) for name, source in sources.items())

    def _evaluation(self, name: str, source: MaskFolder | SceneMasks) -> SegmentationEvaluation:
        resize = ResizeWithMask(self.side, len(source.classes))
        size, bad = min(32, len(source)), self.max_bad_fraction
        data = Pipeline(source, size, transforms=(resize,), workers=self.workers, max_bad_fraction=bad)
        return SegmentationEvaluation(
            name=name,
            predict=self.method().predict,
            data=data,
            class_names=source.classes,
            attribution=ATTRIBUTION if self.data == SCENES else None,
            final_step=self.steps,
        )

    def model(self) -> tuple[str, Any]:
        return "segmentation", self.network
