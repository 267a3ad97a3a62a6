"""MoCo's network: a backbone, a projection head and, in v3, a prediction head.

The momentum encoder has no module: it is backbone and projector applied to other parameters.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.models.resnet.network import ResNet, ResNetConfig, bias_init, torch_linear
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.nn.activation import relu
from mmjax.nn.batch_norm import BatchNorm
from mmjax.nn.transformer import Dense
from mmjax.types import Array, Float

FROZEN_STEM = {"backbone/patch/projection/**": "frozen", "backbone/positions": "frozen"}
"""Partition rules of v3's ViT: the patch projection is not trained (`--stop-grad-conv1`), the positions are fixed."""


@dataclass(frozen=True)
class MoCoConfig:
    """Sizes of the network and of what surrounds it; class methods give the published ones.

    Attributes:
        backbone: without a head (num_classes=0).
        version: 1 or 2: one projector without norms, a queue; 3: norms in the heads, a predictor, no queue.
        layers: matrices of the projector.
        hidden: width between them, and in the predictor. dim: of the features that are compared.
        predictor_norm: whether the predictor ends in a norm (v3's ViT).
        queue: length of the queue of keys; 0: no queue.
        momentum, temperature: the initial values in training.
        holds_state: whether the variables also hold the momentum encoder and the queue, as released checkpoints do.
        dtype: compute dtype; norms' statistics and losses are float32.
    """

    backbone: ResNetConfig | ViTConfig
    version: Literal[1, 2, 3] = 2
    layers: int = 2
    hidden: int = 2048
    dim: int = 128
    predictor_norm: bool = False
    queue: int = 65536
    momentum: float = 0.999
    temperature: float = 0.2
    holds_state: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises MmjaxError for fields that do not fit each other."""
        if self.version not in (1, 2, 3):
            raise MmjaxError(f"version={self.version}: MoCo has versions 1, 2 and 3")
        if (self.version == 3) == (self.queue > 0):
            raise MmjaxError(f"version={self.version}, queue={self.queue}: v1 and v2 have a queue, v3 has none")
        if self.backbone.num_classes:
            raise MmjaxError(f"backbone.num_classes={self.backbone.num_classes}: a projector stands where the head was")

    @property
    def features(self) -> int:
        """Length of the backbone's features."""
        return self.backbone.features if isinstance(self.backbone, ResNetConfig) else self.backbone.width

    @classmethod
    def v1(cls, backbone: ResNetConfig | None = None, **fields: Any) -> "MoCoConfig":
        """ResNet-50, one matrix: 23,770,304 parameters."""
        sizes: dict[str, Any] = {"version": 1, "layers": 1, "temperature": 0.07}
        return cls(backbone or ResNetConfig.r50(num_classes=0), **sizes | fields)

    @classmethod
    def v2(cls, backbone: ResNetConfig | None = None, **fields: Any) -> "MoCoConfig":
        """ResNet-50, a hidden layer as wide as the features: 27,966,656 parameters."""
        backbone = backbone or ResNetConfig.r50(num_classes=0)
        sizes: dict[str, Any] = {"version": 2, "hidden": backbone.features}
        return cls(backbone, **sizes | fields)

    @classmethod
    def v3_resnet50(cls, **fields: Any) -> "MoCoConfig":
        """35,058,752 parameters with the predictor."""
        sizes: dict[str, Any] = {
            "version": 3,
            "hidden": 4096,
            "dim": 256,
            "queue": 0,
            "momentum": 0.99,
            "temperature": 1.0,
        }
        return cls(ResNetConfig.r50(num_classes=0, zero_init_residual=True), **sizes | fields)

    @classmethod
    def v3_vit(cls, backbone: ViTConfig, **fields: Any) -> "MoCoConfig":
        """Three matrices, a predictor that ends in a norm."""
        sizes: dict[str, Any] = {"version": 3, "layers": 3, "hidden": 4096, "dim": 256, "predictor_norm": True}
        sizes |= {"queue": 0, "momentum": 0.99, "temperature": 0.2}
        return cls(backbone, **sizes | fields)

    @classmethod
    def v3_s16(cls, **fields: Any) -> "MoCoConfig":
        """ViT-S with 12 heads (DeiT-S has 6): 42,815,104 trainable parameters."""
        return cls.v3_vit(ViTConfig.s16(heads=12, positions="moco_v3", init="moco_v3", rule="bilinear"), **fields)

    @classmethod
    def v3_b16(cls, **fields: Any) -> "MoCoConfig":
        """108,150,016 trainable parameters."""
        return cls.v3_vit(ViTConfig.b16(positions="moco_v3", init="moco_v3", rule="bilinear"), **fields)


class Head(nn.Module):
    """Matrices dense_0, dense_1, ..., ReLU between them; in v3 without biases and with norms bn_0, bn_1, ...

    last_norm: whether a norm without scale and bias ends it. axis_name: the mapped axis over which the batch is cut.
    """

    widths: tuple[int, ...]
    norms: bool
    last_norm: bool
    dtype: str
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], train: bool, bn_groups: int) -> Float[Array, "b e"]:
        for i, width in enumerate(self.widths):
            last = i == len(self.widths) - 1
            x = Dense(width, not self.norms, self.dtype, torch_linear, bias_init(x.shape[-1]), name=f"dense_{i}")(x)
            if self.norms and (not last or self.last_norm):
                x = BatchNorm(
                    use_running_average=not train,
                    groups=bn_groups,
                    axis_name=self.axis_name,
                    use_scale=not last,
                    use_bias=not last,
                    dtype=self.dtype,
                    name=f"bn_{i}",
                )(x)
            x = x if last else relu(x)
        return x


class MoCo(nn.Module):
    """Images -> {"features": the backbone's [b, d], "embedding": the projector's [b, dim], and from v3's predictor
    "prediction" [b, dim]}, none of them normalised. Parameter paths: backbone/..., projector/..., predictor/...

    axis_name: the mapped axis over which the batch is cut.
    """

    config: MoCoConfig
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b height width 3"],
        train: bool = False,
        bn_groups: int = 1,
        predict: bool = True,
    ) -> dict[str, Array]:
        """predict: False for keys: the momentum encoder has no predictor. The others as in `ResNet`."""
        c = self.config
        backbone: Any = dataclasses.replace(c.backbone, dtype=c.dtype)
        if isinstance(backbone, ResNetConfig):
            features = ResNet(backbone, self.axis_name, name="backbone")(images, train, bn_groups)["pooled"]
        else:
            features = ViT(backbone, self.axis_name, name="backbone")(images, train=train).pooled
        norms, widths = c.version == 3, (c.hidden,) * (c.layers - 1) + (c.dim,)
        projector = Head(widths, norms, norms, c.dtype, self.axis_name, name="projector")
        embedding = projector(features, train, bn_groups)
        outputs = {"features": features, "embedding": embedding}
        if norms and predict:
            predictor = Head((c.hidden, c.dim), True, c.predictor_norm, c.dtype, self.axis_name, name="predictor")
            outputs["prediction"] = predictor(embedding, train, bn_groups)
        return {name: value.astype(jax.numpy.float32) for name, value in outputs.items()}
