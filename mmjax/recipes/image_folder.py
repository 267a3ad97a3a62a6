"""The base of published recipes on a folder of images: fields, an epoch's length, and the number of images for it."""

import dataclasses
from typing import Literal

import jax

from mmjax.data.image_folder import ImageFolder
from mmjax.data.pipeline import Pipeline, Transform
from mmjax.errors import MmjaxError
from mmjax.training.experiment import ExperimentConfig


@dataclasses.dataclass(frozen=True)
class FolderRecipe(ExperimentConfig):
    """Base of the recipes' bases: on a mesh, long, with many readers, on ImageNet's images by default.

    Attributes:
        data: the folder.
        images: of the training set. They make an epoch of images // batch_size steps; the rest is dropped.
        size: side of the network's images, pixels.
        dtype: of the computation; parameters, statistics and losses are float32.
    """

    lift: Literal["jit", "pmap", "mesh"] = "mesh"
    log_every: int = 50
    checkpoint_every: int = 2_000
    workers: int = 16
    data: str = ""
    images: int = 1_281_167
    size: int = 224
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def epoch(self) -> int:
        """Steps of an epoch."""
        return max(self.images // self.batch_size, 1)

    @property
    def epochs(self) -> int:
        """Epochs of the run, a started one included: the length of schedules."""
        return -(-self.steps // self.epoch)

    def counted(self, source: ImageFolder) -> ImageFolder:
        """The source. Raises MmjaxError if it holds another number of images than `images`."""
        if len(source) != self.images:
            raise MmjaxError(
                f"{source.root} holds {len(source)} images, schedules count epochs of {self.images}: "
                f"--images {len(source)}"
            )
        return source

    def shuffled(self, source: ImageFolder, transforms: tuple[Transform, ...]) -> Pipeline:
        """Training batches of this process."""
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
