"""The base of the published recipes of ImageNet classifiers: folders, crops, an epoch's length, the evaluation."""

import abc
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.data.image_folder import ImageFolder, split_folders
from mmjax.data.labels import check_labels, write_labels
from mmjax.data.pipeline import Pipeline, Transform
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.transforms import RandomResizedCrop, Resize
from mmjax.errors import MmjaxError
from mmjax.evaluation.classification import ClassificationEvaluation
from mmjax.recipes.image_folder import FolderRecipe
from mmjax.training.classification import Classification
from mmjax.training.experiment import Evaluation


@dataclasses.dataclass(frozen=True)
class ImageNetRecipe(FolderRecipe, abc.ABC):
    """Base of the experiments: data and shapes. They add network, method, augmentation and optimizer.

    Crops, flips and automatic augmentation run on the host with PIL, as in the originals; the steps after them
    run on the device.

    Attributes:
        classes: sub-folders of `train`; `data` holds `train` and `val`, each with a folder a class, as ImageNet's.
        crop_min: least share of the image's area in a crop; `size` is its side.
    """

    classes: int = 1_000
    crop_min: float = 0.08

    @property
    @abc.abstractmethod
    def classification(self) -> Classification:
        """The method without augmentation, for the evaluation."""

    @property
    @abc.abstractmethod
    def preprocess(self) -> ImagePreprocessing:
        """The preprocessing of evaluated images."""

    @abc.abstractmethod
    def host_transforms(self) -> tuple[Transform, ...]:
        """The transforms after the random crop on the host."""

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
        self.counted(train)
        if len(train.classes) != self.classes:
            raise MmjaxError(
                f"{train.root} holds {len(train.classes)} classes, the head has {self.classes}: "
                f"--classes {len(train.classes)}"
            )
        check_labels(train, self.classes)
        return train, test

    def train_data(self) -> Pipeline:
        crop = RandomResizedCrop(self.size, (self.crop_min, 1.0))
        return self.shuffled(self.folders[0], (crop, *self.host_transforms()))

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
        evaluation = ClassificationEvaluation(
            logits=self.classification.predict, images=pipeline, batch_size=256, final_step=self.steps
        )
        return (evaluation,)

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """Writes labels.json, the names of the folders. Returns the preprocessing and whether weights are averaged."""
        write_labels(self.folders[0].classes, workdir)
        averaged = self.classification.weight_ema is not None
        return {"preprocess": dataclasses.asdict(self.preprocess), "averaged": averaged}
