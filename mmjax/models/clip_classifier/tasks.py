"""What CLIP's image tower with a head can be asked."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.interface.image_classifier import Headless, ImageClassifier, at_size
from mmjax.interface.inputs import PIXELS, Input
from mmjax.models.clip.modified_resnet import ModifiedResNetConfig
from mmjax.models.clip.network import CLIPVisionConfig, at_side
from mmjax.models.clip_classifier.network import CLIPClassifier, CLIPClassifierConfig
from mmjax.models.clip_classifier.supervised import CLIPImageClassifier
from mmjax.nn.norm import l2_normalize
from mmjax.training.finetune import HEAD
from mmjax.types import Array, Float


class CLIPClassifierModel(ImageClassifier):
    """A fine-tuned CLIP: classes and features of images."""

    system: ClassVar[str] = "clip_classifier"
    config_class: ClassVar[type] = CLIPClassifierConfig
    config: CLIPClassifierConfig

    @classmethod
    def build(cls, config: CLIPClassifierConfig) -> CLIPClassifier:
        return CLIPClassifier(config)

    @classmethod
    def inputs(cls, config: CLIPClassifierConfig) -> Mapping[str, Input]:
        return PIXELS

    @classmethod
    def example(cls, config: CLIPClassifierConfig) -> dict[str, jax.ShapeDtypeStruct]:
        side = config.image_size or 64
        return {"pixel_values": jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)}

    @classmethod
    def default_preprocess(cls, config: CLIPClassifierConfig, layout: str) -> ImagePreprocessing:
        return ImagePreprocessing.clip(config.image_size or 64)

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """pooler_output [b, d]: what the head sees; logits [b, classes] where there is a head."""
        told: Any = self.module.apply(variables, inputs["pixel_values"])
        names = {"pooler_output": "pooled", "logits": "logits"}
        return {name: told[own] for name, own in names.items() if own in told}

    def encode_image(self, images: Any) -> Float[Array, "b d"]:
        """What the head sees, of unit length. images: as `preprocess` takes them, or ready pixel values."""
        return l2_normalize(self.forward(pixel_values=self.pixels(images))["pooler_output"])

    def headless(self, classes: int, size: int | None = None) -> Headless:
        """Without the head that there may be; see `mmjax.models.clip.network.at_side` for another size."""
        preprocess = at_size(self.preprocess, size)
        vision, tower = at_side(self.config.vision, self.params["tower"], preprocess.size)
        config = dataclasses.replace(self.config, vision=vision, num_classes=classes)
        return Headless(self.system, config, {"tower": tower}, self.stats, preprocess)

    @classmethod
    def classifier(cls, config: CLIPClassifierConfig) -> CLIPImageClassifier:
        return CLIPImageClassifier(config)

    @classmethod
    def layers(cls, config: CLIPClassifierConfig) -> tuple[tuple[str, ...], ...]:
        """Stem or embeddings, each block, what pools with the head."""
        vision = config.vision
        if isinstance(vision, CLIPVisionConfig):
            first = ("class_embedding", "positions", "patch_embed/**", "norm_pre/**")
            blocks = [f"encoder/block_{i}/**" for i in range(vision.depth)]
            last = ("norm_post/**",)
        elif isinstance(vision, ModifiedResNetConfig):
            first = tuple(f"{kind}{i}/**" for i in (1, 2, 3) for kind in ("conv", "bn"))
            blocks = [f"layer{stage}_{i}/**" for stage, count in enumerate(vision.layers, 1) for i in range(count)]
            last = ("attnpool/**",)
        else:
            first = ("trunk/stem_conv/**", "trunk/stem_bn/**")
            counts = enumerate(vision.layers, 1)
            blocks = [f"trunk/stage{stage}_block{i}/**" for stage, count in counts for i in range(count)]
            last = ()
        inside = (first, *((block,) for block in blocks), last)
        named = [tuple(f"tower/{glob}" for glob in layer) for layer in inside]
        return (*named[:-1], (*named[-1], HEAD))

    def pooled(self, variables: Mapping[str, Any], pixels: Float[Array, "b height width 3"]) -> Float[Array, "b d"]:
        told: Any = self.module.apply(variables, pixels)
        return told["pooled"]
