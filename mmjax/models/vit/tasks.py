"""ViTModel: features, classification, intermediate layers."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.interface.image_classifier import Headless, ImageClassifier, at_size
from mmjax.interface.inputs import PIXELS, Input
from mmjax.models.vit.network import ViT, ViTConfig, ViTOutput
from mmjax.models.vit.supervised import ViTClassifier
from mmjax.nn.norm import l2_normalize
from mmjax.training.finetune import HEAD
from mmjax.types import Array, ArrayLike, Float


class ViTModel(ImageClassifier):
    """A ViT with its weights."""

    system: ClassVar[str] = "vit"
    config_class: ClassVar[type] = ViTConfig

    @classmethod
    def build(cls, config: ViTConfig) -> nn.Module:
        return ViT(config)

    @classmethod
    def inputs(cls, config: ViTConfig) -> Mapping[str, Input]:
        return PIXELS

    @classmethod
    def example(cls, config: ViTConfig) -> dict[str, jax.ShapeDtypeStruct]:
        return {"pixel_values": jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)}

    @classmethod
    def default_preprocess(cls, config: ViTConfig, layout: str) -> ImagePreprocessing:
        side = config.image_size[0]
        if config.layer_scale is not None:
            return ImagePreprocessing.dinov2(224)
        if layout == "timm":  # DeiT's transform
            return ImagePreprocessing(side * 256 // 224, (side, side))
        return ImagePreprocessing.vit(side)

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """last_hidden_state [b, n, d], pooler_output [b, d], hidden_states (depth + 1), logits [b, c] with a head.

        Tokens: class token, distillation token, registers, patches in row-major order.
        pooler_output is the input of a head: after tanh where the weights have that layer, in DINOv2 the class
        token after the norm.
        """
        out = self._apply(variables, inputs["pixel_values"])
        pooled = out.tokens[:, 0] if self.config.pool == "token_and_mean" else out.pooled
        outputs = {"last_hidden_state": out.tokens, "pooler_output": pooled, "hidden_states": tuple(out.states)}
        if out.both_logits is not None:
            outputs |= dict(zip(("cls_logits", "distillation_logits"), out.both_logits))
        return outputs if out.logits is None else outputs | {"logits": out.logits}

    def _apply(self, variables: Mapping[str, Any], pixels: Array) -> ViTOutput:
        return self.module.apply(variables, pixels)  # type: ignore[return-value]

    def encode_image(self, images: Any) -> Float[Array, "b d"]:
        """Unit-norm features of images, as `preprocess` takes them: the pooled vector, the input of a head."""
        return self._features(self.variables, self.pixels(images))

    @functools.cached_property
    def _features(self) -> Any:
        return jax.jit(lambda variables, pixels: l2_normalize(self._apply(variables, pixels).pooled))

    def headless(self, classes: int, size: int | None = None) -> Headless:
        """Without the heads that there may be and without the tanh layer before them, as the original fine-tunes.

        DINOv2's get a head on the class token and the mean of the patches side by side, as its own linear heads have;
        of a distilled DeiT the class token alone. The position table stays as it is: it is interpolated in each call.
        """
        c = self.config
        if size is not None and size % c.stride:
            raise MmjaxError(f"images of {size} x {size} cannot be cut in patches: a multiple of {c.stride} can")
        parts = ("head", "head_distilled", "pre_logits")
        params = {name: leaf for name, leaf in self.params.items() if name not in parts}
        pool = "token_and_mean" if c.layer_scale is not None and c.pool == "token" else c.pool
        fields: dict[str, Any] = {"num_classes": classes, "distilled_head": False, "representation": None}
        config = dataclasses.replace(c, **fields, pool=pool, head_bias=0.0)
        return Headless(self.system, config, params, {}, at_size(self.preprocess, size))

    @classmethod
    def classifier(cls, config: ViTConfig) -> ViTClassifier:
        return ViTClassifier(config)

    @classmethod
    def layers(cls, config: ViTConfig) -> tuple[tuple[str, ...], ...]:
        """Embeddings, each block, the rest, as BEiT counts them (optim_factory.py)."""
        tokens = ("cls", "distillation", "registers", "mask_token", "positions")
        blocks = ((f"encoder/block_{i}/**",) for i in range(config.depth))
        return (
            ("root/**", "patch/**", *tokens, "norm_before/**"),
            *blocks,
            ("norm/**", "map_head/**", "pre_logits/**", "head_distilled/**", HEAD),
        )

    def pooled(self, variables: Mapping[str, Any], pixels: Float[Array, "b height width 3"]) -> Float[Array, "b d"]:
        return self._apply(variables, pixels).pooled.astype(jnp.float32)

    def intermediate_layers(self, pixel_values: ArrayLike, n: int = 1) -> list[dict[str, Array]]:
        """The last n blocks' outputs after the final norm: {"class_token": [b, d], "patches": [b, rows, columns, d]}.

        DINOv2's `get_intermediate_layers`; registers are omitted.
        """
        if not 1 <= n <= self.config.depth:
            raise MmjaxError(f"n={n}: the network has {self.config.depth} blocks")
        pixels = jnp.asarray(pixel_values)
        rows = pixels.shape[1] // self.config.stride
        layers = []
        for state in self._normed(self.variables, pixels)[-n:]:
            patches = rearrange(state[:, self.config.prefix :], "b (r c) d -> b r c d", r=rows)
            layers.append(
                {"class_token": state[:, 0], "patches": patches} if self.config.class_token else {"patches": patches}
            )
        return layers

    @functools.cached_property
    def _normed(self) -> Any:
        return jax.jit(lambda variables, pixels: self._apply(variables, pixels).normed_states)
