"""The residual network: torchvision's `models/resnet.py`, the CIFAR family of the paper's section 4.2, plain nets, and
CLIP's (openai/CLIP model.py:10-154).

Batch normalisation in training: `apply(variables, x, train=True, bn_groups=8, mutable=["batch_stats"])`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.models.resnet.attention_pool import AttentionPool, AttentionPoolConfig
from mmjax.nn.activation import relu
from mmjax.nn.batch_norm import BatchNorm
from mmjax.nn.convolution import Conv, avg_pool, kaiming_fan_out, max_pool
from mmjax.types import Array, Float

EXPANSION = {"basic": 1, "bottleneck": 4}


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a network; class methods give the published ones.

    Attributes:
        layers: blocks a stage.
        block: two 3x3 convolutions ("basic") or 1x1, 3x3, 1x1 ("bottleneck", four times as wide outside).
        stem: 7x7 stride 2 and a 3x3 max-pool ("imagenet"), 3x3 stride 1 ("cifar"), or three 3x3 and a 2x2 average pool
            ("clip").
        stem_width: channels after the stem.
        stage_widths: planes a stage; a stage's output has planes times the block's expansion.
        groups, width_per_group: a bottleneck's 3x3 is planes * width_per_group / 64 * groups wide (ResNeXt, wide nets).
        shortcut: where the shape changes: 1x1 convolution and norm ("projection", the paper's option B), every s-th
            pixel and zero channels ("pad", option A); or nothing is ever added ("none", a plain net).
        average_strides: a bottleneck and its shortcut take the stride by an average pool before their last 1x1 (CLIP).
        stride_in_1x1: a bottleneck's stride is in its first 1x1 (the original v1), not in the 3x3 (torchvision, v1.5).
        first_stage_stride: 2 halves the maps in the first stage too.
        dilate: for stages 2, 3, 4: dilation instead of the stride (torchvision's replace_stride_with_dilation).
        zero_init_residual: the last norm of every block starts with scale 0, the block as the identity.
        attention_pool: pools the last maps instead of their mean (CLIP); None: the mean.
        num_classes: outputs of the linear head; 0 for none.
        bn_momentum: the share of the running statistics that is kept (1 - torch's).
        remat: recomputes a block's activations in the backward pass.
        dtype: compute dtype; norms' statistics, pooled features and logits are float32.
    """

    layers: tuple[int, ...] = (3, 4, 6, 3)
    block: Literal["basic", "bottleneck"] = "bottleneck"
    stem: Literal["imagenet", "cifar", "clip"] = "imagenet"
    stem_width: int = 64
    stage_widths: tuple[int, ...] = (64, 128, 256, 512)
    groups: int = 1
    width_per_group: int = 64
    shortcut: Literal["projection", "pad", "none"] = "projection"
    average_strides: bool = False
    stride_in_1x1: bool = False
    first_stage_stride: int = 1
    dilate: tuple[bool, bool, bool] = (False, False, False)
    zero_init_residual: bool = False
    attention_pool: AttentionPoolConfig | None = None
    num_classes: int = 1000
    bn_epsilon: float = 1e-5
    bn_momentum: float = 0.9
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises MmjaxError for fields that do not fit each other."""
        if len(self.layers) != len(self.stage_widths) or not 1 <= len(self.layers) <= 4 or min(self.layers) < 1:
            raise MmjaxError(f"layers={self.layers} and stage_widths={self.stage_widths} should name 1 to 4 stages")
        if self.block not in EXPANSION:
            raise MmjaxError(f"block={self.block!r}: choose basic or bottleneck")
        only = {"groups": self.groups != 1, "width_per_group": self.width_per_group != 64}
        only |= {"dilate": any(self.dilate), "stride_in_1x1": self.stride_in_1x1}
        only |= {"average_strides": self.average_strides}
        wrong = [name for name, used in only.items() if used]
        if self.block == "basic" and wrong:
            raise MmjaxError(f"block='basic' knows no {', '.join(wrong)}; these are of the bottleneck")

    @property
    def expansion(self) -> int:
        return EXPANSION[self.block]

    @property
    def features(self) -> int:
        """Length of the pooled features."""
        return self.attention_pool.width if self.attention_pool else self.channels

    @property
    def channels(self) -> int:
        """The channels of the last feature map."""
        return self.stage_widths[-1] * self.expansion

    def inner_width(self, stage: int) -> int:
        """Channels of a bottleneck's 3x3."""
        return int(self.stage_widths[stage] * self.width_per_group / 64) * self.groups

    def widened(self, factor: int) -> Self:
        """Every layer `factor` times as wide, stem and outputs included."""
        widths = tuple(factor * width for width in self.stage_widths)
        return dataclasses.replace(self, stem_width=factor * self.stem_width, stage_widths=widths)

    @classmethod
    def r18(cls, **fields: Any) -> Self:
        return cls(**dict[str, Any](layers=(2, 2, 2, 2), block="basic") | fields)

    @classmethod
    def r34(cls, **fields: Any) -> Self:
        return cls(**dict[str, Any](block="basic") | fields)

    @classmethod
    def r50(cls, **fields: Any) -> Self:
        return cls(**fields)

    @classmethod
    def r101(cls, **fields: Any) -> Self:
        return cls(**dict[str, Any](layers=(3, 4, 23, 3)) | fields)

    @classmethod
    def r152(cls, **fields: Any) -> Self:
        return cls(**dict[str, Any](layers=(3, 8, 36, 3)) | fields)

    @classmethod
    def resnext50_32x4d(cls, **fields: Any) -> Self:
        return cls.r50(**{"groups": 32, "width_per_group": 4} | fields)

    @classmethod
    def resnext101_32x8d(cls, **fields: Any) -> Self:
        return cls.r101(**{"groups": 32, "width_per_group": 8} | fields)

    @classmethod
    def resnext101_64x4d(cls, **fields: Any) -> Self:
        return cls.r101(**{"groups": 64, "width_per_group": 4} | fields)

    @classmethod
    def wide_r50_2(cls, **fields: Any) -> Self:
        """Only the 3x3 of each bottleneck is twice as wide."""
        return cls.r50(**{"width_per_group": 128} | fields)

    @classmethod
    def wide_r101_2(cls, **fields: Any) -> Self:
        return cls.r101(**{"width_per_group": 128} | fields)

    @classmethod
    def r50w2x(cls, **fields: Any) -> Self:
        """MoCo's: every layer twice as wide."""
        return cls.r50(**fields).widened(2)

    @classmethod
    def r50w4x(cls, **fields: Any) -> Self:
        return cls.r50(**fields).widened(4)

    @classmethod
    def clip(
        cls,
        image_size: int = 224,
        layers: tuple[int, ...] = (3, 4, 6, 3),
        width: int = 64,
        heads: int = 32,
        features: int = 1024,
        **fields: Any,
    ) -> Self:
        """CLIP's image tower, without a head. width: channels of the stem. features: of the attention pool's output."""
        pool = AttentionPoolConfig(heads, features, (image_size // 32, image_size // 32))
        widths = tuple(width * 2**stage for stage in range(len(layers)))
        sizes: dict[str, Any] = {"layers": layers, "stem": "clip", "stem_width": width, "stage_widths": widths}
        sizes |= {"average_strides": True, "attention_pool": pool, "zero_init_residual": True, "num_classes": 0}
        return cls(**sizes | fields)

    @classmethod
    def cifar(cls, depth: int = 20, skip: Literal["projection", "pad", "none"] = "pad", **fields: Any) -> Self:
        """6n + 2 layers on 32x32 images, 10 classes: 20, 32, 44, 56, 110 or 1202 in the paper; skip="none" is plain."""
        if depth < 8 or (depth - 2) % 6:
            raise MmjaxError(f"depth={depth}: the CIFAR family has 6n + 2 layers")
        sizes = {"layers": ((depth - 2) // 6,) * 3, "stage_widths": (16, 32, 64), "stem_width": 16, "num_classes": 10}
        return cls(**{"block": "basic", "stem": "cifar", "shortcut": skip, **sizes} | fields)


@dataclass(frozen=True)
class Geometry:
    """The shapes of one block: channels in and out, stride of the block, dilation of its 3x3."""

    inside: int
    out: int
    stride: int
    dilation: int


def geometries(config: ResNetConfig) -> tuple[tuple[Geometry, ...], ...]:
    """Every block of every stage. The first block after a stride was replaced still has the dilation from before."""
    stages, inside, dilation = [], config.stem_width, 1
    for stage, (count, planes) in enumerate(zip(config.layers, config.stage_widths)):
        out, stride, before = planes * config.expansion, 2 if stage else config.first_stage_stride, dilation
        if stage and config.dilate[stage - 1]:
            dilation, stride = dilation * stride, 1
        blocks = [Geometry(inside, out, stride, before)]
        blocks += [Geometry(out, out, 1, dilation)] * (count - 1)
        stages.append(tuple(blocks))
        inside = out
    return tuple(stages)


class Block(nn.Module):
    """Convolutions with norms, plus the shortcut, then ReLU (post-activation)."""

    config: ResNetConfig
    geometry: Geometry
    width: int
    train: bool
    bn_groups: int
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b out_height out_width out"]:
        config, geometry = self.config, self.geometry
        stride, dilation = geometry.stride, geometry.dilation
        if config.block == "basic":
            shapes = [(3, geometry.out, stride, 1), (3, geometry.out, 1, 1)]
        else:
            first, second = (stride, 1) if config.stride_in_1x1 else (1, stride)
            first, second = (1, 1) if config.average_strides else (first, second)
            shapes = [(1, self.width, first, 1), (3, self.width, second, config.groups), (1, geometry.out, 1, 1)]
        y = x
        for i, (size, features, strides, groups) in enumerate(shapes, 1):
            padding, dilated = (dilation, dilation) if size == 3 else (0, 1)
            options: Any = {"dtype": config.dtype, "kernel_init": kernel_init(config), "name": f"conv{i}"}
            conv = Conv(features, size, strides, padding, groups, dilated, **options)
            last = i == len(shapes)
            y = self.shrink(y) if last else y
            y = self.norm(f"bn{i}", zero=last and config.zero_init_residual)(conv(y))
            y = y if last else relu(y)
        return relu(y + self.shortcut(x)) if config.shortcut != "none" else relu(y)

    def shortcut(self, x: Array) -> Array:
        config, geometry = self.config, self.geometry
        if geometry.stride == 1 and geometry.inside == geometry.out:
            return x
        if config.shortcut == "projection":
            stride, options = 1 if config.average_strides else geometry.stride, {"kernel_init": kernel_init(config)}
            conv = Conv(geometry.out, 1, stride, dtype=config.dtype, name="shortcut_conv", **options)
            return self.norm("shortcut_bn")(conv(self.shrink(x)))
        # As many zeros before as after (akamaster/pytorch_resnet_cifar10; the paper does not say where).
        more = geometry.out - geometry.inside
        x = x[:, :: geometry.stride, :: geometry.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))

    def shrink(self, x: Array) -> Array:
        stride = self.geometry.stride if self.config.average_strides else 1
        return avg_pool(x, stride, stride) if stride > 1 else x

    def norm(self, name: str, zero: bool = False) -> BatchNorm:
        return norm(self.config, self.train, self.bn_groups, self.axis_name, name, zero)


def norm(
    config: ResNetConfig, train: bool, groups: int, axis_name: str | None, name: str, zero: bool = False
) -> BatchNorm:
    return BatchNorm(
        use_running_average=not train,
        momentum=config.bn_momentum,
        epsilon=config.bn_epsilon,
        groups=groups,
        axis_name=axis_name,
        scale_init=nn.initializers.zeros if zero else nn.initializers.ones,
        dtype=config.dtype,
        name=name,
    )


class ResNet(nn.Module):
    """Images to feature maps, pooled features and, where there is a head, logits.

    axis_name: the mapped axis over which the batch is cut.
    """

    config: ResNetConfig
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b height width 3"],
        train: bool = False,
        bn_groups: int = 1,
    ) -> dict[str, Array]:
        """A dict of outputs; `jit` drops unused ones.

        Args:
            train: normalise by the batch (and move the running statistics, if "batch_stats" is mutable).
            bn_groups: parts of the global batch with separate statistics; see `mmjax.nn.batch_norm`.

        Returns:
            stem [b, h, w, c]; C2, C3, ...: a stage's output each, at 1/4, 1/8, 1/16, 1/32 of the size; pooled [b, c],
            of the last, float32; logits [b, classes], float32, if num_classes is not 0.
        """
        config, width = self.config, self.config.stem_width
        # (name, channels, size, stride, padding) of each convolution, in CLIP's counted from 1
        stem = [("", width, 7, 2, 3)] if config.stem == "imagenet" else [("", width, 3, 1, 1)]
        if config.stem == "clip":
            stem = [("1", width // 2, 3, 2, 1), ("2", width // 2, 3, 1, 1), ("3", width, 3, 1, 1)]
        for i, features, size, stride, padding in stem:
            options: Any = {"dtype": config.dtype, "kernel_init": kernel_init(config), "name": f"stem_conv{i}"}
            x = Conv(features, size, stride, padding, **options)(x)
            x = relu(norm(config, train, bn_groups, self.axis_name, f"stem_bn{i}")(x))
        if config.stem != "cifar":
            x = avg_pool(x, 2, 2) if config.stem == "clip" else max_pool(x, 3, 2, 1)
        maps = {"stem": x}
        block = nn.remat(Block) if config.remat else Block
        for stage, blocks in enumerate(geometries(config)):
            for i, geometry in enumerate(blocks):
                name = f"stage{stage + 1}_block{i}"
                x = block(config, geometry, config.inner_width(stage), train, bn_groups, self.axis_name, name=name)(x)
            maps[f"C{stage + 2}"] = x
        if config.attention_pool is None:
            pooled = jnp.mean(x.astype(jnp.float32), (1, 2))
        else:
            pooled = AttentionPool(config.attention_pool, config.dtype, name="attention_pool")(x).astype(jnp.float32)
        maps["pooled"] = pooled
        if config.num_classes:
            maps["logits"] = nn.Dense(
                config.num_classes, kernel_init=torch_linear, bias_init=bias_init(config.features), name="head"
            )(pooled)
        return maps


def kernel_init(config: ResNetConfig) -> Any:
    """The initializer of the convolutions: He's as in torchvision, or torch's default (CLIP)."""
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return uniform if config.stem == "clip" else kaiming_fan_out


def torch_linear(rng: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """torch's default for the weight of a Linear: uniform within 1/sqrt(inputs) on both sides of 0."""
    return bias_init(shape[0])(rng, shape, dtype)


def bias_init(inputs: int) -> Any:
    """The same law for its bias."""
    bound = inputs**-0.5
    return lambda rng, shape, dtype=jnp.float32: jax.random.uniform(rng, shape, dtype, -bound, bound)
