"""What a loaded ResNet can be asked."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.models.handle import Model, unit
from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.types import Array, Float


class ResNetModel(Model):
    """Features for every net; classes for those with a head."""

    system: ClassVar[str] = "resnet"
    config_class: ClassVar[type] = ResNetConfig
    config: ResNetConfig

    @classmethod
    def build(cls, config: ResNetConfig) -> ResNet:
        return ResNet(config)

    @classmethod
    def example(cls, config: ResNetConfig) -> dict[str, jax.ShapeDtypeStruct]:
        side = 224 if config.stem == "imagenet" else 32
        return {"pixel_values": jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)}

    @classmethod
    def default_preprocess(cls, config: ResNetConfig, layout: str) -> ImagePreprocessing:
        """torchvision's of the V1 weights (V2: `ImagePreprocessing.imagenet(resize=232)`); Hugging Face's is
        ConvNeXt's, bicubic; CIFAR nets see the whole of a 32x32 image."""
        if config.stem == "cifar":
            return ImagePreprocessing.imagenet(32, 32)
        if layout == "hf":
            return ImagePreprocessing(256, (224, 224), crop_rounding="floor")
        return ImagePreprocessing.imagenet()

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """last_hidden_state and hidden_states (stem, then each stage) [b, height, width, c];
        pooler_output [b, 1, 1, c]; logits [b, classes] where there is a head."""
        if "pixel_values" not in inputs:
            raise MmjaxError("a ResNet's forward takes pixel_values")
        given = self.module.apply(variables, inputs["pixel_values"])
        assert isinstance(given, dict)
        maps = (given["stem"], *(given[f"C{stage + 2}"] for stage in range(len(self.config.layers))))
        told = {"last_hidden_state": maps[-1], "pooler_output": given["pooled"][:, None, None], "hidden_states": maps}
        return told | ({"logits": given["logits"]} if "logits" in given else {})

    def encode_image(self, images: Any) -> Float[Array, "b d"]:
        """Pooled features of unit length. images: as `preprocess` takes them, or ready pixel values."""
        return unit(self.forward(pixel_values=self.pixels(images))["pooler_output"][:, 0, 0])

    def classify(
        self, images: Any, labels: Sequence[str] | None = None, top_k: int = 5
    ) -> list[list[tuple[str, float]]]:
        """For each image its top_k (name, probability), the likeliest first.

        labels: the names of the head's classes, in its order; by default their numbers.
        Raises MmjaxError if there is no head, or another number of names than classes.
        """
        classes = self.config.num_classes
        if not classes:
            raise MmjaxError("this ResNet has no head (num_classes=0): it can encode_image, not classify")
        names = [str(i) for i in range(classes)] if labels is None else list(labels)
        if len(names) != classes:
            raise MmjaxError(f"labels names {len(names)} classes, the head has {classes}")
        logits = self.forward(pixel_values=self.pixels(images))["logits"]
        chances = np.asarray(jax.nn.softmax(logits, axis=-1))
        order = np.argsort(-chances, axis=-1, kind="stable")[:, :top_k]
        return [[(names[i], float(row[i])) for i in best] for row, best in zip(chances, order)]
