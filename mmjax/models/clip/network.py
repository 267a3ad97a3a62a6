"""CLIP (openai/CLIP model.py; open_clip model.py, transformer.py): two towers, projected into one space."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Self

import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.nn.masks import padding_mask
from mmjax.nn.norm import LayerNorm
from mmjax.nn.stack import Stack, standard_block
from mmjax.nn.transformer import Dense, Init
from mmjax.types import Array, Float, Int

EPSILON = 1e-5
normal = nn.initializers.normal


@dataclass(frozen=True)
class CLIPTextConfig:
    """A causal transformer. eos: the id whose first position is pooled; None: the position of the largest id, as in
    OpenAI's CLIP (and in Hugging Face's with eos_token_id=2)."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    depth: int = 12
    heads: int = 8
    hidden: int = 2048
    eos: int | None = None


B32 = ViTConfig.clip(224, 32, 768, 12, 12, 3072)


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers; class methods give the published sizes (parameter counts: tests/models/test_clip.py).

    Attributes:
        vision: CLIP's ViT, CLIP's ResNet, whose attention pool ends in the common space, or an ordinary ResNet. Its
            `act`, `remat` and `dtype` are those below, and it has no head: see `tower`.
        embed_dim: of the common space.
        act: "quick_gelu" in all of OpenAI's weights, "gelu" in most of open_clip's: by weights, not by size, and the
            wrong one costs points in silence.
        init_temperature: logit_scale starts at -log of it.
        init_bias: of SigLIP's logit_bias; None: there is none.
        remat: blocks are computed again in the backward pass.
        dtype: compute dtype; norms' statistics, softmax and logits are float32.
    """

    vision: ViTConfig | ResNetConfig = B32
    text: CLIPTextConfig = CLIPTextConfig()
    embed_dim: int = 512
    act: str = "quick_gelu"
    init_temperature: float = 0.07
    init_bias: float | None = None
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises MmjaxError for an attention pool that does not end in the common space."""
        if not self.projects and self.width != self.embed_dim:
            raise MmjaxError(f"embed_dim={self.embed_dim}: the attention pool of the images gives {self.width}")

    @property
    def tower(self) -> ViTConfig | ResNetConfig:
        """The image tower by itself."""
        fields: dict[str, Any] = {"num_classes": 0, "remat": self.remat, "dtype": self.dtype}
        fields |= {"act": self.act} if isinstance(self.vision, ViTConfig) else {}
        return dataclasses.replace(self.vision, **fields)

    @property
    def width(self) -> int:
        """Length of the image tower's pooled vector."""
        return self.vision.width if isinstance(self.vision, ViTConfig) else self.vision.features

    @property
    def projects(self) -> bool:
        """Whether a projection follows the image tower."""
        return isinstance(self.vision, ViTConfig) or self.vision.attention_pool is None

    @property
    def image_size(self) -> int | None:
        """Side of the images; None: any (an ordinary ResNet)."""
        if isinstance(self.vision, ViTConfig):
            return self.vision.image_size[0]
        pool = self.vision.attention_pool
        return None if pool is None else 32 * pool.grid[0]

    @classmethod
    def _of(cls, fields: dict[str, Any], **size: Any) -> Self:
        return cls(**size | fields)

    @classmethod
    def b32(cls, **fields: Any) -> Self:
        return cls(**fields)

    @classmethod
    def b16(cls, **fields: Any) -> Self:
        return cls._of(fields, vision=ViTConfig.clip(224, 16, 768, 12, 12, 3072))

    @classmethod
    def l14(cls, image_size: int = 224, **fields: Any) -> Self:
        vision = ViTConfig.clip(image_size, 14, 1024, 24, 16, 4096)
        return cls._of(fields, vision=vision, text=_text(768, 12), embed_dim=768)

    @classmethod
    def l14_336(cls, **fields: Any) -> Self:
        return cls.l14(336, **fields)

    @classmethod
    def rn50(cls, **fields: Any) -> Self:
        return cls._of(fields, vision=ResNetConfig.clip(), embed_dim=1024)

    @classmethod
    def rn101(cls, **fields: Any) -> Self:
        return cls._of(fields, vision=ResNetConfig.clip(layers=(3, 4, 23, 3), features=512))

    @classmethod
    def rn50x4(cls, **fields: Any) -> Self:
        vision = ResNetConfig.clip(288, (4, 6, 10, 6), 80, 40, 640)
        return cls._of(fields, vision=vision, text=_text(640, 12), embed_dim=640)

    @classmethod
    def rn50x16(cls, **fields: Any) -> Self:
        vision = ResNetConfig.clip(384, (6, 8, 18, 8), 96, 48, 768)
        return cls._of(fields, vision=vision, text=_text(768, 12), embed_dim=768)

    @classmethod
    def rn50x64(cls, **fields: Any) -> Self:
        vision = ResNetConfig.clip(448, (3, 15, 36, 10), 128, 64, 1024)
        return cls._of(fields, vision=vision, text=_text(1024, 12), embed_dim=1024)

    @classmethod
    def b16_plus_240(cls, **fields: Any) -> Self:
        """open_clip's, and the three below: erf GELU; heads of H, g and bigG are wider than 64."""
        vision = ViTConfig.clip(240, 16, 896, 12, 14, 3584)
        return cls._of(fields, vision=vision, text=_text(640, 12), embed_dim=640, act="gelu")

    @classmethod
    def h14(cls, **fields: Any) -> Self:
        vision = ViTConfig.clip(224, 14, 1280, 32, 16, 5120)
        return cls._of(fields, vision=vision, text=_text(1024, 24), embed_dim=1024, act="gelu")

    @classmethod
    def g14(cls, **fields: Any) -> Self:
        vision = ViTConfig.clip(224, 14, 1408, 40, 16, 6144)
        return cls._of(fields, vision=vision, text=_text(1024, 24), embed_dim=1024, act="gelu")

    @classmethod
    def bigg14(cls, **fields: Any) -> Self:
        vision = ViTConfig.clip(224, 14, 1664, 48, 16, 8192)
        return cls._of(fields, vision=vision, text=_text(1280, 32), embed_dim=1280, act="gelu")


def _text(width: int, depth: int) -> CLIPTextConfig:
    return CLIPTextConfig(width=width, depth=depth, heads=width // 64, hidden=4 * width)


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
        init = Init(normal(std), last, normal((2 * text.width) ** -0.5), last, nn.initializers.zeros)
        mask = None if attention_mask is None else padding_mask(attention_mask)
        block = {"width": text.width, "heads": text.heads, "hidden": text.hidden, "act": config.act, "causal": True}
        block |= {"epsilon": EPSILON, "init_with": init, "dtype": dtype}
        encoder = Stack(text.depth, functools.partial(standard_block, **block), remat=config.remat, name="encoder")
        states = encoder(x, mask)
        tokens = LayerNorm(EPSILON, dtype, name="norm")(states[-1])
        # The first of several: argmax of a boolean where the id is known.
        end = jnp.argmax(ids if text.eos is None else ids == text.eos, axis=-1)
        pooled = jnp.take_along_axis(tokens, end[:, None, None], axis=1)[:, 0]
        embeds = _projection(config, text.width, name="projection")(pooled)
        return {"states": states, "tokens": tokens, "pooled": pooled, "embeds": embeds}


def _projection(config: CLIPConfig, width: int, **fields: Any) -> Dense:
    """Into the common space."""
    return Dense(config.embed_dim, False, jnp.dtype(config.dtype), normal(width**-0.5), **fields)


class CLIP(nn.Module):
    """Params: vision, as of a `ViT` or a `ResNet`; vision_projection, but behind an attention pool; text;
    logit_scale [] (log of the factor on the cosines); logit_bias [] if the config has one.

    axis_name: the mapped axis over which the batch is cut.
    """

    config: CLIPConfig
    axis_name: str | None = None

    def setup(self) -> None:
        config, tower = self.config, self.config.tower
        self.vision = ViT(tower, self.axis_name) if isinstance(tower, ViTConfig) else ResNet(tower, self.axis_name)
        if config.projects:
            self.vision_projection = _projection(config, config.width)
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
    ) -> dict[str, Any]:
        """Both towers' outputs: {"vision": {...}, "text": {...}}; `embeds` of neither has unit length."""
        return {
            "vision": self.encode_image(pixels, train, bn_groups),
            "text": self.encode_text(ids, attention_mask),
        }

    def encode_image(
        self,
        pixels: Float[Array, "b height width 3"],
        train: bool = False,
        bn_groups: int = 1,
    ) -> dict[str, Any]:
        """ "embeds" [b, e], which is compared, and "pooled" [b, d] before it; of a ViT "states", depth + 1 arrays
        [b, 1 + n, d]; of a ResNet its maps "stem", "C2", ... train: batches are normalised by themselves.

        Raises MmjaxError for images of another size than the tower's; the tower by itself would interpolate.
        """
        side = self.config.image_size
        if side is not None and pixels.shape[1:3] != (side, side):
            raise MmjaxError(f"images should be {side} x {side}, they are {pixels.shape[1]} x {pixels.shape[2]}")
        if isinstance(self.vision, ViT):
            out = self.vision(pixels, train=train)
            outputs: dict[str, Any] = {"states": out.states, "pooled": out.pooled}
        else:
            outputs = dict(self.vision(pixels, train, bn_groups))
        pooled = outputs["pooled"]
        return outputs | {"embeds": self.vision_projection(pooled) if self.config.projects else pooled}

    def encode_text(self, ids: Array, attention_mask: Array | None = None) -> dict[str, Any]:
        """The text tower's outputs."""
        return self.text(ids, attention_mask)
