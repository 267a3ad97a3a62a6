"""SegmentationModel and DetectionModel: the class of each pixel of an image, and the things in it with their boxes."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmjax.data.preprocess import ImagePreprocessing, as_image
from mmjax.evaluation.detection import OVERLAP, suppressed
from mmjax.interface.inputs import PIXELS, Input
from mmjax.interface.model import Model
from mmjax.models.dense.detect import candidates
from mmjax.models.dense.detector import DetectionConfig, Detector
from mmjax.models.dense.network import SegmentationConfig, Segmenter
from mmjax.models.vit.network import ViTConfig
from mmjax.types import Array, Int

SQUASHED = ImagePreprocessing((224, 224), None, resample="bilinear")
"""Where no file determines the preprocessing: the whole image, whatever its shape."""
Box = tuple[float, float, float, float]


def _pictures(images: Any) -> list[Image.Image]:
    """One image, or several, as RGB."""
    if isinstance(images, np.ndarray):
        images = list(images) if images.ndim == 4 else [images]
    several: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
    return [as_image(image) for image in several]


def _example(backbone: Any) -> dict[str, jax.ShapeDtypeStruct]:
    size = backbone.image_size if isinstance(backbone, ViTConfig) else (64, 64)
    return {"pixel_values": jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)}


class SegmentationModel(Model):
    """A segmentation network with its weights; `labels` are the names of the classes."""

    system: ClassVar[str] = "segmentation"
    config_class: ClassVar[type] = SegmentationConfig
    config: SegmentationConfig

    @classmethod
    def build(cls, config: SegmentationConfig) -> Segmenter:
        return Segmenter(config)

    @classmethod
    def inputs(cls, config: SegmentationConfig) -> Mapping[str, Input]:
        return PIXELS

    @classmethod
    def example(cls, config: SegmentationConfig) -> dict[str, jax.ShapeDtypeStruct]:
        return _example(config.backbone)

    @classmethod
    def num_classes(cls, config: SegmentationConfig) -> int:
        return config.classes

    @classmethod
    def default_preprocess(cls, config: SegmentationConfig, layout: str) -> ImagePreprocessing:
        return SQUASHED

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """logits [b, height, width, classes], float32, at the size of the pixels."""
        return {"logits": self.module.apply(variables, inputs["pixel_values"])}

    def segment(self, images: Any) -> list[Int[np.ndarray, "height width"]]:
        """The most probable class of each pixel, int32, at the size of each image.

        images: one or several, as `preprocess` takes them: files, PIL images, uint8 arrays.

            model = mmjax.load("workdirs/segment")
            (mask,) = model.segment("photo.jpg")
            model.labels[mask[10, 20]]
        """
        masks = []
        for picture in _pictures(images):
            logits = np.asarray(self.forward(pixel_values=self.preprocess(picture))["logits"])[0]
            planes = [
                np.asarray(Image.fromarray(plane).resize(picture.size, Image.Resampling.BILINEAR))
                for plane in np.moveaxis(logits, -1, 0)
            ]
            masks.append(np.argmax(planes, 0).astype(np.int32))
        return masks


class DetectionModel(Model):
    """A detector with its weights; `labels` are the names of the classes."""

    system: ClassVar[str] = "detection"
    config_class: ClassVar[type] = DetectionConfig
    config: DetectionConfig

    @classmethod
    def build(cls, config: DetectionConfig) -> Detector:
        return Detector(config)

    @classmethod
    def inputs(cls, config: DetectionConfig) -> Mapping[str, Input]:
        return PIXELS

    @classmethod
    def example(cls, config: DetectionConfig) -> dict[str, jax.ShapeDtypeStruct]:
        return _example(config.backbone)

    @classmethod
    def num_classes(cls, config: DetectionConfig) -> int:
        return config.classes

    @classmethod
    def default_preprocess(cls, config: DetectionConfig, layout: str) -> ImagePreprocessing:
        return SQUASHED

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """boxes [b, k, 4] (x, y, width, height in pixels), scores [b, k], labels [b, k]: candidates, the best first."""
        pixels = inputs["pixel_values"]
        outputs: Any = self.module.apply(variables, pixels)
        return candidates(outputs, pixels.shape[1], pixels.shape[2])

    def detect(
        self, images: Any, threshold: float = 0.5, overlap: float = OVERLAP
    ) -> list[list[tuple[str, float, Box]]]:
        """(class, score, (x, y, width, height)) of the things in each image, the best first, in its own pixels.

        images: one or several, as `preprocess` takes them. threshold: of the score, the root of a product of two
        probabilities. overlap: of two boxes of one class, above which the worse one goes.

            model = mmjax.load("workdirs/detect")
            [(name, score, box), *others] = model.detect("photo.jpg")[0]
        """
        names, detections = self.class_names(), []
        for picture in _pictures(images):
            pixels = self.preprocess(picture)
            outputs = self.forward(pixel_values=pixels)
            boxes, scores, labels = (np.asarray(outputs[name])[0] for name in ("boxes", "scores", "labels"))
            scale = np.array([picture.width / pixels.shape[2], picture.height / pixels.shape[1]] * 2)
            stays = [i for i in suppressed(boxes, scores, labels, overlap).tolist() if scores[i] >= threshold]
            boxes = [tuple((boxes[i] * scale).tolist()) for i in stays]
            detections.append([(names[labels[i]], float(scores[i]), box) for i, box in zip(stays, boxes)])
        return detections
