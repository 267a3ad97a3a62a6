"""Loaded image classifiers, and the image encoder that a fine-tuning starts from."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.interface.model import Model, top_k_labels
from mmjax.types import Array, Float, Params


@dataclasses.dataclass(frozen=True)
class Headless:
    """A loaded image encoder as a classifier whose head is not initialised yet: what `Model.headless` returns.

    Attributes:
        system, config: of the classifier, as a config.json names them.
        params, stats: of all but the head.
        preprocess: of its images.
    """

    system: str
    config: Any
    params: Params
    stats: Params
    preprocess: ImagePreprocessing


def at_size(preprocess: ImagePreprocessing, size: int | None) -> ImagePreprocessing:
    """The preprocessing for images of `size` x `size`; unchanged for None."""
    return preprocess if size is None or preprocess.size == (size, size) else preprocess.at_size(size)


class ImageClassifier(Model):
    """A network with an affine layer called "head", or without one (num_classes=0)."""

    @classmethod
    @abc.abstractmethod
    def classifier(cls, config: Any) -> Any:
        """The network as an `mmjax.training.classification.Classifier`."""

    @classmethod
    @abc.abstractmethod
    def layers(cls, config: Any) -> tuple[tuple[str, ...], ...]:
        """Globs of parameter paths by depth: all before the blocks, each block, all after the blocks with the head.

        Every parameter matches one of them; a glob may match none.
        """

    @abc.abstractmethod
    def pooled(self, variables: Mapping[str, Any], pixels: Float[Array, "b height width 3"]) -> Float[Array, "b d"]:
        """The input of the head, in evaluation; a pure function."""

    @property
    def abilities(self) -> tuple[str, ...]:
        return tuple(name for name in super().abilities if name != "classify" or self.config.num_classes)

    def classify(self, images: Any, labels: Sequence[str] | None = None, top: int = 5) -> list[list[tuple[str, float]]]:
        """The most probable classes of each image with their probabilities, the best first.

        labels: the names of the head's classes, in its order; None: `self.labels`, or their numbers.
        Raises MmjaxError if there is no head, or another number of names than classes.
        """
        classes = self.config.num_classes
        if not classes:
            raise MmjaxError(f"this {self.system} has no classification head (num_classes=0): it cannot classify")
        names = self.class_names(labels)
        logits = self.forward(pixel_values=self.pixels(images))["logits"]
        return top_k_labels(jax.nn.softmax(logits), names, top)
