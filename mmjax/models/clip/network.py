"""CLIP's two towers (openai/CLIP model.py; open_clip model.py and transformer.py): embeddings and what leads there."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Self

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.models.clip.modified_resnet import ModifiedResNet, ModifiedResNetConfig, torch_conv
from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.nn.embeddings import PatchEmbed
from mmjax.nn.masks import padding_mask
from mmjax.nn.norm import LayerNorm
from mmjax.nn.positions import interpolate
from mmjax.nn.stack import Stack, standard_block
from mmjax.nn.transformer import Dense, Init
from mmjax.types import Array, Float, Int, Params

EPSILON = 1e-5
normal = nn.initializers.normal


@dataclass(frozen=True)
class CLIPVisionConfig:
    """A ViT with a norm before its blocks and no bias in the patch projection. hidden: width of the feed-forward."""

    image_size: int = 224
    patch: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072

    @property
    def grid(self) -> int:
        return self.image_size // self.patch


@dataclass(frozen=True)
class CLIPTextConfig:
    """A causal transformer. eos: the id whose first place is pooled; None: the place of the largest id, as OpenAI
    does (Hugging Face too, where its config says eos_token_id=2)."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    depth: int = 12
    heads: int = 8
    hidden: int = 2048
    eos: int | None = None


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers; class methods give the published sizes (parameter counts: tests/models/test_clip.py).

    Attributes:
        vision: CLIP's ViT, CLIP's ResNet, or an ordinary ResNet with a linear projection of its pooled features.
        embed_dim: of the common space; 0: towers end with "pooled", before the projection.
        act: "quick_gelu" in all of OpenAI's weights, "gelu" in most of open_clip's: by weights, not by size, and the
            wrong one costs points in silence.
        init_temperature: logit_scale starts at -log of it.
        init_bias: of SigLIP's logit_bias; None: there is none.
        remat: blocks are computed again in the backward pass.
        dtype: compute dtype; norms' statistics, softmax and logits are float32.
    """

    vision: CLIPVisionConfig | ModifiedResNetConfig | ResNetConfig = CLIPVisionConfig()
    text: CLIPTextConfig = CLIPTextConfig()
    embed_dim: int = 512
    act: str = "quick_gelu"
    init_temperature: float = 0.07
    init_bias: float | None = None
    remat: bool = False
    dtype: str = "float32"

    @property
    def image_size(self) -> int | None:
        """Side of the images; None: any (an ordinary ResNet)."""
        return None if isinstance(self.vision, ResNetConfig) else self.vision.image_size

    @classmethod
    def _of(cls, fields: dict[str, Any], **size: Any) -> Self:
        return cls(**size | fields)

    @classmethod
    def b32(cls, **fields: Any) -> Self:
        return cls(**fields)

    @classmethod
    def b16(cls, **fields: Any) -> Self:
        return cls._of(fields, vision=CLIPVisionConfig(patch=16))

    @classmethod
    def l14(cls, image_size: int = 224, **fields: Any) -> Self:
        vision = CLIPVisionConfig(image_size, 14, 1024, 24, 16, 4096)
        return cls._of(fields, vision=vision, text=_text(768, 12), embed_dim=768)

    @classmethod
    def l14_336(cls, **fields: Any) -> Self:
        return cls.l14(336, **fields)

    @classmethod
    def rn50(cls, **fields: Any) -> Self:
        return cls._of(fields, vision=ModifiedResNetConfig(), embed_dim=1024)

    @classmethod
    def rn101(cls, **fields: Any) -> Self:
        return cls._of(fields, vision=ModifiedResNetConfig(layers=(3, 4, 23, 3)))

    @classmethod
    def rn50x4(cls, **fields: Any) -> Self:
        vision = ModifiedResNetConfig(288, (4, 6, 10, 6), 80, 40)
        return cls._of(fields, vision=vision, text=_text(640, 12), embed_dim=640)

    @classmethod
    def rn50x16(cls, **fields: Any) -> Self:
        vision = ModifiedResNetConfig(384, (6, 8, 18, 8), 96, 48)
        return cls._of(fields, vision=vision, text=_text(768, 12), embed_dim=768)

    @classmethod
    def rn50x64(cls, **fields: Any) -> Self:
        vision = ModifiedResNetConfig(448, (3, 15, 36, 10), 128, 64)
        return cls._of(fields, vision=vision, text=_text(1024, 12), embed_dim=1024)

    @classmethod
    def b16_plus_240(cls, **fields: Any) -> Self:
        """open_clip's, and the three below: erf GELU; heads of H, g and bigG are wider than 64."""
        vision = CLIPVisionConfig(240, 16, 896, 12, 14, 3584)
        return cls._of(fields, vision=vision, text=_text(640, 12), embed_dim=640, act="gelu")

    @classmethod
    def h14(cls, **fields: Any) -> Self:
        vision = CLIPVisionConfig(224, 14, 1280, 32, 16, 5120)
        return cls._of(fields, vision=vision, text=_text(1024, 24), embed_dim=1024, act="gelu")

    @classmethod
    def g14(cls, **fields: Any) -> Self:
        vision = CLIPVisionConfig(224, 14, 1408, 40, 16, 6144)
        return cls._of(fields, vision=vision, text=_text(1024, 24), embed_dim=1024, act="gelu")

    @classmethod
    def bigg14(cls, **fields: Any) -> Self:
        vision = CLIPVisionConfig(224, 14, 1664, 48, 16, 8192)
        return cls._of(fields, vision=vision, text=_text(1280, 32), embed_dim=1280, act="gelu")


def at_side(
    vision: CLIPVisionConfig | ModifiedResNetConfig | ResNetConfig, params: Params, size: tuple[int, int] | None
) -> tuple[Any, Params]:
    """An image tower for images of another size: its config, and its parameters with the position table brought to the
    new grid (open_clip model.py, resize_pos_embed). The same ones where the size is unknown or asks for nothing.

    Raises MmjaxError: images that are not square, or not whole patches wide.
    """
    if isinstance(vision, ResNetConfig) or size in (None, (vision.image_size,) * 2):
        return vision, params
    height, width = size
    stride = vision.patch if isinstance(vision, CLIPVisionConfig) else 32
    if height != width or height % stride:
        raise MmjaxError(f"this CLIP sees squares of whole patches, {stride} pixels a side; not {height} x {width}")
    old, new = ((side // stride, side // stride) for side in (vision.image_size, height))
    inside = params["attnpool"] if isinstance(vision, ModifiedResNetConfig) else params
    table = interpolate(jnp.asarray(inside["positions"]), old, new, "bicubic_antialias", prefix=1)
    moved = {**inside, "positions": table}
    moved = moved if inside is params else {**params, "attnpool": moved}
    return dataclasses.replace(vision, image_size=height), moved


def _text(width: int, depth: int) -> CLIPTextConfig:
    return CLIPTextConfig(width=width, depth=depth, heads=width // 64, hidden=4 * width)


class VisionTransformer(nn.Module):
    """Images -> {"states": depth + 1 arrays [b, 1 + n, d], "pooled": [b, d], "embeds": [b, e]}."""

    config: CLIPConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b height width 3"],
        train: bool = False,
        bn_groups: int = 1,
        axis_name: str | None = None,
    ) -> dict[str, Any]:
        config, vision, dtype = self.config, self.config.vision, jnp.dtype(self.config.dtype)
        assert isinstance(vision, CLIPVisionConfig)
        if x.shape[1:3] != (vision.image_size, vision.image_size):
            raise MmjaxError(f"images should be {vision.image_size} x {vision.image_size}, they are {x.shape[1:3]}")
        width, drawn = vision.width, normal(vision.width**-0.5)
        patches = PatchEmbed(width, vision.patch, False, dtype, torch_conv, name="patch_embed")(x)
        patches = rearrange(patches, "b r c d -> b (r c) d")
        token = self.param("class_embedding", drawn, (width,)).astype(dtype)
        tokens = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, width)), patches], 1)
        tokens = tokens + self.param("positions", drawn, (vision.grid**2 + 1, width)).astype(dtype)
        tokens = LayerNorm(EPSILON, dtype, name="norm_pre")(tokens)
        # torch's defaults; q, k and v are one matrix there, whence the half of Xavier's variance.
        init = Init(
            nn.initializers.variance_scaling(0.5, "fan_in", "uniform"), torch_conv, torch_conv, torch_conv, ZEROS
        )
        states = _encoder(config, vision, init, causal=False)(tokens)
        pooled = LayerNorm(EPSILON, dtype, name="norm_post")(states[-1][:, 0])
        return {"states": states, "pooled": pooled} | _embeds(config, pooled)


class ResNetTower(nn.Module):
    """An ordinary ResNet and a projection -> {"C2" ..: maps, "pooled": [b, d], "embeds": [b, e]}."""

    config: CLIPConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b height width 3"],
        train: bool = False,
        bn_groups: int = 1,
        axis_name: str | None = None,
    ) -> dict[str, Any]:
        vision = self.config.vision
        assert isinstance(vision, ResNetConfig)
        trunk = dataclasses.replace(vision, num_classes=0, dtype=self.config.dtype, remat=self.config.remat)
        maps = ResNet(trunk, name="trunk")(x, train, bn_groups, axis_name)
        return maps | _embeds(self.config, maps["pooled"])


class TextTransformer(nn.Module):
    """Ids -> {"states": depth + 1 arrays [b, l, d], "tokens": the last after the norm, "pooled", "embeds": [b, e]}."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], attention_mask: Int[Array, "b l"] | None = None) -> dict[str, Any]:
        config, text, dtype = self.config, self.config.text, jnp.dtype(self.config.dtype)
        if ids.shape[1] > text.context_length:
            raise MmjaxError(f"texts of {ids.shape[1]} tokens are longer than context_length={text.context_length}")
        table = self.param("token_embedding", normal(0.02), (text.vocab_size, text.width))
        positions = self.param("positions", normal(0.01), (text.context_length, text.width))
        x = (table[ids] + positions[: ids.shape[1]]).astype(dtype)
        std = text.width**-0.5
        last = normal(std * (2 * text.depth) ** -0.5)
        init = Init(normal(std), last, normal((2 * text.width) ** -0.5), last, ZEROS)
        mask = None if attention_mask is None else padding_mask(attention_mask)
        states = _encoder(config, text, init, causal=True)(x, mask)
        tokens = LayerNorm(EPSILON, dtype, name="norm")(states[-1])
        # The first of several: argmax of a boolean where the id is told.
        end = jnp.argmax(ids if text.eos is None else ids == text.eos, axis=-1)
        pooled = jnp.take_along_axis(tokens, end[:, None, None], axis=1)[:, 0]
        return {"states": states, "tokens": tokens, "pooled": pooled} | _embeds(config, pooled)


ZEROS = nn.initializers.zeros


def _encoder(config: CLIPConfig, tower: CLIPVisionConfig | CLIPTextConfig, init: Init, causal: bool) -> Stack:
    block = {"width": tower.width, "heads": tower.heads, "hidden": tower.hidden, "act": config.act, "causal": causal}
    block |= {"epsilon": EPSILON, "init_with": init, "dtype": jnp.dtype(config.dtype)}
    return Stack(tower.depth, functools.partial(standard_block, **block), remat=config.remat, name="encoder")


def _embeds(config: CLIPConfig, pooled: Array) -> dict[str, Array]:
    """{"embeds": the pooled vectors' projection}; nothing where there is no common space."""
    if not config.embed_dim:
        return {}
    init = normal(pooled.shape[-1] ** -0.5)
    return {"embeds": Dense(config.embed_dim, False, jnp.dtype(config.dtype), init, name="projection")(pooled)}


class CLIP(nn.Module):
    """Params: vision, text, logit_scale [] (log of the factor on the cosines), logit_bias [] if the config has one."""

    config: CLIPConfig

    def setup(self) -> None:
        config = self.config
        if isinstance(config.vision, ModifiedResNetConfig):
            dtype = jnp.dtype(config.dtype)
            self.vision: nn.Module = ModifiedResNet(config.vision, config.embed_dim, config.remat, dtype)
        else:
            kind = VisionTransformer if isinstance(config.vision, CLIPVisionConfig) else ResNetTower
            self.vision = kind(config)
        self.text = TextTransformer(config)
        scale = nn.initializers.constant(-math.log(config.init_temperature))
        self.logit_scale = self.param("logit_scale", scale, ())
        if config.init_bias is not None:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(config.init_bias), ())

    def __call__(
        self,
        pixels: Float[Array, "b height width 3"],
        ids: Int[Array, "b l"],
        attention_mask: Int[Array, "b l"] | None = None,
        train: bool = False,
        bn_groups: int = 1,
        axis_name: str | None = None,
    ) -> dict[str, Any]:
        """Both towers' outputs: {"vision": {...}, "text": {...}}; `embeds` of neither has unit length."""
        return {
            "vision": self.encode_image(pixels, train, bn_groups, axis_name),
            "text": self.encode_text(ids, attention_mask),
        }

    def encode_image(
        self, pixels: Array, train: bool = False, bn_groups: int = 1, axis_name: str | None = None
    ) -> dict[str, Any]:
        """The image tower's outputs; "embeds" is what is compared. train: normalise batches by themselves."""
        return self.vision(pixels, train, bn_groups, axis_name)

    def encode_text(self, ids: Array, attention_mask: Array | None = None) -> dict[str, Any]:
        """The text tower's outputs."""
        return self.text(ids, attention_mask)
