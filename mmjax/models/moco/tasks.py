"""MoCoModel: features of a loaded MoCo's backbone."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.interface.image_classifier import Headless, at_size
from mmjax.interface.inputs import PIXELS, Input
from mmjax.interface.model import Model
from mmjax.models.moco.network import MoCo, MoCoConfig
from mmjax.models.resnet.network import ResNetConfig
from mmjax.nn.norm import l2_normalize
from mmjax.types import Array, Float


class MoCoModel(Model):
    """A loaded MoCo: features of its query encoder, which all published evaluations use.

    stats: {"query", "key"}: batch statistics; with `config.holds_state` also "momentum" (parameters) and "queue"
    {"keys" [q, d], "cursor"}, so that an export writes back everything that was loaded.
    """

    system: ClassVar[str] = "moco"
    config_class: ClassVar[type] = MoCoConfig
    config: MoCoConfig

    @classmethod
    def build(cls, config: MoCoConfig) -> MoCo:
        return MoCo(config)

    @classmethod
    def inputs(cls, config: MoCoConfig) -> Mapping[str, Input]:
        return PIXELS

    @classmethod
    def example(cls, config: MoCoConfig) -> dict[str, jax.ShapeDtypeStruct]:
        backbone = config.backbone
        if isinstance(backbone, ResNetConfig):
            side = (224, 224) if backbone.stem == "imagenet" else (32, 32)
        else:
            side = backbone.image_size
        return {"pixel_values": jax.ShapeDtypeStruct((1, *side, 3), jnp.float32)}

    @classmethod
    def shapes(cls, config: MoCoConfig) -> dict[str, Any]:
        shapes = super().shapes(config)
        params, stats = shapes["params"], shapes.get("stats", {})
        parts = ("backbone", "projector")
        state: dict[str, Any] = {"query": stats, "key": {part: stats[part] for part in parts if part in stats}}
        if config.holds_state:
            state["momentum"] = {part: params[part] for part in parts}
            if config.queue:
                keys = jax.ShapeDtypeStruct((config.queue, config.dim), jnp.float32)
                state["queue"] = {"keys": keys, "cursor": jax.ShapeDtypeStruct((), jnp.int32)}
        state = {name: leaves for name, leaves in state.items() if leaves}
        return {"params": params} | ({"stats": state} if state else {})

    @property
    def variables(self) -> dict[str, Any]:
        stats = self.stats.get("query")
        return {"params": self.params} | ({"batch_stats": stats} if stats else {})

    def weights(self) -> dict[str, Any]:
        """{"params", "stats"}, and "ema" and "queues" where the file has a momentum encoder and a queue."""
        stats = dict(self.stats)
        momentum, queue = stats.pop("momentum", None), stats.pop("queue", None)
        weights = {"params": self.params, "stats": stats}
        return weights | ({"ema": momentum} if momentum else {}) | ({"queues": {"keys": queue}} if queue else {})

    @classmethod
    def default_preprocess(cls, config: MoCoConfig, layout: str) -> ImagePreprocessing:
        """Short side 256, central 224, bilinear (main_lincls.py); no change to small images."""
        height, width, _ = cls.example(config)["pixel_values"].shape[1:]
        if height == width == 224:
            return ImagePreprocessing.imagenet()
        return ImagePreprocessing((height, width), None, resample="bilinear")

    def headless(self, classes: int, size: int | None = None) -> Headless:
        """The query encoder's backbone, a ResNet or a ViT by itself; the projector is dropped."""
        c = self.config
        kind = "resnet" if isinstance(c.backbone, ResNetConfig) else "vit"
        config = dataclasses.replace(c.backbone, num_classes=classes, dtype=c.dtype)
        stats = self.stats.get("query", {}).get("backbone", {})
        return Headless(kind, config, self.params["backbone"], stats, at_size(self.preprocess, size))

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """pooler_output [b, d]: the backbone's features. image_embeds [b, dim]: the projector's unit-norm features."""
        outputs: Any = self.module.apply(variables, inputs["pixel_values"], predict=False)
        return {"pooler_output": outputs["features"], "image_embeds": l2_normalize(outputs["embedding"])}

    def encode_image(self, images: Any) -> Float[Array, "b d"]:
        """The backbone's unit-norm features. images: as `preprocess` takes them, or pixel values."""
        return l2_normalize(self.forward(pixel_values=self.pixels(images))["pooler_output"])
