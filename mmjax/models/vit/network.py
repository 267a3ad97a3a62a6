"""The Vision Transformer (Dosovitskiy et al. 2021) and its kin: DeiT, DINOv2, MoCo v3, CLIP, big_vision, hybrids."""

import dataclasses
import functools
from typing import Any, Literal

import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn
from flax import struct

from mmjax.errors import MmjaxError
from mmjax.models.vit.root import Root, RootConfig
from mmjax.nn.dropout import Dropout
from mmjax.nn.embeddings import PatchEmbed
from mmjax.nn.norm import LayerNorm
from mmjax.nn.positions import Rule, interpolate, sincos_2d
from mmjax.nn.stack import Stack, standard_block
from mmjax.nn.transformer import TORCH, Dense, Init, Mlp, MultiHeadAttention, torch_bias
from mmjax.types import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The config of a ViT; `ViTConfig.b16(num_classes=1000)`.

    width, depth, heads: of the encoder. hidden: width of its feed-forward network.
    patch: side of a patch, in pixels or, in a hybrid, in cells of the root's feature map.
    image_size: (height, width) of the images of the position table; for other sizes it is interpolated by `rule`.
    num_classes: 0: no head.
    positions: "learned", "moco_v3": initialised with sines and cosines (a partition freezes it), or "big_vision":
        fixed ones that are no parameter.
    class_token, class_position: whether there is a class token, and whether the position table has a row for it.
    distilled, distilled_head: DeiT's second token, and a head on it; the logits are then the mean of both heads'.
    patch_bias: whether the patch projection has one. norm_before: a norm before the first block (CLIP).
    registers: tokens without positions after the class token. mask_token: whether a token replaces hidden patches.
    pool: the input of the head: the class token, the mean of the patches, both side by side (DINOv2's linear head), or
        attention by a learned query ("map").
    norm_after_pool: the final norm acts on the pooled vector, not on the tokens (timm's `fc_norm`, MAE fine-tuned).
    representation: width of the tanh layer before the head (`pre_logits`; Hugging Face: `pooler`); None: there is none.
    act, gated, epsilon, layer_scale: of the blocks. gelu_tanh with Google's own numbers, gelu in every torch port.
    key_bias: whether the keys of attention have a bias beside queries and values: not in EVA.
    norm_epsilon: of the final norm; None: `epsilon`. BLIP-2's has its own.
    dropout, attention_dropout, drop_path: rates in training; drop_path is the last block's.
    remat: recomputes blocks in the backward pass.
    init: "vit": Xavier as Google's code, "moco_v3": the same with the patch projection Xavier too, "normal": N(0, 0.02)
        as DINOv2, "timm": the same but for the patch projection, which has torch's default, and the class token,
        which has the others' spread instead of 1e-6 (DeiT, ALBEF, BLIP: their bounds of the truncated normal are 100
        deviations away), "clip": torch's defaults, tokens and positions N(0, 1 / width). head_bias: initial bias of
        the head (AugReg: -10); its kernel is initialised with zeros.
    dtype: of the computation.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    image_size: tuple[int, int] = (224, 224)
    num_classes: int = 0
    positions: Literal["learned", "moco_v3", "big_vision"] = "learned"
    rule: Rule = "bicubic"
    class_token: bool = True
    class_position: bool = True
    distilled: bool = False
    distilled_head: bool = False
    patch_bias: bool = True
    norm_before: bool = False
    registers: int = 0
    mask_token: bool = False
    pool: Literal["token", "mean", "token_and_mean", "map"] = "token"
    norm_after_pool: bool = False
    representation: int | None = None
    act: Literal["gelu", "gelu_tanh", "quick_gelu", "relu"] = "gelu"
    gated: bool = False
    epsilon: float = 1e-6
    layer_scale: float | None = None
    key_bias: bool = True
    norm_epsilon: float | None = None
    root: RootConfig | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    remat: bool = False
    init: Literal["vit", "moco_v3", "normal", "timm", "clip"] = "vit"
    head_bias: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.pool in ("token", "token_and_mean") and not self.class_token:
            raise MmjaxError(f"pool={self.pool!r} needs class_token=True")
        if self.distilled_head and not (self.distilled and self.num_classes):
            raise MmjaxError("distilled_head=True needs distilled=True and num_classes")
        if min(self.grid) < 1:
            raise MmjaxError(f"image_size={self.image_size} holds no patch of {self.patch} times {self.stride}")

    @property
    def stride(self) -> int:
        """Pixels a side that become one token."""
        return self.patch * (self.root.stride if self.root else 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the position table."""
        return self.image_size[0] // self.stride, self.image_size[1] // self.stride

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return int(self.class_token) + int(self.distilled) + self.registers

    @property
    def placed(self) -> int:
        """Rows of the position table before the patches'."""
        return int(self.class_token and self.class_position) + int(self.distilled)

    # Sizes: vit_jax/configs/models.py; the fields of one may be overridden.

    @classmethod
    def ti16(cls, **fields: Any) -> "ViTConfig":
        """Ti/16, 5.5 M parameters without head."""
        return _sized(fields, width=192, heads=3, hidden=768)

    @classmethod
    def s16(cls, **fields: Any) -> "ViTConfig":
        """S/16, 21.7 M."""
        return _sized(fields, width=384, heads=6, hidden=1536)

    @classmethod
    def s32(cls, **fields: Any) -> "ViTConfig":
        """S/32, 22.5 M."""
        return cls.s16(**({"patch": 32} | fields))

    @classmethod
    def b16(cls, **fields: Any) -> "ViTConfig":
        """B/16, 85.8 M."""
        return cls(**fields)

    @classmethod
    def b8(cls, **fields: Any) -> "ViTConfig":
        """B/8, 85.8 M."""
        return _sized(fields, patch=8)

    @classmethod
    def b32(cls, **fields: Any) -> "ViTConfig":
        """B/32, 87.5 M."""
        return _sized(fields, patch=32)

    @classmethod
    def l16(cls, **fields: Any) -> "ViTConfig":
        """L/16, 303 M."""
        return _sized(fields, width=1024, depth=24, heads=16, hidden=4096)

    @classmethod
    def l32(cls, **fields: Any) -> "ViTConfig":
        """L/32, 306 M."""
        return cls.l16(**({"patch": 32} | fields))

    @classmethod
    def h14(cls, **fields: Any) -> "ViTConfig":
        """H/14, 631 M."""
        return _sized(fields, width=1280, depth=32, heads=16, hidden=5120, patch=14)

    @classmethod
    def r50_b16(cls, **fields: Any) -> "ViTConfig":
        """R50+B/16: B behind the first three blocks of a ResNet-50, 97.9 M."""
        return _sized(fields, patch=1, root=RootConfig((3, 4, 9)))

    @classmethod
    def s14_dinov2(cls, registers: bool = False, **fields: Any) -> "ViTConfig":
        """DINOv2 S/14, 22.1 M."""
        return cls.s16(**(_dinov2(registers) | fields))

    @classmethod
    def b14_dinov2(cls, registers: bool = False, **fields: Any) -> "ViTConfig":
        """DINOv2 B/14, 86.6 M."""
        return cls(**(_dinov2(registers) | fields))

    @classmethod
    def l14_dinov2(cls, registers: bool = False, **fields: Any) -> "ViTConfig":
        """DINOv2 L/14, 304 M."""
        return cls.l16(**(_dinov2(registers) | fields))

    @classmethod
    def g14_dinov2(cls, registers: bool = False, **fields: Any) -> "ViTConfig":
        """DINOv2 g/14 ("giant2"), 1136 M; gated feed-forward of width round-up-to-8(int(4 d * 2 / 3))."""
        size: dict[str, Any] = {"width": 1536, "depth": 40, "heads": 24, "hidden": 4096, "gated": True}
        return cls(**(_dinov2(registers) | size | fields))

    @classmethod
    def g14_eva(cls, **fields: Any) -> "ViTConfig":
        """EVA-CLIP's g/14 without its last block, as in BLIP-2 (LAVIS eva_vit.py:428-455), 986 M."""
        size: dict[str, Any] = {"width": 1408, "depth": 39, "heads": 16, "hidden": 6144, "patch": 14}
        return cls(**(size | {"key_bias": False, "init": "timm", "rule": "bicubic"} | fields))

    @classmethod
    def siglip_so400m14(cls, **fields: Any) -> "ViTConfig":
        """SigLIP's So400m/14 at 384 pixels as a tower, without the head that pools: 413 M. It drops the last 6 pixels
        of either axis."""
        size: dict[str, Any] = {"width": 1152, "depth": 27, "heads": 16, "hidden": 4304, "patch": 14}
        size |= {"image_size": (384, 384), "class_token": False, "pool": "mean", "act": "gelu_tanh", "init": "timm"}
        return cls(**(size | fields))

    @classmethod
    def clip(
        cls, image_size: int, patch: int, width: int, depth: int, heads: int, hidden: int, **fields: Any
    ) -> "ViTConfig":
        """CLIP's image tower: it pools the class token after a separate norm."""
        kind: dict[str, Any] = {"act": "quick_gelu", "epsilon": 1e-5, "init": "clip", "rule": "bicubic_antialias"}
        kind |= {"patch_bias": False, "norm_before": True, "norm_after_pool": True}
        size: dict[str, Any] = {"image_size": (image_size, image_size), "patch": patch, "width": width, "depth": depth}
        size |= {"heads": heads, "hidden": hidden}
        return cls(**(kind | size | fields))


def _sized(fields: dict[str, Any], **size: Any) -> ViTConfig:
    return ViTConfig(**(size | fields))


def _dinov2(registers: bool) -> dict[str, Any]:
    """The common fields of DINOv2 models; those with registers interpolate by another rule (hub/backbones.py)."""
    fields: dict[str, Any] = {
        "patch": 14,
        "image_size": (518, 518),
        "layer_scale": 1.0,
        "mask_token": True,
        "init": "normal",
    }
    return fields | {"registers": 4 if registers else 0, "rule": "bicubic_antialias" if registers else "dinov2"}


@struct.dataclass
class ViTOutput:
    """The outputs of the network; under `jit` unused ones are not computed.

    tokens: after the final norm: class token, distillation token, registers, patches in row-major order.
    pooled: the input of the head. logits: float32, None without a head.
    both_logits: of DeiT's two heads, the class token's first; None where there is one.
    states: the encoder's input and the output of each block, before the final norm.
    normed_states: the same, each through the final norm (DINOv2's `get_intermediate_layers`).
    """

    tokens: Float[Array, "b n d"]
    pooled: Float[Array, "b e"]
    logits: Float[Array, "b c"] | None
    both_logits: tuple[Float[Array, "b c"], Float[Array, "b c"]] | None
    states: list[Float[Array, "b n d"]]
    normed_states: list[Float[Array, "b n d"]]


class ViT(nn.Module):
    """Images -> tokens, pooled vector, logits.

    Parameter paths: root/..., patch/projection, cls, distillation, registers, mask_token, positions, norm_before,
    encoder/block_{i}/..., norm, map_head/..., pre_logits, head, head_distilled.

    axis_name: the mapped axis that cuts the batch. Dropout needs it, so that its masks do not depend on the cut.
    """

    config: ViTConfig
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b height width 3"],
        hidden_patches: Bool[Array, "b m"] | None = None,
        train: bool = False,
    ) -> ViTOutput:
        """hidden_patches: True where a patch, in row-major order, is replaced by the mask token."""
        c = self.config
        x = self._embed(images, hidden_patches)
        x = LayerNorm(c.epsilon, c.dtype, name="norm_before")(x) if c.norm_before else x
        x = Dropout(c.dropout, self.axis_name)(x, train)
        block = {
            "width": c.width,
            "heads": c.heads,
            "hidden": c.hidden,
            "act": "silu" if c.gated else c.act,
            "gated": c.gated,
            "epsilon": c.epsilon,
            "layer_scale": c.layer_scale,
            "key_bias": c.key_bias,
            "dropout": c.dropout,
            "attention_dropout": c.attention_dropout,
            "activation_dropout": c.dropout,
            "init_with": _block_init(c),
            "dtype": c.dtype,
            "axis_name": self.axis_name,
        }
        encoder = Stack(c.depth, functools.partial(standard_block, **block), None, c.drop_path, c.remat, name="encoder")
        states = encoder(x, train=train)
        norm = LayerNorm(c.epsilon if c.norm_epsilon is None else c.norm_epsilon, c.dtype, name="norm")
        if c.norm_after_pool:
            tokens, normed = states[-1], states
            pooled = norm(self._pool(tokens))
        else:
            normed = [norm(state) for state in states]
            tokens = normed[-1]
            pooled = self._pool(tokens)
        if c.representation is not None:
            pooled = jnp.tanh(Dense(c.representation, dtype=c.dtype, name="pre_logits")(pooled))
        logits, both = self._classify(pooled, tokens)
        return ViTOutput(tokens, pooled, logits, both, states, normed)

    def _embed(self, images: Array, hidden_patches: Array | None) -> Array:
        """Images -> tokens with positions [b, n, d]."""
        c = self.config
        x = images.astype(c.dtype)
        if c.root is not None:
            x = Root(c.root, c.dtype, name="root")(x)
        kernel_init = {
            "vit": nn.initializers.lecun_normal(),
            "moco_v3": nn.initializers.xavier_uniform(),
            "normal": nn.initializers.normal(0.02),
            "timm": TORCH,
            "clip": TORCH,
        }[c.init]
        bias_init = torch_bias(3 * c.patch**2) if c.init == "timm" else nn.initializers.zeros
        x = PatchEmbed(c.width, c.patch, c.patch_bias, c.dtype, kernel_init, bias_init, name="patch")(x)
        grid = (x.shape[1], x.shape[2])
        x = rearrange(x, "b r s d -> b (r s) d")
        if c.mask_token:
            mask_token = self.param("mask_token", nn.initializers.zeros, (1, c.width))
            if hidden_patches is not None:
                x = jnp.where(hidden_patches[..., None], mask_token.astype(x.dtype), x)
        elif hidden_patches is not None:
            raise MmjaxError("hidden_patches needs a network with mask_token=True")
        positions = self._positions(grid).astype(x.dtype)
        x = x + positions[:, c.placed :]
        return jnp.concatenate([*self._prefix(x, positions), x], axis=1)

    def _positions(self, grid: tuple[int, int]) -> Array:
        """[1, placed + rows * columns, d] for the grid."""
        c = self.config
        if c.positions == "big_vision":
            return jnp.asarray(sincos_2d(grid, c.width, "big_vision"))
        shape = (1, c.placed + c.grid[0] * c.grid[1], c.width)

        def waves(rng: Any, shape: tuple[int, ...]) -> Array:
            return jnp.zeros(shape).at[:, c.placed :].set(sincos_2d(c.grid, c.width, "moco_v3"))

        init = nn.initializers.normal(c.width**-0.5 if c.init == "clip" else 0.02)
        table = self.param("positions", waves if c.positions == "moco_v3" else init, shape)
        return interpolate(table, c.grid, grid, c.rule, prefix=c.placed)

    def _prefix(self, x: Array, positions: Array) -> list[Array]:
        """The tokens before the patches, each [b, k, d]; class and distillation token with their positions."""
        c = self.config
        tokens = []
        if c.class_token:
            init = nn.initializers.normal({"clip": c.width**-0.5, "timm": 0.02}.get(c.init, 1e-6))
            cls = self.param("cls", nn.initializers.zeros if c.init == "vit" else init, (1, 1, c.width)).astype(x.dtype)
            tokens.append(cls + positions[:, :1] if c.class_position else cls)
        if c.distilled:
            token = self.param("distillation", nn.initializers.normal(0.02), (1, 1, c.width)).astype(x.dtype)
            tokens.append(token + positions[:, c.placed - 1 : c.placed])
        if c.registers:
            token = self.param("registers", nn.initializers.normal(1e-6), (1, c.registers, c.width))
            tokens.append(token.astype(x.dtype))
        return [repeat(token, "1 k d -> b k d", b=x.shape[0]) for token in tokens]

    def _pool(self, tokens: Array) -> Array:
        c = self.config
        if c.pool == "map":
            return MapHead(c, name="map_head")(tokens)
        if c.pool == "token":
            return tokens[:, 0]
        mean = tokens[:, c.prefix :].astype(jnp.float32).mean(1).astype(tokens.dtype)
        return mean if c.pool == "mean" else jnp.concatenate([tokens[:, 0], mean], axis=-1)

    def _classify(self, pooled: Array, tokens: Array) -> tuple[Array | None, tuple[Array, Array] | None]:
        c = self.config
        if not c.num_classes:
            return None, None
        zeros, bias = nn.initializers.zeros, nn.initializers.constant(c.head_bias)
        logits = Dense(c.num_classes, kernel_init=zeros, bias_init=bias, name="head")(pooled)
        if not c.distilled_head:
            return logits, None
        other = Dense(c.num_classes, kernel_init=zeros, bias_init=bias, name="head_distilled")(tokens[:, 1])
        return (logits + other) / 2, (logits, other)


class Tower(nn.Module):
    """Images -> the tokens [n, p, d] of one layer, for a network that stands on a ViT; parameters as of `ViT`.

    layer: of its states, counted as a list is: 0 what enters the blocks, -2 what the last but one gives (LLaVA);
        None: the last after the final norm; of several the channels are concatenated.
    class_token: keep the tokens before the patches.
    axis_name: as in `ViT`.
    """

    config: ViTConfig
    layer: int | tuple[int, ...] | None = None
    class_token: bool = True
    axis_name: str | None = None

    def setup(self) -> None:
        self.vit = ViT(self.config, self.axis_name)
        nn.share_scope(self, self.vit)

    def __call__(self, images: Float[Array, "n height width 3"], train: bool = False) -> Float[Array, "n p d"]:
        out = self.vit(images, train=train)
        if isinstance(self.layer, tuple):
            tokens = jnp.concatenate([out.states[layer] for layer in self.layer], axis=-1)
        else:
            tokens = out.tokens if self.layer is None else out.states[self.layer]
        return tokens if self.class_token else tokens[:, self.config.prefix :]


def _block_init(config: ViTConfig) -> Init:
    normal, zeros = nn.initializers.normal(0.02), nn.initializers.zeros
    if config.init in ("normal", "timm"):
        return Init(normal, normal, normal, normal, zeros)
    if config.init == "clip":  # q, k and v are one matrix there, whence the half of Xavier's variance
        return Init(nn.initializers.variance_scaling(0.5, "fan_in", "uniform"), TORCH, TORCH, TORCH, zeros)
    return Init() if config.init == "vit" else Init(mlp_bias=zeros)


class MapHead(nn.Module):
    """Attention pooling (Zhai et al. 2022; big_vision's MAPHead): a learned query reads the tokens, then an MLP."""

    config: ViTConfig

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        c = self.config
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, c.width)).astype(tokens.dtype)
        query = repeat(probe, "1 1 d -> b 1 d", b=tokens.shape[0])
        x = MultiHeadAttention(c.heads, c.width, dtype=c.dtype, name="attention")(query, tokens)
        y = LayerNorm(c.epsilon, c.dtype, name="norm")(x)
        return (x + Mlp(c.hidden, c.act, dtype=c.dtype, name="mlp")(y))[:, 0]
