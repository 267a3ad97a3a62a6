"""The base of the published recipes of MoCo v1, v2 and v3: ImageNet, two views, an epoch's length."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.data.image_folder import ImageFolder
from mmjax.data.pipeline import Pipeline
from mmjax.data.transforms import RandomResizedCrop
from mmjax.data.two_crops import TwoCrops
from mmjax.errors import MmjaxError
from mmjax.models.moco.network import MoCoConfig
from mmjax.recipes.image_folder import FolderRecipe
from mmjax.training.augment import View
from mmjax.training.method import Augment
from mmjax.types import Array, Batch


@dataclasses.dataclass(frozen=True)
class MoCoRecipe(FolderRecipe, abc.ABC):
    """Base of the experiments: data and shapes. They add network, method and optimizer.

    Random crops are made on the host, from the image as it was decoded, in the originals' way; colour, blur and flips
    on the device, in float32 without the originals' rounding to 8 bits after each.

    Attributes:
        crop_min: least share of the image's area in a view; `size` is its side. `data` is a folder of images, as
            ImageNet's `train`; its classes are not used.
    """

    crop_min: float = 0.2

    @property
    @abc.abstractmethod
    def network(self) -> MoCoConfig: ...

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        view = jax.ShapeDtypeStruct((self.batch_size, self.size, self.size, 3), jnp.uint8)
        return {"view_1": view, "view_2": view}

    def train_data(self) -> Pipeline:
        """Raises MmjaxError without --data, or if the folder has another number of images than `images`."""
        if not self.data:
            raise MmjaxError("MoCo's recipes need --data: a folder of images, such as ImageNet's train")
        crop = RandomResizedCrop(self.size, (self.crop_min, 1.0))
        return self.shuffled(self.counted(ImageFolder(self.data)), (TwoCrops(crop),))

    def evaluations(self) -> tuple[Any, ...]:
        """None during training: `mmjax evaluate WORKDIR` takes any checkpoint."""
        return ()

    def model(self) -> tuple[str, MoCoConfig]:
        return "moco", self.network


def on_device(first: View, second: View) -> Augment:
    """The steps of two views after their crop: batch["view_1"], batch["view_2"] uint8 -> normalised float32."""
    uncropped = [dataclasses.replace(view, scale=(1.0, 1.0), ratio=(1.0, 1.0)) for view in (first, second)]

    def augment(keys: Array, batch: Batch) -> Batch:
        views = {}
        for i, view in enumerate(uncropped, 1):
            view_keys = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys)
            views[f"view_{i}"] = jax.vmap(view)(view_keys, batch[f"view_{i}"])
        return {**batch, **views}

    return augment
