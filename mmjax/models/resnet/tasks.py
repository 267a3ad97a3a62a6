"""ResNetModel: features and classification."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.interface.image_classifier import Headless, ImageClassifier, at_size
from mmjax.interface.inputs import PIXELS, Input
from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.models.resnet.supervised import ResNetClassifier
from mmjax.nn.norm import l2_normalize
from mmjax.training.finetune import HEAD
from mmjax.types import Array, Float


class ResNetModel(ImageClassifier):
    """Features for every net; classes for those with a head."""

    system: ClassVar[str] = "resnet"
    config_class: ClassVar[type] = ResNetConfig
    config: ResNetConfig

    @classmethod
    def build(cls, config: ResNetConfig) -> ResNet:
        return ResNet(config)

    @classmethod
    def inputs(cls, config: ResNetConfig) -> Mapping[str, Input]:
        return PIXELS

    @classmethod
    def example(cls, config: ResNetConfig) -> dict[str, jax.ShapeDtypeStruct]:
        side = 224 if config.stem == "imagenet" else 32
        return {"pixel_values": jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)}

    @classmethod
    def default_preprocess(cls, config: ResNetConfig, layout: str) -> ImagePreprocessing:
        """torchvision's of the V1 weights (V2: `ImagePreprocessing.imagenet(resize=232)`); Hugging Face's is
        ConvNeXt's, bicubic; CIFAR nets take the whole of a 32x32 image."""
        if config.stem == "cifar":
            return ImagePreprocessing.imagenet(32, 32)
        if layout == "hf":
            return ImagePreprocessing(256, (224, 224), crop_rounding="floor")
        return ImagePreprocessing.imagenet()

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """last_hidden_state and hidden_states (stem, then each stage) [b, height, width, c];
        pooler_output [b, 1, 1, c]; logits [b, classes] where there is a head."""
        maps_by_name = self.module.apply(variables, inputs["pixel_values"])
        assert isinstance(maps_by_name, dict)
        maps = (maps_by_name["stem"], *(maps_by_name[f"C{stage + 2}"] for stage in range(len(self.config.layers))))
        outputs = {
            "last_hidden_state": maps[-1],
            "pooler_output": maps_by_name["pooled"][:, None, None],
            "hidden_states": maps,
        }
        return outputs | ({"logits": maps_by_name["logits"]} if "logits" in maps_by_name else {})

    def encode_image(self, images: Any) -> Float[Array, "b d"]:
        """Pooled features of unit length. images: as `preprocess` takes them, or ready pixel values."""
        return l2_normalize(self.forward(pixel_values=self.pixels(images))["pooler_output"][:, 0, 0])

    def headless(self, classes: int, size: int | None = None) -> Headless:
        """Without the head that there may be; images of any size."""
        params = {name: leaf for name, leaf in self.params.items() if name != "head"}
        config = dataclasses.replace(self.config, num_classes=classes)
        return Headless(self.system, config, params, self.stats, at_size(self.preprocess, size))

    @classmethod
    def classifier(cls, config: ResNetConfig) -> ResNetClassifier:
        return ResNetClassifier(config)

    @classmethod
    def layers(cls, config: ResNetConfig) -> tuple[tuple[str, ...], ...]:
        """The stem, each block, the head."""
        blocks = [f"stage{stage}_block{i}/**" for stage, count in enumerate(config.layers, 1) for i in range(count)]
        return (("stem_*/**",), *((block,) for block in blocks), ("attention_pool/**", HEAD))

    def pooled(self, variables: Mapping[str, Any], pixels: Float[Array, "b height width 3"]) -> Float[Array, "b d"]:
        outputs: Any = self.module.apply(variables, pixels)
        return outputs["pooled"]
