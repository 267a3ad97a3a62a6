"""A vision tower before a language model, with a connector between them (LLaVA: arXiv 2304.08485, 2310.03744).

Parameter paths: vision/..., as of a `ViT`; connector/layer_{i}/{kernel,bias}; newline [d], the feature after each row
of patches, where there is one; language/..., as of a `Decoder`.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeAlias

import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.models.language.config import DecoderConfig, OverLanguageModel
from mmjax.models.language.network import Decoder
from mmjax.models.vit.network import Tower, ViTConfig
from mmjax.nn.activation import activation
from mmjax.nn.splice import splice
from mmjax.nn.transformer import TORCH, Dense, torch_bias
from mmjax.types import Array, Float, Int


@dataclass(frozen=True)
class MlpConnector:
    """Linear layers with an activation between them, each as wide as the language model (LLaVA's mlp2x_gelu).

    depth: number of layers; 1: a single matrix (LLaVA v1).
    """

    depth: int = 2
    act: Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"] = "gelu"
    use_bias: bool = True

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise MmjaxError(f"connector: depth={self.depth} (at least 1)")


@dataclass(frozen=True)
class IdentityConnector:
    """The tower's tokens are the features; tower and language model have one width."""


Connector: TypeAlias = MlpConnector | IdentityConnector


@dataclass(frozen=True)
class VisionLanguageConfig(OverLanguageModel):
    """The three parts, and what becomes of an image in a prompt. Class methods give the published sizes.

    Attributes:
        vision: the tower. Its `dtype` and `remat` are those below.
        language: the decoder, likewise.
        layer: of the tower's states, the one whose tokens are taken: -2 is what the last block but one gives, None the
            last after the final norm. Of several the channels are concatenated.
        class_token: the tokens before the patches are features too.
        grids: (rows, columns) of tiles that an image may be cut in, see `mmjax.data.tiles`; (): one picture an image.
        merge: how the features of tiles follow each other: tile by tile, or as the rows of patches of the whole image,
            after the small picture of it; "spatial_unpad" leaves out the border, and ends each row with `newline`.
        image_token: the id of a position that has a feature of an image. -200: no id of the vocabulary (LLaVA).
        template: the name of the conversation's template in `mmjax.models.llava.templates`; "": the tokenizer's.
        pad_images: the default preprocessing pads images to squares (LLaVA 1.5).
        dtype, remat: of all parts.
    """

    vision: ViTConfig
    language: DecoderConfig
    connector: Connector = MlpConnector()
    layer: int | tuple[int, ...] | None = -2
    class_token: bool = False
    grids: tuple[tuple[int, int], ...] = ()
    merge: Literal["flat", "spatial", "spatial_unpad"] = "flat"
    image_token: int = -200
    template: str = ""
    pad_images: bool = False
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        """Raises MmjaxError for parts that do not fit each other."""
        if isinstance(self.connector, IdentityConnector) and self.feature_width != self.language.width:
            widths = f"{self.feature_width} channels for a width of {self.language.width}"
            raise MmjaxError(f"connector: the identity has {widths}")
        if self.class_token and self.merge != "flat":
            raise MmjaxError(f"merge={self.merge!r}: rows of patches have no class token; class_token=False")

    @classmethod
    def llava(cls, language: DecoderConfig, side: int = 336, **fields: Any) -> Self:
        """LLaVA 1.5 on any decoder: CLIP ViT-L/14, two layers."""
        vision = ViTConfig.clip(side, 14, 1024, 24, 16, 4096)
        return cls(vision, language, **{"template": "vicuna_v1", "pad_images": True, **fields})

    @classmethod
    def llava_1_5_7b(cls, **fields: Any) -> Self:
        """7,062,902,784 parameters, of which the connector has 20,979,712."""
        return cls.llava(DecoderConfig.vicuna_7b(), **fields)

    @classmethod
    def llava_1_5_13b(cls, **fields: Any) -> Self:
        """13,350,839,296 parameters, of which the connector has 31,467,520."""
        return cls.llava(DecoderConfig.vicuna_13b(), **fields)

    @classmethod
    def llava_1_6_7b(cls, **fields: Any) -> Self:
        """The same with tiles of any resolution and a newline."""
        grids = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
        return cls.llava_1_5_7b(**{"grids": grids, "merge": "spatial_unpad", "pad_images": False, **fields})

    # ------------------------------------------------------------------------------------------------------- the parts

    @property
    def tower(self) -> ViTConfig:
        """The tower as it runs."""
        return replace(self.vision, num_classes=0, dtype=self.dtype, remat=self.remat)  # type: ignore[arg-type]

    @property
    def decoder(self) -> DecoderConfig:
        """The language model as it runs."""
        return replace(self.language, dtype=self.dtype, remat=self.remat)

    @property
    def feature_width(self) -> int:
        """Channels of the tower's tokens."""
        return self.vision.width * (len(self.layer) if isinstance(self.layer, tuple) else 1)

    @property
    def tile_tokens(self) -> int:
        """The number of features of one picture."""
        rows, columns = self.vision.grid
        return rows * columns + (self.vision.prefix if self.class_token else 0)

    @property
    def newline(self) -> bool:
        """Whether there is a feature that ends a row of patches."""
        return self.merge == "spatial_unpad"


class Projector(nn.Module):
    """An `MlpConnector`: [.., c] -> [.., width]."""

    config: MlpConnector
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        for i in range(self.config.depth):
            x = activation(self.config.act)(x) if i else x
            bias = torch_bias(x.shape[-1])
            x = Dense(self.width, self.config.use_bias, self.dtype, TORCH, bias, name=f"layer_{i}")(x)
        return x


class VisionLanguage(nn.Module):
    """Ids and images -> next tokens' logits.

    A prompt is ids [b, l] with `index` [b, l] beside them: -1 for a token, else a row of the table of features of all
    images of the batch. Host code makes both, so the network knows of no image boundaries.

    axis_name: as in `Tower`.
    """

    config: VisionLanguageConfig
    axis_name: str | None = None

    def setup(self) -> None:
        c = self.config
        self.vision = Tower(c.tower, c.layer, c.class_token, self.axis_name)
        if isinstance(c.connector, MlpConnector):
            self.connector = Projector(c.connector, c.language.width, jnp.dtype(c.dtype))
        if c.newline:
            self.newline = self.param("newline", nn.initializers.normal(c.language.width**-0.5), (c.language.width,))
        self.language = Decoder(c.decoder)

    def __call__(
        self,
        pixels: Float[Array, "n height width 3"],
        ids: Int[Array, "b l"],
        index: Int[Array, "b l"],
        mask: Int[Array, "b l"] | None = None,
    ) -> dict[str, Any]:
        """{"features": [n, p, d]; "states", "logits": as of `Decoder`}."""
        features = self.encode_image(pixels)
        return {"features": features, **self.decode(self.embed(ids, index, features), mask)}

    def encode_image(self, pixels: Float[Array, "n height width 3"]) -> Float[Array, "n p d"]:
        """The features of each picture, of an image or of a tile of one."""
        return self.project(self.vision(pixels))

    def project(self, tokens: Float[Array, "n p c"]) -> Float[Array, "n p d"]:
        """The tower's tokens through the connector."""
        return self.connector(tokens) if isinstance(self.config.connector, MlpConnector) else tokens

    def embed(
        self,
        ids: Int[Array, "b l"],
        index: Int[Array, "b l"] | None = None,
        features: Float[Array, "n p d"] | None = None,
    ) -> Float[Array, "b l d"]:
        """The language model's input. Row i * p + j of the table is feature j of picture i, row n * p the newline."""
        x = self.language.embed(jnp.maximum(ids, 0))
        if index is None or features is None:
            return x
        table = features.reshape(-1, features.shape[-1])
        if self.config.newline:
            table = jnp.concatenate([table, self.newline[None].astype(table.dtype)])
        return splice(x, table, index)

    def decode(self, embeds: Float[Array, "b l d"], mask: Int[Array, "b l"] | None = None) -> dict[str, Any]:
        """{"states", "logits"} of the language model, as of `Decoder`."""
        return self.language(mask=mask, embeds=embeds)

    def hidden(self, embeds: Float[Array, "b l d"], mask: Int[Array, "b l"] | None = None) -> Float[Array, "b l e"]:
        """The input of the language model's head."""
        return self.language.hidden(embeds, mask)
