"""The base of experiments/segment.py and detect.py: a loaded image encoder, and a new head on its feature maps."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import hub
from mmjax.data.labels import write_labels
from mmjax.data.pipeline import Pipeline, batches
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.sources import ArraySource
from mmjax.errors import MmjaxError
from mmjax.evaluation.features import Extractor
from mmjax.interface.image_classifier import Headless, ImageClassifier
from mmjax.models import SYSTEMS
from mmjax.models.dense.detect import Detection
from mmjax.models.dense.frozen import MAPS, flat_maps, in_dtype
from mmjax.models.dense.pyramid import without_pooling
from mmjax.models.dense.segment import Segmentation
from mmjax.training.experiment import ExperimentConfig, LoadWeights
from mmjax.training.finetune import HEAD, Layers, partition, tuning_optimizer
from mmjax.training.optimizer import Optimizer, warmup_cosine
from mmjax.types import Array, Params

SCENES = "scenes"
"""The value of `data` for pictures that are made on demand (mmjax.data.scenes)."""


@dataclasses.dataclass(frozen=True)
class DenseRecipe(ExperimentConfig, abc.ABC):
    """init_from and data are required. The experiments add data, head and method.

    Attributes:
        data: files or a folder, see the experiment; or scenes.
        scenes, test_scenes: numbers of training scenes and of scenes of each evaluation.
        tune: "head", "all", or the number of last blocks. Unless all is trained, batch normalisation uses the stored
            statistics, which do not change.
        from_scratch: the encoder of init_from with random weights, for comparison.
        store_maps: the feature maps of all training images are computed once and stay in memory. Only with tune=head
            and without augmentation.
        image_size: side of the images, pixels; None: that of the model's preprocessing. Whole images are squashed.
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
    scenes: int = 20_000
    test_scenes: int = 500
    tune: Literal["head", "all"] | int = "head"
    from_scratch: bool = False
    store_maps: bool = False
    image_size: int | None = None
    learning_rate: float | None = None
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    @abc.abstractmethod
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""

    @abc.abstractmethod
    def method(self) -> Segmentation | Detection:
        """Of the encoder `start` and a new head."""

    @abc.abstractmethod
    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""

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

    @functools.cached_property
    def encoder(self) -> tuple[Params, Params]:
        """(parameters, batch statistics) that training starts from."""
        if not self.from_scratch:
            return self.start.params, self.start.stats
        method = self.method()
        zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in self.example_batch().items()}
        params, carry = jax.jit(method.init)(jax.random.key(self.seed), zeros)
        return jax.device_get((params["backbone"], carry.stats.get("backbone", {})))

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        """The weights of the encoder; the head is initialised."""
        params, stats = self.encoder
        return {"params": {"backbone": params}, "stats": {"backbone": stats} if stats else {}}

    def with_maps(self, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch, with the stored maps where there are any."""
        if not self.store_maps:
            return shapes
        maps = jax.eval_shape(self._maps, self.start.params, self.start.stats, shapes["image"])
        return shapes | {MAPS: jax.ShapeDtypeStruct(maps.shape, maps.dtype)}

    def _maps(self, params: Params, stats: Params, images: Array) -> Array:
        method = self.method()
        return flat_maps(in_dtype(method.config), params, stats, method.pixels(images))

    def stored(self, source: Any, resize: Any, augmented: bool) -> ArraySource:
        """The readable records of a source, resized, with their maps.

        Raises MmjaxError where the maps would not stay the same: augmentation, or a trained encoder.
        """
        if augmented or self.tune != "head":
            other = "augmentation" if augmented else f"tune={self.tune}"
            raise MmjaxError(f"store_maps: {other} changes the maps in each epoch; need tune=head and no augmentation")
        size, bad = min(64, len(source)), self.max_bad_fraction
        once = Pipeline(
            source, size, shuffle=False, epochs=1, drop_remainder=False,
            transforms=(resize,), workers=self.workers, max_bad_fraction=bad,
        )  # fmt: skip
        parts = list(batches(once))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        _, first = np.unique(columns.pop("index"), return_index=True)  # not what replaces an unreadable record
        columns = {name: column[first] for name, column in columns.items()}
        maps = Extractor(self._maps, batch_size=size)(*self.encoder, columns["image"], source.name)
        return ArraySource(name=source.name, **columns, **{MAPS: maps})

    def pipeline(self, source: Any, *transforms: Any) -> Pipeline:
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

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """The names of the classes."""
        workdir.mkdir(parents=True, exist_ok=True)
        write_labels(self.classes, workdir)
        return {"preprocess": dataclasses.asdict(self.preprocess)}
