"""Trains a segmentation network on any image encoder that `mmjax.load` reads: its features, a head, your masks.

    mmjax train experiments/segment.py --init_from facebook/dinov2-small --data rooms --workdir mine
    mmjax train experiments/segment.py --init_from workdirs/moco_v2_resnet50 --data scenes --head upernet --tune all
    mmjax segment mine room.jpg

data: a folder with images/, masks/ and classes.txt, or with train/ and val/ of that form (mmjax.data.masks); or the
word scenes: pictures of sprites made on demand, whose held-out sprites are an evaluation of their own.

    --tune head          a head on the frozen encoder
    --tune 3             also the encoder's last three blocks
    --tune all           everything, deeper layers more slowly (--layer_decay)
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mmjax import hub
from mmjax.data.labels import write_labels
from mmjax.data.masks import MaskFolder, RandomCropWithMask, ResizeWithMask, mask_split
from mmjax.data.openmoji import ATTRIBUTION
from mmjax.data.pipeline import Pipeline
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.scenes.sources import SceneMasks
from mmjax.errors import MmjaxError
from mmjax.evaluation.segmentation import SegmentationEvaluation
from mmjax.interface.image_classifier import Headless, ImageClassifier
from mmjax.models import SYSTEMS
from mmjax.models.dense.network import SegmentationConfig
from mmjax.models.dense.pyramid import without_pooling
from mmjax.models.dense.segment import Segmentation
from mmjax.training.experiment import Evaluation, ExperimentConfig, LoadWeights
from mmjax.training.finetune import HEAD, Layers, partition, tuning_optimizer
from mmjax.training.optimizer import Optimizer, warmup_cosine

SCENES = "scenes"


@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    """init_from and data are required.

    Attributes:
        data: a folder, see above, or scenes.
        held_out: share of the images that is evaluated on, where there is no val folder.
        scenes, test_scenes: numbers of training scenes and of scenes of each evaluation.
        head: "linear" or "upernet". head_width: channels of UPerNet's.
        tune: "head", "all", or the number of last blocks. Unless all is trained, batch normalisation uses the stored
            statistics, which do not change.
        from_scratch: the encoder of init_from with random weights, for comparison.
        image_size: side of the images, pixels; None: that of the model's preprocessing. Whole images are squashed.
        augment: random crops of at least `crop` of the area, and flips.
        learning_rate: of the head, peak; warmup over a tenth of the steps and half a cosine. None: 1e-3 for the head
            alone, else 1e-4.
        layer_decay: factor on the rate from each layer to the one below it.
        weight_decay: of matrices alone.
        max_bad_fraction: share of unreadable images past which the run stops.
    """

    steps: int = 2000
    batch_size: int = 16
    eval_every: int = 500
    max_bad_fraction: float = 0.1
    data: str = ""
    held_out: float = 0.1
    scenes: int = 20_000
    test_scenes: int = 500
    head: Literal["linear", "upernet"] = "linear"
    head_width: int = 256
    tune: Literal["head", "all"] | int = "head"
    from_scratch: bool = False
    image_size: int | None = None
    augment: bool = True
    crop: float = 0.25
    learning_rate: float | None = None
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    dtype: Literal["float32", "bfloat16"] = "float32"

    # ----------------------------------------------------------------------------------------------------------- inputs

    @functools.cached_property
    def folders(self) -> tuple[MaskFolder | SceneMasks, MaskFolder | SceneMasks | None]:
        if not self.data:
            raise MmjaxError("--data DIR: a folder with images/, masks/ and classes.txt; or --data scenes")
        if self.data != SCENES:
            return mask_split(self.data, self.held_out)
        return self._scenes(self.scenes, "train"), self._scenes(self.test_scenes, "validation")

    def _scenes(self, length: int, split: Any) -> SceneMasks:
        return SceneMasks(length, split, seed=self.seed if split == "train" else 0, size=self.side)

    @functools.cached_property
    def start(self) -> Headless:
        """The loaded encoder without a head."""
        if self.init_from is None:
            raise MmjaxError("--init_from MODEL: a file, a folder, a hub id or a workdir to start from")
        start = hub.load(self.init_from).headless(0, self.image_size)
        size = start.preprocess.size
        if size is None or size[0] != size[1]:
            raise MmjaxError(f"{self.init_from}: its preprocessing makes no squares ({size}): --image_size sets a side")
        config, params = without_pooling(start.config, start.params)
        return dataclasses.replace(start, config=config, params=params)

    @property
    def side(self) -> int:
        assert self.start.preprocess.size is not None
        return self.start.preprocess.size[0]

    @property
    def preprocess(self) -> ImagePreprocessing:
        """The whole image, squashed; the mean and std of the encoder's."""
        before = self.start.preprocess
        return ImagePreprocessing((self.side, self.side), None, "floor", "bilinear", before.mean, before.std)

    # ----------------------------------------------------------------------------------------------------------- recipe

    @functools.cached_property
    def network(self) -> SegmentationConfig:
        classes = len(self.folders[0].classes)
        return SegmentationConfig(self.start.config, classes, self.head, self.head_width, dtype=self.dtype)

    def method(self) -> Segmentation:
        frozen = self.tune != "all"
        return Segmentation(self.network, self.preprocess.mean, self.preprocess.std, stored_statistics=frozen)

    @property
    def layers(self) -> Layers:
        """Globs of parameter paths by depth: the encoder's, and the head after the last."""
        kind: Any = next(system for system in SYSTEMS if system.name == self.start.system).model
        assert issubclass(kind, ImageClassifier)
        encoder = [[f"backbone/{glob}" for glob in globs if glob != HEAD] for globs in kind.layers(self.start.config)]
        return [*encoder[:-1], [*encoder[-1], HEAD]]

    def optimizer(self) -> Optimizer:
        rate = self.learning_rate if self.learning_rate is not None else 1e-3 if self.tune == "head" else 1e-4
        return tuning_optimizer(
            warmup_cosine(rate, self.steps, self.steps // 10),
            self.layers,
            partition({"backbone": self.start.params}, self.layers, self.tune),
            weight_decay=self.weight_decay,
            decay=self.layer_decay,
        )

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        """The weights of the encoder; the head is initialised."""
        if self.from_scratch:
            return {"params": {}, "stats": {}}
        stats = {"backbone": self.start.stats} if self.start.stats else {}
        return {"params": {"backbone": self.start.params}, "stats": stats}

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        shape = (self.batch_size, self.side, self.side)
        return {"image": jax.ShapeDtypeStruct((*shape, 3), jnp.uint8), "mask": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    # ------------------------------------------------------------------------------------------------------------- data

    def train_data(self) -> Pipeline:
        classes = len(self.folders[0].classes)
        if self.augment:
            return self._pipeline(self.folders[0], RandomCropWithMask(self.side, classes, (self.crop, 1.0)))
        return self._pipeline(self.folders[0], ResizeWithMask(self.side, classes))

    def _pipeline(self, source: Any, *transforms: Any) -> Pipeline:
        return Pipeline(
            source,
            self.batch_size,
            seed=self.seed,
            transforms=transforms,
            workers=self.workers,
            max_bad_fraction=self.max_bad_fraction,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

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

    # ---------------------------------------------------------------------------------------------------------- workdir

    def model(self) -> tuple[str, Any]:
        return "segmentation", self.network

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """The names of the classes, for `mmjax segment`."""
        workdir.mkdir(parents=True, exist_ok=True)
        write_labels(self.folders[0].classes, workdir)
        return {"preprocess": dataclasses.asdict(self.preprocess)}
