"""Flamingo: an image encoder, a resampler, and gated cross attention between the blocks of a language model.

Sources: arXiv 2204.14198, section 3; open_flamingo's src/helpers.py, flamingo.py and flamingo_lm.py.

Parameter paths: vision/..., as of a `ViT` or a `ResNet`; vision_projection/kernel; resampler/..., see
`mmjax.nn.resampler`; language/..., as of a `Decoder`; cross_{i}/{norm, attention, gate, mlp_norm, mlp, mlp_gate}, the
layer before block i of the language model. No parameter of the language model has another path than by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.models.language.config import DecoderConfig, OverLanguageModel
from mmjax.models.language.network import Decoder
from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.nn.kv_cache import KeyValues
from mmjax.nn.masks import images_before, media_mask
from mmjax.nn.norm import LayerNorm
from mmjax.nn.remat import rematerialised
from mmjax.nn.resampler import EPSILON, PLAIN, Resampler
from mmjax.nn.stack import Before, LayerCache
from mmjax.nn.transformer import Dense, Mlp, MultiHeadAttention
from mmjax.types import Array, Bool, Float, Int


@dataclass(frozen=True)
class ResamplerConfig:
    """Fields of `mmjax.nn.resampler.Resampler`; the defaults are OpenFlamingo's."""

    depth: int = 6
    heads: int = 8
    head_width: int = 64
    latents: int = 64
    hidden: int | None = None
    frames: int = 0
    media: int = 0


@dataclass(frozen=True)
class FlamingoConfig(OverLanguageModel):
    """The parts and how they meet; class methods give the published sizes (counts: tests/models/test_flamingo.py).

    Attributes:
        vision: the image encoder. The media are the patch tokens of a ViT after its final norm (CLIP's norm comes after
            pooling: theirs are those before it, as in OpenFlamingo), or the cells of a ResNet's last map.
        language: the decoder. Ids from its vocab_size on, `added_tokens` of them, are trained beside its own.
        every: a cross-attention layer comes before every n-th block.
        first: the block before which the first one comes; None: every - 1 (OpenFlamingo); 0 in the paper.
        heads, head_width, hidden: of these layers; hidden: None: 4 times the language model's width.
        only_last: a token attends to the last image before it, and before the first image to nothing: its attention is
            exactly zero. False: to all images so far; a token before the first one then attends evenly to all images of
            its prompt, as in the original, where no weights have that form.
        image_token, end_of_chunk: ids of `<image>`, which attends to its own image already, and `<|endofchunk|>`.
        embed_dim: width of the image encoder's projection, for image features alone (RICES); 0: there is none.
        dtype, remat: of all parts.
    """

    vision: ViTConfig | ResNetConfig
    language: DecoderConfig
    resampler: ResamplerConfig = ResamplerConfig()
    every: int = 1
    first: int | None = None
    heads: int = 8
    head_width: int = 64
    hidden: int | None = None
    only_last: bool = True
    image_token: int = 50_278
    end_of_chunk: int = 50_277
    embed_dim: int = 0
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        """Raises MmjaxError where no block has a cross-attention layer, or an id is not in the vocabulary."""
        if self.every < 1 or not self.crossed:
            raise MmjaxError(f"every={self.every}, first={self.first}: none of {self.language.depth} blocks")
        ids, total = (self.image_token, self.end_of_chunk), self.language.vocab_size + self.language.added_tokens
        if max(ids) >= total or min(ids) < 0 or ids[0] == ids[1]:
            raise MmjaxError(f"image_token={ids[0]}, end_of_chunk={ids[1]}: two different ids below {total}")

    @classmethod
    def open_flamingo(cls, language: DecoderConfig, every: int, **fields: Any) -> Self:
        """OpenFlamingo on any decoder: CLIP ViT-L/14, and three added ids after the vocabulary: `<|endofchunk|>`,
        `<image>`, padding."""
        vision = ViTConfig.clip(224, 14, 1024, 24, 16, 4096)
        first = language.vocab_size
        ids = {"end_of_chunk": first, "image_token": first + 1, "embed_dim": 768}
        decoder = replace(language, added_tokens=3, pad=first + 2)
        return cls(vision, decoder, every=every, **{**ids, **fields})

    @classmethod
    def open_flamingo_3b(cls, **fields: Any) -> Self:
        """On MPT-1B; the resampler and 24 cross-attention layers have 944,019,504 parameters."""
        return cls.open_flamingo(DecoderConfig.mpt_1b(vocab_size=50_277), 1, **fields)

    @classmethod
    def open_flamingo_4b(cls, **fields: Any) -> Self:
        """On RedPajama-INCITE-3B; 960,763,936."""
        return cls.open_flamingo(DecoderConfig.redpajama_3b(vocab_size=50_277), 2, **fields)

    @classmethod
    def open_flamingo_9b(cls, **fields: Any) -> Self:
        """On MPT-7B; 1,178,834,960."""
        return cls.open_flamingo(DecoderConfig.mpt_7b(vocab_size=50_277), 4, **fields)

    # ------------------------------------------------------------------------------------------------------- the parts

    @property
    def crossed(self) -> tuple[int, ...]:
        """The blocks before which a cross-attention layer comes."""
        return tuple(range(self.every - 1 if self.first is None else self.first, self.language.depth, self.every))

    @property
    def tower(self) -> ViTConfig | ResNetConfig:
        """The image encoder as it runs."""
        return replace(self.vision, num_classes=0, dtype=self.dtype, remat=self.remat)  # type: ignore[arg-type]

    @property
    def decoder(self) -> DecoderConfig:
        """The language model as it runs."""
        return replace(self.language, dtype=self.dtype, remat=self.remat)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the image encoder's images; of a ResNet without attention pool, which takes any, 224."""
        if isinstance(self.vision, ViTConfig):
            return self.vision.image_size
        pool = self.vision.attention_pool
        return (224, 224) if pool is None else (32 * pool.grid[0], 32 * pool.grid[1])

    @property
    def channels(self) -> int:
        """Channels of the image encoder's tokens."""
        return self.vision.width if isinstance(self.vision, ViTConfig) else self.vision.channels

    @property
    def eos(self) -> tuple[int, ...]:
        """`<|endofchunk|>`."""
        return (self.end_of_chunk,)


class MediaCache(NamedTuple):
    """Keys and values of the media in each cross-attention layer [b, h, t q, k], and the number of media before the
    next token, int32 [b]."""

    layers: tuple[KeyValues, ...]
    count: Int[Array, " b"]


class CrossAttention(nn.Module):
    """x + tanh(gate) attention(norm(x), media), then x + tanh(mlp_gate) mlp(mlp_norm(x)) (helpers.py:236-279).

    Both gates start at zero: the layer is then the identity, bit for bit. The feed-forward acts on text before the
    first image as well. The media are not normed here. `heads * head_width` need not be the width.
    """

    width: int
    heads: int
    head_width: int
    hidden: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        options: dict[str, Any] = {"init_with": PLAIN, "dtype": self.dtype}
        self.norm, self.mlp_norm = (LayerNorm(EPSILON, self.dtype) for _ in range(2))
        inner = self.heads * self.head_width
        self.attention = MultiHeadAttention(self.heads, self.width, inner, qkv_bias=False, out_bias=False, **options)
        self.mlp = Mlp(self.hidden, "gelu", use_bias=False, **options)
        self.gate, self.mlp_gate = (self.param(name, nn.initializers.zeros, ()) for name in ("gate", "mlp_gate"))

    def __call__(
        self,
        x: Float[Array, "b l d"],
        media: Float[Array, "b s e"],
        mask: Bool[Array, "b 1 l m"] | None = None,
        attends: Bool[Array, "b l"] | None = None,
        past: KeyValues | None = None,
    ) -> tuple[Float[Array, "b l d"], KeyValues]:
        """The result, and the keys and values of `past` and `media`.

        mask: True = may attend, over both. A token that may attend to none attends evenly to all. attends: False where
        the attention is exactly zero. past: keys and values of media before these.
        """
        if media.shape[1] or (past is not None and past.k.shape[2]):
            y, cache = self.attention.prefill(self.norm(x), media, mask, past=past)
        else:
            zeros = jnp.zeros((x.shape[0], self.heads, 0, self.head_width), self.dtype)
            y, cache = None, KeyValues(zeros, zeros)
        return self._joined(x, y, attends), cache

    def step(
        self,
        x: Float[Array, "b r d"],
        cache: KeyValues,
        mask: Bool[Array, "b s"],
        attends: Bool[Array, "b 1"] | None = None,
    ) -> Float[Array, "b r d"]:
        """One token a row, over cached keys and values; see `__call__`."""
        y = self.attention.cross_step(self.norm(x), cache, mask) if cache.k.shape[2] else None
        return self._joined(x, y, attends)

    def _joined(self, x: Array, y: Array | None, attends: Array | None) -> Array:
        if y is not None:
            y = y if attends is None else jnp.where(attends[..., None], y, 0)
            x = x + jnp.tanh(self.gate).astype(x.dtype) * y
        return x + jnp.tanh(self.mlp_gate).astype(x.dtype) * self.mlp(self.mlp_norm(x))


class Flamingo(nn.Module):
    """Ids with `<image>` among them, and their images or videos -> next tokens' logits.

    The media of a prompt are [t, f, height, width, 3]: t images or videos of f frames; the i-th `<image>` of the prompt
    is the i-th of them. Prompts with fewer media than others have some that no token attends to.

    axis_name: the mapped axis that cuts the batch, for the image encoder.
    """

    config: FlamingoConfig
    axis_name: str | None = None

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        tower = c.tower
        self.vision = ViT(tower, self.axis_name) if isinstance(tower, ViTConfig) else ResNet(tower, self.axis_name)
        if c.embed_dim:
            self.vision_projection = Dense(c.embed_dim, False, dtype)
        r = c.resampler
        self.resampler = Resampler(r.depth, r.heads, r.head_width, r.latents, r.hidden, r.frames, r.media, dtype)
        self.language = Decoder(c.decoder)
        width, hidden = c.language.width, c.hidden or 4 * c.language.width
        self.cross = [CrossAttention(width, c.heads, c.head_width, hidden, dtype, name=f"cross_{i}") for i in c.crossed]

    # --------------------------------------------------------------------------------------------------- whole prompts

    def __call__(
        self,
        pixels: Float[Array, "b t f height width 3"] | None,
        ids: Int[Array, "b l"],
        mask: Int[Array, "b l"] | None = None,
        frame_mask: Int[Array, "b t f"] | None = None,
    ) -> dict[str, Any]:
        """{"media": [b, t, q, e], None without pixels; "states", "logits": as of `Decoder`}."""
        media = None if pixels is None else self.encode_media(pixels, frame_mask)
        if self.is_initializing() and self.config.embed_dim and pixels is not None:
            self.image_features(pixels[:, 0, 0])
        return {"media": media, **self.language(ids, mask, before=self.before(media, ids))}

    def encode_media(
        self, pixels: Float[Array, "b t f height width 3"], frame_mask: Int[Array, "b t f"] | None = None
    ) -> Float[Array, "b t q e"]:
        """The resampled tokens of each image or video. frame_mask: 1 = a frame, 0 = padding."""
        return self.resample(self.encode_frames(pixels), frame_mask)

    def encode_frames(self, pixels: Float[Array, "b t f height width 3"]) -> Float[Array, "b t f v e"]:
        """The image encoder's tokens of each frame."""
        return self.tokens(pixels.reshape(-1, *pixels.shape[3:])).reshape(*pixels.shape[:3], -1, self.config.channels)

    def resample(
        self, tokens: Float[Array, "b t f v e"], frame_mask: Int[Array, "b t f"] | None = None
    ) -> Float[Array, "b t q e"]:
        mask = None if frame_mask is None else jnp.broadcast_to(frame_mask[..., None], tokens.shape[:4])
        return self.resampler(tokens, mask)

    def tokens(self, images: Float[Array, "n height width 3"]) -> Float[Array, "n v e"]:
        """The image encoder's tokens of images."""
        outputs: Any = self.vision(images)
        if isinstance(self.config.vision, ViTConfig):
            return outputs.tokens[:, self.config.vision.prefix :]
        return rearrange(outputs[f"C{len(self.config.vision.layers) + 1}"], "n height width e -> n (height width) e")

    def image_features(self, images: Float[Array, "n height width 3"]) -> Float[Array, "n e"]:
        """The image encoder's pooled output, projected where it is; not of unit length."""
        outputs: Any = self.vision(images)
        pooled = outputs.pooled if isinstance(self.config.vision, ViTConfig) else outputs["pooled"]
        return self.vision_projection(pooled) if self.config.embed_dim else pooled

    def hidden(
        self,
        media: Float[Array, "b t q e"] | None,
        ids: Int[Array, "b l"],
        mask: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """The input of the language model's head."""
        return self.language.hidden(self.language.embed(ids), mask, self.before(media, ids))

    def before(
        self,
        media: Float[Array, "b t q e"] | None,
        ids: Int[Array, "b l"],
        earlier: Int[Array, " b"] | int = 0,
    ) -> Before:
        """The cross-attention layers as the hook of `Decoder`. earlier: the number of media before the first token."""
        inputs = self._cross_inputs(media, ids == self.config.image_token, earlier)

        def run(layer: CrossAttention, x: Array, *arrays: Any) -> Array:
            return layer(x, *arrays)[0]

        def before(i: int, x: Array) -> Array:
            if i not in self.config.crossed:
                return x
            layer = self.cross[self.config.crossed.index(i)]
            return rematerialised(run, layer, x, *inputs) if self.config.remat else run(layer, x, *inputs)

        return before

    def _cross_inputs(
        self, media: Float[Array, "b t q e"] | None, starts: Bool[Array, "b l"], earlier: Any, cached: int = 0
    ) -> tuple[Array, Array, Array | None]:
        """(media [b, t q, e], mask, attends) of `CrossAttention`. cached: the number of media in its cache."""
        c, latents = self.config, self.config.resampler.latents
        if media is None:
            media = jnp.zeros((len(starts), 0, latents, self.config.channels), c.dtype)
        mask = media_mask(starts, cached + media.shape[1], latents, c.only_last, earlier)
        attends = images_before(starts, earlier) > 0 if c.only_last else None
        return rearrange(media, "b t q e -> b (t q) e"), mask, attends

    # -------------------------------------------------------------------------------------------------- token by token

    def embed(self, ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        return self.language.embed(ids)

    def logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        return self.language.logits(x)

    def prefill(
        self,
        x: Float[Array, "b l d"],
        starts: Bool[Array, "b l"],
        media: Float[Array, "b t q e"] | None,
        mask: Bool[Array, "b s"],
        position_ids: Int[Array, "b s"],
        past: Sequence[LayerCache] | None = None,
        past_media: MediaCache | None = None,
        total_length: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b l d"], list[LayerCache], MediaCache]:
        """The normed states, all keys and values of the text, and those of the media.

        x: embeddings. starts: True at `<image>`. media: of the new tokens; past, past_media: of the tokens before x, as
        many media as they have `<image>`. Others as of `Decoder.prefill`.
        """
        c, latents, caches = self.config, self.config.resampler.latents, list[KeyValues]()
        earlier = 0 if past_media is None else past_media.count
        cached = 0 if past_media is None else past_media.layers[0].k.shape[2] // latents
        inputs = self._cross_inputs(media, starts, earlier, cached)

        def before(i: int, x: Array) -> Array:
            if i not in c.crossed:
                return x
            number = c.crossed.index(i)
            x, cache = self.cross[number](x, *inputs, None if past_media is None else past_media.layers[number])
            caches.append(cache)
            return x

        x, layers = self.language.prefill(x, mask, position_ids, past, total_length, before)
        return x, layers, MediaCache(tuple(caches), images_before(starts, earlier)[:, -1])

    def step(
        self,
        ids: Int[Array, "b r"],
        media: MediaCache,
        caches: Sequence[LayerCache],
        prompt_mask: Bool[Array, "b s"],
        prompt_positions: Int[Array, "b s"],
        new: Sequence[KeyValues],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "b r v"], list[KeyValues]]:
        """As `Decoder.step`. New tokens attend to the last medium of the prompt, also after a generated `<image>`."""
        c, latents = self.config, self.config.resampler.latents
        size, starts = media.layers[0].k.shape[2], jnp.zeros((len(ids), 1), bool)
        mask = media_mask(starts, size // latents, latents, c.only_last, media.count)[:, 0, 0]
        attends = media.count[:, None] > 0 if c.only_last else None

        def before(i: int, x: Array) -> Array:
            if i not in c.crossed:
                return x
            number = c.crossed.index(i)
            return self.cross[number].step(x, media.layers[number], mask, attends)

        return self.language.step(ids, caches, prompt_mask, prompt_positions, new, index, before)
