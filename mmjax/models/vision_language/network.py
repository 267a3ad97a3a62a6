"""A vision tower before a language model, with a connector between them (LLaVA: arXiv 2304.08485, 2310.03744; BLIP-2's
second stage: arXiv 2301.12597).

Parameter paths: vision/..., as of a `ViT`; connector/layer_{i}/{kernel,bias}, or of queries connector/queries [q, e],
connector/qformer/..., as of a `Bert`, connector/projection/{kernel,bias}, or of a resampler connector/resampler/... and
connector/projection/{kernel,bias}; newline [d], the feature after each row of patches, where there is one;
language/..., as of a `Decoder` or a `T5`.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeAlias

import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.models.blip2.qformer import query_states
from mmjax.models.language.config import DecoderConfig, OverLanguageModel
from mmjax.models.language.network import Decoder
from mmjax.models.t5.network import T5, T5Config
from mmjax.models.vit.network import Tower, ViTConfig
from mmjax.nn.activation import activation
from mmjax.nn.resampler import Resampler
from mmjax.nn.splice import splice
from mmjax.nn.transformer import TORCH, Dense, torch_bias, torch_linear
from mmjax.types import Array, Bool, Float, Int


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


@dataclass(frozen=True)
class ResamplerConnector:
    """A Perceiver Resampler: latents attend to the tokens of each picture, and a matrix with a bias takes them to the
    language model's width (xGen-MM). The feed-forward is four times as wide as the tokens.

    latents: their number, which is that of the features of a picture.
    """

    depth: int = 6
    heads: int = 16
    head_width: int = 96
    latents: int = 128


@dataclass(frozen=True)
class QueryConnector:
    """Queries that attend to the tower's tokens, and a matrix from their width to the language model's (BLIP-2).

    qformer: the query transformer; with a vocabulary its queries see a text too (InstructBLIP).
    queries: their number, which is that of the features of an image.
    """

    qformer: BertConfig
    queries: int = 32

    def __post_init__(self) -> None:
        """Raises MmjaxError for a transformer that is no Q-Former."""
        c = self.qformer
        if c.cross_from != 0 or not c.query_feed_forward or c.causal or c.types or c.pooler or c.mlm:
            raise MmjaxError(
                "connector: the qformer needs cross_from=0, query_feed_forward=True, causal=False, types=0, "
                f"pooler=False, mlm=False; it has {c.cross_from}, {c.query_feed_forward}, {c.causal}, {c.types}, "
                f"{c.pooler}, {c.mlm}"
            )


Connector: TypeAlias = MlpConnector | IdentityConnector | ResamplerConnector | QueryConnector
Language: TypeAlias = DecoderConfig | T5Config


@dataclass(frozen=True)
class VisionLanguageConfig(OverLanguageModel):
    """The three parts, and what becomes of an image in a prompt. Class methods give the published sizes.

    Attributes:
        vision: the tower. Its `dtype` and `remat` are those below.
        language: the decoder, or an encoder-decoder, whose encoder gets the prompts; likewise.
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
        vision_dtype, language_dtype: of these parts; None: `dtype`.
    """

    vision: ViTConfig
    language: Language
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
    vision_dtype: str | None = None
    language_dtype: str | None = None

    def __post_init__(self) -> None:
        """Raises MmjaxError for parts that do not fit each other."""
        if isinstance(self.connector, IdentityConnector) and self.feature_width != self.language.width:
            widths = f"{self.feature_width} channels for a width of {self.language.width}"
            raise MmjaxError(f"connector: the identity has {widths}")
        if isinstance(self.connector, ResamplerConnector) and self.merge != "flat":
            raise MmjaxError(f"merge={self.merge!r}: the features of latents have no positions in an image; 'flat'")
        if self.class_token and self.merge != "flat":
            raise MmjaxError(f"merge={self.merge!r}: rows of patches have no class token; class_token=False")
        if isinstance(self.connector, QueryConnector) and (self.grids or self.merge != "flat"):
            raise MmjaxError(
                f"merge={self.merge!r}, grids={self.grids}: features of queries are of no place in an image"
            )
        if isinstance(self.language, T5Config) and not self.language.decoder_depth:
            raise MmjaxError("language: decoder_depth=0 is an encoder alone, which generates nothing")

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

    @classmethod
    def blip2(cls, vision: ViTConfig, language: Language, connector: QueryConnector, **fields: Any) -> Self:
        """BLIP-2's second stage: the queries attend to all tokens of the tower, after its final norm."""
        return cls(vision, language, connector, layer=None, class_token=True, **fields)

    @classmethod
    def xgen_mm(cls, **fields: Any) -> Self:
        """xGen-MM (BLIP-3) 1.5 on Phi-3-mini: 4,344,018,867 parameters, of which the connector has 109,901,568."""
        language = DecoderConfig.phi3_mini_4k(vocab_size=32_012, unused_rows=52, added_tokens=3, head_bias=True)
        grids = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
        kind: dict[str, Any] = {"connector": ResamplerConnector(), "layer": None, "grids": grids}
        return cls(ViTConfig.siglip_so400m14(), language, **{**kind, "image_token": 32_012, **fields})

    # ------------------------------------------------------------------------------------------------------- the parts

    @property
    def tower(self) -> ViTConfig:
        """The tower as it runs."""
        dtype: Any = self.vision_dtype or self.dtype
        return replace(self.vision, num_classes=0, dtype=dtype, remat=self.remat)

    @property
    def decoder(self) -> Any:
        """The language model as it runs, a DecoderConfig or a T5Config."""
        return replace(self.language, dtype=self.language_dtype or self.dtype, remat=self.remat)

    @property
    def encodes(self) -> bool:
        """Whether prompts are for the encoder of an encoder-decoder."""
        return isinstance(self.language, T5Config)

    @property
    def feature_width(self) -> int:
        """Channels of the tower's tokens."""
        return self.vision.width * (len(self.layer) if isinstance(self.layer, tuple) else 1)

    @property
    def tile_tokens(self) -> int:
        """The number of features of one picture."""
        if isinstance(self.connector, QueryConnector):
            return self.connector.queries
        if isinstance(self.connector, ResamplerConnector):
            return self.connector.latents
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


class ResamplerProjector(nn.Module):
    """A `ResamplerConnector`: [n, p, c] -> [n, q, width]. mask [n, p]: 1 = a token that the latents attend to."""

    config: ResamplerConnector
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n p c"], mask: Bool[Array, "n p"] | Int[Array, "n p"] | None = None
    ) -> Float[Array, "n q d"]:
        c = self.config
        resampler = Resampler(c.depth, c.heads, c.head_width, c.latents, dtype=self.dtype, name="resampler")
        latents = resampler(x[:, None, None], None if mask is None else mask[:, None, None])[:, 0]
        bias = torch_bias(x.shape[-1])
        return Dense(self.width, True, self.dtype, TORCH, bias, name="projection")(latents)


class QueryProjector(nn.Module):
    """A `QueryConnector`: [n, p, c] -> [n, q, width]. axis_name: the mapped axis that cuts the batch, for dropout."""

    config: QueryConnector
    width: int
    dtype: str = "float32"
    remat: bool = False
    axis_name: str | None = None

    def setup(self) -> None:
        c = self.config
        self.queries = self.param("queries", c.qformer.initializer, (c.queries, c.qformer.width))
        self.qformer = Bert(replace(c.qformer, dtype=self.dtype, remat=self.remat), self.axis_name)
        self.projection = torch_linear(self.width, c.qformer.width)

    def __call__(
        self,
        tokens: Float[Array, "n p c"],
        ids: Int[Array, "n t"] | None = None,
        mask: Int[Array, "n t"] | None = None,
        train: bool = False,
    ) -> Float[Array, "n q d"]:
        """ids, mask: of a text for each image, which the queries see. train: with dropout."""
        return self.projection(self.states(tokens, ids, mask, train))

    def states(
        self,
        tokens: Float[Array, "n p c"],
        ids: Int[Array, "n t"] | None = None,
        mask: Int[Array, "n t"] | None = None,
        train: bool = False,
    ) -> Float[Array, "n q e"]:
        """The queries' last states, before the projection."""
        return query_states(self.qformer, self.queries, tokens, ids, mask, train)


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
        if isinstance(c.connector, QueryConnector):
            self.connector = QueryProjector(c.connector, c.language.width, c.dtype, c.remat, self.axis_name)
        if isinstance(c.connector, ResamplerConnector):
            self.connector = ResamplerProjector(c.connector, c.language.width, jnp.dtype(c.dtype))
        if c.newline:
            self.newline = self.param("newline", nn.initializers.normal(c.language.width**-0.5), (c.language.width,))
        self.language = T5(c.decoder, self.axis_name) if c.encodes else Decoder(c.decoder)

    def __call__(
        self,
        pixels: Float[Array, "n height width 3"],
        ids: Int[Array, "b l"],
        index: Int[Array, "b l"],
        mask: Int[Array, "b l"] | None = None,
        decoder_ids: Int[Array, "b t"] | None = None,
        query_ids: Int[Array, "n t"] | None = None,
        query_mask: Int[Array, "n t"] | None = None,
        token_index: Int[Array, "n p"] | None = None,
        token_mask: Bool[Array, "n p"] | None = None,
    ) -> dict[str, Any]:
        """{"vision": the tower's tokens [n, p, c]; "queries": their states [n, q, e], where there are any; "features":
        [n, q, d]; the rest as of `decode`}.

        decoder_ids: the start token and what is decoded, of an encoder-decoder. query_ids, query_mask: a text for each
            image, of a query transformer with a vocabulary. token_index, token_mask: see `encode_image`.
        """
        tokens = self.vision(pixels)
        outputs: dict[str, Any] = {"vision": tokens}
        if isinstance(self.config.connector, QueryConnector):
            outputs["queries"] = self.connector.states(tokens, query_ids, query_mask)
            features = self.connector.projection(outputs["queries"])
        else:
            features = self.project(tokens, token_index=token_index, token_mask=token_mask)
        decoded = self.decode(self.embed(ids, index, features), mask, decoder_ids)
        return {**outputs, "features": features, **decoded}

    def encode_image(
        self,
        pixels: Float[Array, "n height width 3"],
        ids: Int[Array, "n t"] | None = None,
        mask: Int[Array, "n t"] | None = None,
        train: bool = False,
        token_index: Int[Array, "n p"] | None = None,
        token_mask: Bool[Array, "n p"] | None = None,
    ) -> Float[Array, "n p d"]:
        """The features of each picture, of an image or of a tile of one.

        ids, mask: a text for each, see `QueryConnector`. train: with dropout of the connector, which needs the rng
        "dropout"; the tower never has any.
        token_index: the tower's tokens that a resampler takes as those of each picture, i * p + j being token j of
            picture i; None: its own. token_mask: 1 = a token that it attends to; None: to all.
        """
        return self.project(self.vision(pixels), ids, mask, train, token_index, token_mask)

    def project(
        self,
        tokens: Float[Array, "n p c"],
        ids: Int[Array, "n t"] | None = None,
        mask: Int[Array, "n t"] | None = None,
        train: bool = False,
        token_index: Int[Array, "n p"] | None = None,
        token_mask: Bool[Array, "n p"] | None = None,
    ) -> Float[Array, "n p d"]:
        """The tower's tokens through the connector; see `encode_image`."""
        connector = self.config.connector
        if isinstance(connector, IdentityConnector):
            return tokens
        if isinstance(connector, ResamplerConnector):
            if token_index is not None:
                tokens = tokens.reshape(-1, tokens.shape[-1])[token_index]
            return self.connector(tokens, token_mask)  # type: ignore[call-arg]
        texts: Any = (ids, mask, train) if isinstance(connector, QueryConnector) else ()
        return self.connector(tokens, *texts)

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

    def decode(
        self,
        embeds: Float[Array, "b l d"],
        mask: Int[Array, "b l"] | None = None,
        decoder_ids: Int[Array, "b t"] | None = None,
    ) -> dict[str, Any]:
        """Of a decoder {"states", "logits"}, as of `Decoder`; of an encoder-decoder {"encoder", "decoder", "logits"},
        as of `T5`."""
        if isinstance(self.language, T5):
            return self.language(None, decoder_ids, mask, embeds)
        return self.language(mask=mask, embeds=embeds)

    def hidden(
        self,
        embeds: Float[Array, "b l d"],
        mask: Int[Array, "b l"] | None = None,
        decoder_ids: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b s e"]:
        """The input of the language model's head: s = l, of an encoder-decoder t."""
        if isinstance(self.language, T5):
            return self.language.hidden(embeds, jnp.asarray(decoder_ids), mask)
        return self.language.hidden(embeds, mask)
