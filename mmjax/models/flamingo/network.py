"""Flamingo: an image encoder, a resampler, and gated cross attention between the blocks of a language model.

Sources: arXiv 2204.14198, section 3; open_flamingo's src/helpers.py, flamingo.py and flamingo_lm.py; transformers'
idefics/modeling_idefics.py, whose model is the same network with other options.

Parameter paths: vision/..., as of a `ViT` or a `ResNet`; vision_projection/kernel; resampler/..., see
`mmjax.nn.resampler`; language/..., as of a `Decoder`; cross_{i}/{norm, attention, gate, mlp_norm, mlp, mlp_gate}, the
layer before block i of the language model. No parameter of the language model has another path than by itself.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.models.flamingo.config import FlamingoConfig
from mmjax.models.language.network import Decoder
from mmjax.models.resnet.network import ResNet
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.nn.kv_cache import KeyValues
from mmjax.nn.masks import images_before, media_mask
from mmjax.nn.norm import LayerNorm, RMSNorm
from mmjax.nn.remat import rematerialised
from mmjax.nn.resampler import EPSILON, PLAIN, Resampler
from mmjax.nn.stack import Before, LayerCache
from mmjax.nn.transformer import Dense, Mlp, MultiHeadAttention
from mmjax.types import Array, Bool, Float, Int


class MediaCache(NamedTuple):
    """The media so far, for the tokens to come.

    layers: keys and values in each cross-attention layer [b, h, t q, k]. count: the number of media. visible: those to
    which the last token may attend. attends: False where its attention is exactly zero.
    """

    layers: tuple[KeyValues, ...]
    count: Int[Array, " b"]
    visible: Bool[Array, "b t"]
    attends: Bool[Array, " b"]


class CrossAttention(nn.Module):
    """x + tanh(gate) attention(norm(x), media), then x + tanh(mlp_gate) mlp(mlp_norm(x)) (helpers.py:236-279).

    Where both gates start at zero the layer is then the identity, bit for bit. The feed-forward acts on text before the
    first image as well. The media are not normed here. `heads * head_width` need not be the width.

    act: of the feed-forward, which with `gated` has a third matrix. rms: the epsilon of RMSNorms in place of
    LayerNorms. qk_norm, vector_gates, initial_gate: as of `FlamingoConfig`.
    """

    width: int
    heads: int
    head_width: int
    hidden: int
    dtype: Any = jnp.float32
    act: str = "gelu"
    gated: bool = False
    rms: float | None = None
    qk_norm: bool = False
    vector_gates: bool = False
    initial_gate: float = 0.0

    @classmethod
    def of(cls, config: FlamingoConfig, name: str) -> "CrossAttention":
        c, language = config, config.language
        options: dict[str, Any] = {"qk_norm": c.qk_norm, "vector_gates": c.vector_gates, "initial_gate": c.initial_gate}
        if c.form == "llama":
            options |= {"act": language.act, "gated": language.gated, "rms": language.epsilon}
        sizes = (language.width, c.heads, c.head_width, c.hidden or 4 * language.width, jnp.dtype(c.dtype))
        return cls(*sizes, **options, name=name)

    def setup(self) -> None:
        options: dict[str, Any] = {"init_with": PLAIN, "dtype": self.dtype}
        norms = functools.partial(LayerNorm, EPSILON, self.dtype)
        norms = norms if self.rms is None else functools.partial(RMSNorm, self.rms, self.dtype)
        self.norm, self.mlp_norm = norms(), norms()
        self.attention = MultiHeadAttention(
            self.heads,
            self.width,
            self.heads * self.head_width,
            qkv_bias=False,
            out_bias=False,
            make_qk_norm=norms if self.qk_norm else None,
            norm_heads=True,
            **options,
        )
        self.mlp = Mlp(self.hidden, self.act, self.gated, use_bias=False, **options)
        start, shape = nn.initializers.constant(self.initial_gate), (self.width,) if self.vector_gates else ()
        self.gate, self.mlp_gate = (self.param(name, start, shape) for name in ("gate", "mlp_gate"))

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
        if c.resampler is not None:
            self.resampler = Resampler(**vars(c.resampler), dtype=dtype)
        self.language = Decoder(c.decoder)
        self.cross = [CrossAttention.of(c, f"cross_{i}") for i in c.crossed]

    # --------------------------------------------------------------------------------------------------- whole prompts

    def __call__(
        self,
        pixels: Float[Array, "b t f height width 3"] | None,
        ids: Int[Array, "b l"],
        mask: Int[Array, "b l"] | None = None,
        frame_mask: Int[Array, "b t f"] | None = None,
        image_mask: Int[Array, "b l t"] | None = None,
    ) -> dict[str, Any]:
        """{"media": [b, t, q, e], None without pixels; "states", "logits": as of `Decoder`}.

        image_mask: see `before`.
        """
        media = None if pixels is None else self.encode_media(pixels, frame_mask)
        if self.is_initializing() and self.config.embed_dim and pixels is not None:
            self.image_features(pixels[:, 0, 0])
        return {"media": media, **self.language(ids, mask, before=self.before(media, ids, image_mask=image_mask))}

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
        """Raises MmjaxError for videos without a resampler."""
        if self.config.resampler is None:
            if tokens.shape[2] != 1:
                raise MmjaxError(f"videos of {tokens.shape[2]} frames need a resampler, which this Flamingo has not")
            return tokens[:, :, 0]
        mask = None if frame_mask is None else jnp.broadcast_to(frame_mask[..., None], tokens.shape[:4])
        return self.resampler(tokens, mask)

    def tokens(self, images: Float[Array, "n height width 3"]) -> Float[Array, "n v e"]:
        """The image encoder's tokens of images."""
        outputs: Any = self.vision(images)
        if isinstance(self.config.vision, ViTConfig):
            return outputs.tokens if self.config.class_token else outputs.tokens[:, self.config.vision.prefix :]
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
        image_mask: Int[Array, "b l t"] | None = None,
    ) -> Before:
        """The cross-attention layers as the hook of `Decoder`.

        earlier: the number of media before the first token. image_mask: 1 where a token may attend to an image; a row
        of zeros gets exactly zero. None: by the positions of `<image>`.
        """
        inputs = self._cross_inputs(media, ids == self.config.image_token, earlier, 0, image_mask)

        def run(layer: CrossAttention, x: Array, *arrays: Any) -> Array:
            return layer(x, *arrays)[0]

        def before(i: int, x: Array) -> Array:
            if i not in self.config.crossed:
                return x
            layer = self.cross[self.config.crossed.index(i)]
            return rematerialised(run, layer, x, *inputs) if self.config.remat else run(layer, x, *inputs)

        return before

    def _cross_inputs(
        self,
        media: Float[Array, "b t q e"] | None,
        starts: Bool[Array, "b l"],
        earlier: Any,
        cached: int = 0,
        image_mask: Int[Array, "b l s"] | None = None,
    ) -> tuple[Array, Array, Array | None]:
        """(media [b, t q, e], mask, attends) of `CrossAttention`. cached: the number of media in its cache, which
        `image_mask` covers too."""
        c = self.config
        if media is None:
            media = jnp.zeros((len(starts), 0, c.media_tokens, c.channels), c.dtype)
        if image_mask is not None and media.shape[1] + cached:
            visible = image_mask.astype(bool)
            mask, attends = jnp.repeat(visible, media.shape[2], axis=-1)[:, None], visible.any(-1)
        else:
            mask = media_mask(starts, cached + media.shape[1], media.shape[2], c.only_last, earlier)
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
        image_mask: Int[Array, "b l t"] | None = None,
    ) -> tuple[Float[Array, "b l d"], list[LayerCache], MediaCache]:
        """The normed states, all keys and values of the text, and those of the media.

        x: embeddings. starts: True at `<image>`. media: of the new tokens; past, past_media: of the tokens before x, as
        many media as they have `<image>`. image_mask: see `before`; of past and new media. Others as of
        `Decoder.prefill`.
        """
        c, caches = self.config, list[KeyValues]()
        earlier, cached = (0, 0) if past_media is None else (past_media.count, past_media.visible.shape[1])
        inputs = self._cross_inputs(media, starts, earlier, cached, image_mask)

        def before(i: int, x: Array) -> Array:
            if i not in c.crossed:
                return x
            number = c.crossed.index(i)
            x, cache = self.cross[number](x, *inputs, None if past_media is None else past_media.layers[number])
            caches.append(cache)
            return x

        x, layers = self.language.prefill(x, mask, position_ids, past, total_length, before)
        number = cached + (0 if media is None else media.shape[1])
        visible = (
            rearrange(inputs[1][:, 0, -1], "b (t q) -> b t q", t=number)[..., 0]
            if number
            else jnp.zeros((len(x), 0), bool)
        )
        attends = jnp.ones(len(x), bool) if inputs[2] is None else inputs[2][:, -1]
        return x, layers, MediaCache(tuple(caches), images_before(starts, earlier)[:, -1], visible, attends)

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
        """As `Decoder.step`. New tokens attend to what the last one of the prompt does, also after a generated
        `<image>`."""
        c, count = self.config, media.visible.shape[1]
        mask = jnp.repeat(media.visible, media.layers[0].k.shape[2] // max(count, 1), axis=1)
        attends = media.attends[:, None]

        def before(i: int, x: Array) -> Array:
            if i not in c.crossed:
                return x
            number = c.crossed.index(i)
            return self.cross[number].step(x, media.layers[number], mask, attends)

        return self.language.step(ids, caches, prompt_mask, prompt_positions, new, index, before)
