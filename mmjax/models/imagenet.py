"""What the published recipes of ImageNet classifiers share: folders, crops, an epoch's length, the evaluation."""

import abc
import dataclasses
import functools
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mmjax.data.image_folder import ImageFolder, split_folders
from mmjax.data.labels import check_labels, write_labels
from mmjax.data.pipeline import Pipeline, Transform
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.transforms import RandomResizedCrop, Resize
from mmjax.errors import MmjaxError
from mmjax.evaluation.classification import ClassificationEvaluation
from mmjax.training.classification import Classification
from mmjax.training.experiment import Evaluation, ExperimentConfig


@dataclasses.dataclass(frozen=True)
class ImageNetRecipe(ExperimentConfig, abc.ABC):
    """Base of the experiments: data and shapes. They add network, method, augmentation and optimizer.

    Crops, flips and automatic augmentation are made on the host by PIL, as the originals make them; what comes after
    them on the device.

    Attributes:
        data: a folder with `train` and `val`, each with a folder a class, as ImageNet's.
        images: of the training set. They make an epoch of images // batch_size steps; the rest is dropped.
        classes: sub-folders of `train`.
        size: side of a training crop, pixels.
        crop_min: least share of the image's area in a crop.
        dtype: of the computation; parameters, statistics and losses are float32.
    """

    lift: Literal["jit", "pmap", "mesh"] = "mesh"
    log_every: int = 50
    checkpoint_every: int = 2_000
    workers: int = 16
    data: str = ""
    images: int = 1_281_167
    classes: int = 1_000
    size: int = 224
    crop_min: float = 0.08
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    @abc.abstractmethod
    def classification(self) -> Classification:
        """The method without augmentation: what the evaluation asks."""

    @property
    @abc.abstractmethod
    def preprocess(self) -> ImagePreprocessing:
        """Of images that are judged."""

    @abc.abstractmethod
    def host_transforms(self) -> tuple[Transform, ...]:
        """What follows the random crop on the host."""

    @property
    def epoch(self) -> int:
        """Steps of an epoch."""
        return max(self.images // self.batch_size, 1)

    @property
    def epochs(self) -> int:
        """Epochs of the run, a started one included: what schedules run over."""
        return -(-self.steps // self.epoch)

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        image = jax.ShapeDtypeStruct((self.batch_size, self.size, self.size, 3), jnp.uint8)
        return {"image": image, "label": jax.ShapeDtypeStruct((self.batch_size,), jnp.int32)}

    @functools.cached_property
    def folders(self) -> tuple[ImageFolder, ImageFolder | None]:
        """(training, validation images). Raises MmjaxError for other numbers of images or classes than the fields'."""
        if not self.data:
            raise MmjaxError("this recipe needs --data: a folder with train and val, as ImageNet's")
        train, test = split_folders(self.data)
        if len(train) != self.images:
            raise MmjaxError(
                f"{train.root} holds {len(train)} images, schedules count epochs of {self.images}: "
                f"--images {len(train)}"
            )
        if len(train.classes) != self.classes:
            raise MmjaxError(
                f"{train.root} holds {len(train.classes)} classes, the head has {self.classes}: "
                f"--classes {len(train.classes)}"
            )
        check_labels(train, self.classes)
        return train, test

    def train_data(self) -> Pipeline:
        return Pipeline(
            self.folders[0],
            self.batch_size,
            seed=self.seed,
            transforms=(RandomResizedCrop(self.size, (self.crop_min, 1.0)), *self.host_transforms()),
            workers=self.workers,
            max_bad_fraction=self.max_bad_fraction,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def evaluations(self) -> tuple[Evaluation, ...]:
        """Top-1 and top-5 on `val`, central crops, where there is one."""
        _, test = self.folders
        if test is None:
            return ()
        pipeline = Pipeline(
            test,
            min(256, len(test)),
            shuffle=False,
            drop_remainder=False,
            transforms=(Resize(self.preprocess),),
            workers=self.workers,
            max_bad_fraction=self.max_bad_fraction,
        )
        told = ClassificationEvaluation(
            logits=self.classification.predict, images=pipeline, batch_size=256, final_step=self.steps
        )
        return (told,)  # type: ignore[return-value]

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """labels.json: the names of the folders; how images are brought to the network; and whether its weights are
        averaged ones."""
        write_labels(self.folders[0].classes, workdir)
        averaged = self.classification.weight_ema is not None
        return {"preprocess": dataclasses.asdict(self.preprocess), "averaged": averaged}
