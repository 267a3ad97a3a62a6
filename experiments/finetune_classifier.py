"""Makes a classifier of any image encoder that `mmjax.load` reads, on a folder of your images.

    mmjax train experiments/finetune_classifier.py --init_from facebook/dinov2-small --data photos --workdir mine
    mmjax classify mine picture.jpg

photos/<class>/*.jpg: a tenth of each class is held out for evaluation. Or photos/train/<class>/* and
photos/val/<class>/* (or test). ResNet, ViT, DeiT, DINOv2, CLIP's image tower, MoCo's backbone: a file, a folder, a hub
id or a run's workdir; its head is dropped.

    --tune head          a linear head on the frozen network; without --augment its features are computed once
    --tune 3             also the last three blocks
    --tune all           everything, deeper layers more slowly (--layer_decay)
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import hub
from mmjax.data.image_folder import ImageFolder, labelled_split
from mmjax.data.labels import write_labels
from mmjax.data.pipeline import Pipeline
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.sources import ArraySource
from mmjax.data.transforms import RandomFlip, RandomResizedCrop, Resize
from mmjax.errors import MmjaxError
from mmjax.evaluation.classification import ClassificationEvaluation
from mmjax.evaluation.feature_cache import cached_features
from mmjax.evaluation.features import Extractor
from mmjax.interface.image_classifier import Headless, ImageClassifier
from mmjax.models import SYSTEMS
from mmjax.training.classification import Classification
from mmjax.training.experiment import Evaluation, ExperimentConfig, LoadWeights
from mmjax.training.finetune import HeadOnFeatures, StoredStatistics, partition, tuning_optimizer
from mmjax.training.optimizer import Optimizer, warmup_cosine
from mmjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    """Sized for a few hundred images and up. init_from and data are required.

    Attributes:
        data: a folder of images in a folder a class, or of train and val (or test) folders of that form.
        held_out: share of each class that is evaluated on and not trained on, where there is no val folder.
        tune: "head", "all", or the number of last blocks. Unless all is trained, batch normalisation uses the stored
            statistics, which do not change.
        image_size: side of the images, pixels; None: that of the model's preprocessing.
        augment: random crops of at least `crop` of the area, and flips; None: unless only the head is trained.
        learning_rate: of the head, peak; warmup over a tenth of the steps and half a cosine. None: 1e-2 for the head
            alone, else 1e-4.
        layer_decay: factor on the rate from each layer to the one below it.
        weight_decay: of matrices alone.
        max_bad_fraction: share of unreadable images past which the run stops.
    """

    steps: int = 500
    batch_size: int = 32
    max_bad_fraction: float = 0.1
    data: str = ""
    held_out: float = 0.1
    tune: Literal["head", "all"] | int = "head"
    image_size: int | None = None
    augment: bool | None = None
    crop: float = 0.35
    learning_rate: float | None = None
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"

    # ------------------------------------------------------------------------------------------- inputs

    @functools.cached_property
    def folders(self) -> tuple[ImageFolder, ImageFolder | None]:
        if not self.data:
            raise MmjaxError("--data DIR: a folder of images in a folder a class")
        return labelled_split(self.data, self.held_out)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.folders[0].classes

    @functools.cached_property
    def start(self) -> Headless:
        """The loaded encoder without a head."""
        if self.init_from is None:
            raise MmjaxError("--init_from MODEL: a file, a folder, a hub id or a workdir to start from")
        classes = len(self.classes)  # a wrong folder is an error before weights are read
        start = hub.load(self.init_from).headless(classes, self.image_size)
        size = start.preprocess.size
        if size is None or size[0] != size[1]:
            raise MmjaxError(f"{self.init_from}: its preprocessing makes no squares ({size}): --image_size sets a side")
        return dataclasses.replace(start, config=dataclasses.replace(start.config, dtype=self.dtype))

    @property
    def model_class(self) -> type[ImageClassifier]:
        return next(system for system in SYSTEMS if system.name == self.start.system).model  # type: ignore[return-value]

    @property
    def preprocess(self) -> ImagePreprocessing:
        return self.start.preprocess

    @property
    def side(self) -> int:
        assert self.preprocess.size is not None
        return self.preprocess.size[0]

    @property
    def augmented(self) -> bool:
        return self.tune != "head" if self.augment is None else self.augment

    @property
    def by_features(self) -> bool:
        """Whether the features of all images are computed once and only the head is trained on them."""
        return self.tune == "head" and not self.augmented

    # ----------------------------------------------------------------------------------------------------------- recipe

    @functools.cached_property
    def network(self) -> Classification:
        """The whole network on images."""
        classifier = self.model_class.classifier(self.start.config)
        if self.tune != "all":
            classifier = StoredStatistics(classifier)
        mean, std = self.preprocess.mean, self.preprocess.std
        smoothing = self.label_smoothing
        return Classification(classifier, len(self.classes), label_smoothing=smoothing, mean=mean, std=std)

    def method(self) -> Classification:
        if not self.by_features:
            return self.network
        head = HeadOnFeatures(self.network.classifier, (self.side, self.side))
        return dataclasses.replace(self.network, classifier=head)

    def optimizer(self) -> Optimizer:
        layers = self.model_class.layers(self.start.config)
        rate = self.learning_rate if self.learning_rate is not None else 1e-2 if self.tune == "head" else 1e-4
        return tuning_optimizer(
            warmup_cosine(rate, self.steps, self.steps // 10),
            layers,
            partition(self.start.params, layers, self.tune),
            weight_decay=self.weight_decay,
            decay=self.layer_decay,
        )

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        """The weights of the encoder; the head is initialised."""
        return {"params": self.start.params, "stats": self.start.stats}

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        images = jax.ShapeDtypeStruct((self.batch_size, self.side, self.side, 3), jnp.uint8)
        if self.by_features:
            width = jax.eval_shape(self._pooled, self.start.params, self.start.stats, images).shape[-1]
            images = jax.ShapeDtypeStruct((self.batch_size, width), jnp.float32)
        return {"image": images, "label": jax.ShapeDtypeStruct((self.batch_size,), jnp.int32)}

    # ------------------------------------------------------------------------------------------------------------- data

    def train_data(self) -> Pipeline:
        if self.by_features:
            features = self.features[0]
            assert features is not None
            return self._pipeline(features)
        if not self.augmented:
            return self._pipeline(self.folders[0], Resize(self.preprocess))
        crop = RandomResizedCrop(self.side, (self.crop, 1.0), resample=self.preprocess.resample)
        return self._pipeline(self.folders[0], crop, RandomFlip())

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

    def _read_once(self, source: ImageFolder) -> Pipeline:
        """Every image once, as in evaluation."""
        workers, bad = self.workers, self.max_bad_fraction
        return Pipeline(source, 1, transforms=(Resize(self.preprocess),), workers=workers, max_bad_fraction=bad)

    @functools.cached_property
    def features(self) -> tuple[ArraySource | None, ArraySource | None]:
        """The features of the training and of the held-out images; cached for the next run on them."""
        extract = Extractor(lambda params, stats, images: self._pooled(params, stats, images), batch_size=64)
        variables, settings = (self.start.params, self.start.stats), (self.start.config, self.preprocess)

        def source(name: str, folder: ImageFolder | None) -> ArraySource | None:
            if folder is None:
                return None

            def compute() -> dict[str, np.ndarray]:
                features, columns = extract.from_pipeline(*variables, self._read_once(folder))
                return {"image": features, "label": columns["label"], "index": columns["index"]}

            columns = cached_features(variables, settings, folder, compute)
            lost = sorted(set(range(len(folder))) - set(columns["index"].tolist()))
            left_out = f"; unreadable and left out: {', '.join(map(folder.record_name, lost[:3]))}" if lost else ""
            left_out += f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            print(f"features of {len(columns['index'])} of {len(folder)} images ({name}){left_out}")
            return ArraySource(name=folder.name, image=columns["image"], label=columns["label"])

        train, held_out = self.folders
        return source("train", train), source("held out", held_out)

    def _pooled(self, params: Params, stats: Params, images: Array) -> Array:
        model = self.model_class(dataclasses.replace(self.start.config, num_classes=0), params, stats)
        return model.pooled(model.variables, self.network.pixels(images))

    def evaluations(self) -> tuple[Evaluation, ...]:
        if self.folders[1] is None:
            return ()
        shared: dict[str, Any] = {"final_step": self.steps, "batch_size": 64}
        shared |= {"class_names": self.classes if len(self.classes) <= 50 else None}
        if self.by_features:
            held_out = self.features[1]
            assert held_out is not None
            columns = {name: np.asarray(column) for name, column in held_out.columns.items()}
            shared |= {"images": columns["image"], "labels": columns["label"]}
        else:
            shared |= {"images": self._read_once(self.folders[1])}
        return (ClassificationEvaluation(logits=self.method().predict, **shared),)

    # ---------------------------------------------------------------------------------------------------------- workdir

    def model(self) -> tuple[str, Any]:
        return self.start.system, self.start.config

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """The names of the classes, for `mmjax classify`."""
        workdir.mkdir(parents=True, exist_ok=True)
        write_labels(self.classes, workdir)
        return {"preprocess": dataclasses.asdict(self.preprocess)}
