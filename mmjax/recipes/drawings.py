"""The base of small recipes that train an image encoder on OpenMoji's drawings: network, views, judges."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.openmoji import OpenMoji, load_openmoji
from mmjax.data.pipeline import Pipeline
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.vendor_emoji import drawn_by_all, load_vendor_emoji, vendor_folder
from mmjax.evaluation.features import Encode
from mmjax.evaluation.instances import InstanceRetrievalEvaluation
from mmjax.models.resnet.network import ResNetConfig
from mmjax.recipes.dense_probe import SegmentationProbe
from mmjax.training.augment import View
from mmjax.training.experiment import Evaluation, ExperimentConfig
from mmjax.training.optimizer import Optimizer, sgd, warmup_cosine
from mmjax.types import Params

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
VENDORS = ("Appl", "Goog", "Joy", "Twtr")
"""Those that have drawn nearly all of OpenMoji's emoji."""


@dataclasses.dataclass(frozen=True)
class DrawingRecipe(ExperimentConfig, abc.ABC):
    """A run of a minute on one core. Experiments add the method.

    Attributes:
        image_size: side of the drawings in pixels; view_size: of the random views that are cut from them.
        width: channels of the backbone's first stage; each of the others has twice those of the one before.
        learning_rate: peak; warmup and half a cosine.
        vendors: of the drawings that instance retrieval searches, beside OpenMoji's; () if they are not installed.
        scenes: number of scenes that the segmentation probe trains its head on; 0: without it.
    """

    steps: int = 500
    batch_size: int = 64
    log_every: int = 20
    eval_every: int = 250
    checkpoint_every: int = 250
    image_size: int = 64
    view_size: int = 32
    width: int = 16
    learning_rate: float = 0.12
    warmup: int = 50
    weight_decay: float = 1e-4
    vendors: tuple[str, ...] = VENDORS if vendor_folder() is not None else ()
    scenes: int = 600

    @functools.cached_property
    def pairs(self) -> OpenMoji:
        return load_openmoji(self.image_size)

    @property
    def backbone(self) -> ResNetConfig:
        """A ResNet of four short stages, without a head."""
        widths = tuple(self.width * 2**stage for stage in range(4))
        return ResNetConfig((1, 1, 1, 1), "basic", "imagenet", self.width, widths, num_classes=0)

    @property
    def view(self) -> View:
        """Milder than MoCo v2's: a fifth of a drawing may be blank paper, and colour is half of what it is."""
        mild: dict[str, Any] = {"scale": (0.5, 1.0), "jitter": (0.2, 0.2, 0.2, 0.02), "grey_p": 0.0}
        mild |= {"blur_p": 0.2, "blur_sigma": (0.1, 1.0)}
        return dataclasses.replace(View.moco_v2(self.view_size), **mild, mean=MEAN, std=STD)

    def optimizer(self) -> Optimizer:
        schedule = warmup_cosine(self.learning_rate, self.steps, self.warmup)
        return Optimizer(sgd(schedule, momentum=0.9, weight_decay=self.weight_decay))

    @property
    def images(self) -> jax.ShapeDtypeStruct:
        """Shape of the global batch's drawings."""
        return jax.ShapeDtypeStruct((self.batch_size, self.image_size, self.image_size, 3), jnp.uint8)

    def train_data(self) -> Pipeline:
        """Whole drawings, uint8: the views are cut from them on the device."""
        return Pipeline(
            self.pairs.train,
            self.batch_size,
            seed=self.seed,
            workers=self.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def judges(
        self, encode: Encode, encoder: Callable[[Params, Any], tuple[Params, Params]]
    ) -> tuple[tuple[Evaluation, ...], tuple[Evaluation, ...]]:
        """(instance retrieval, the segmentation probe), each absent where its field is empty.

        encode: pooled features of uint8 drawings. encoder: (params, state) -> (parameters, statistics) of `backbone`.
        """
        probe = SegmentationProbe(backbone=self.backbone, variables=encoder, mean=MEAN, std=STD, train=self.scenes)
        return self._instances(encode), (probe,) if self.scenes else ()

    def _instances(self, encode: Encode) -> tuple[Evaluation, ...]:
        """Instance retrieval among the held-out drawings that all vendors have."""
        if not self.vendors:
            return ()
        held_out = self.pairs.held_out.columns
        codepoints = list(held_out["codepoints"])
        indices = drawn_by_all(codepoints, self.vendors)
        views = {"OpenMoji": np.asarray(held_out["image"])[indices]}
        views |= load_vendor_emoji([codepoints[i] for i in indices], self.image_size, self.vendors)
        return (InstanceRetrievalEvaluation(encode=encode, views=views, final_step=self.steps),)

    def preprocess(self, size: int) -> ImagePreprocessing:
        """The whole image at `size` x `size`."""
        return ImagePreprocessing((size, size), None, resample="bilinear", mean=MEAN, std=STD)

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """The image preprocessing; it writes nothing."""
        return {"preprocess": dataclasses.asdict(self.preprocess(self.image_size))}
