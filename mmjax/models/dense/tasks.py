"""SegmentationModel: the class of each pixel of an image."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmjax.data.preprocess import ImagePreprocessing, as_image
from mmjax.interface.inputs import PIXELS, Input
from mmjax.interface.model import Model
from mmjax.models.dense.network import SegmentationConfig, Segmenter
from mmjax.models.vit.network import ViTConfig
from mmjax.types import Array, Int


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
        size = config.backbone.image_size if isinstance(config.backbone, ViTConfig) else (64, 64)
        return {"pixel_values": jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)}

    @classmethod
    def num_classes(cls, config: SegmentationConfig) -> int:
        return config.classes

    @classmethod
    def default_preprocess(cls, config: SegmentationConfig, layout: str) -> ImagePreprocessing:
        return ImagePreprocessing((224, 224), None, resample="bilinear")

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
        several = images if isinstance(images, list | tuple) else list(images) if np.ndim(images) == 4 else [images]
        pictures = [as_image(image) for image in several]
        masks = []
        for picture in pictures:
            logits = np.asarray(self.forward(pixel_values=self.preprocess(picture))["logits"])[0]
            planes = [
                np.asarray(Image.fromarray(plane).resize(picture.size, Image.Resampling.BILINEAR))
                for plane in np.moveaxis(logits, -1, 0)
            ]
            masks.append(np.argmax(planes, 0).astype(np.int32))
        return masks
