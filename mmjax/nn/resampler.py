"""The Perceiver Resampler: any number of visual tokens become a fixed number of them (arXiv 2204.14198, section 3.1.1).

Source: open_flamingo's src/helpers.py, PerceiverResampler; transformers' idefics/perceiver.py. An image is a video of
one frame.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.nn.norm import LayerNorm
from mmjax.nn.transformer import TORCH, Init, Mlp, MultiHeadAttention
from mmjax.types import Array, Bool, Float, Int

EPSILON = 1e-5
PLAIN = Init(TORCH, TORCH, TORCH, TORCH, nn.initializers.zeros)


class ResamplerLayer(nn.Module):
    """Latents attend to the media and to themselves; then a feed-forward. Params: media_norm, latent_norm, attention,
    mlp_norm, mlp. Both norms come before the concatenation; the media themselves are never updated. See `Resampler`."""

    heads: int
    head_width: int
    hidden: int
    dtype: Any = jnp.float32
    act: str = "gelu"
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self, latents: Float[Array, "m q d"], x: Float[Array, "m v d"], mask: Bool[Array, "m 1 1 v_q"] | None
    ) -> Float[Array, "m q d"]:
        media = LayerNorm(EPSILON, self.dtype, name="media_norm")(x)
        queries = LayerNorm(EPSILON, self.dtype, name="latent_norm")(latents)
        attention = MultiHeadAttention(
            self.heads,
            x.shape[-1],
            self.heads * self.head_width,
            init_with=PLAIN,
            dtype=self.dtype,
            qkv_bias=False,
            out_bias=False,
            make_qk_norm=functools.partial(LayerNorm, EPSILON, self.dtype) if self.qk_norm else None,
            norm_heads=True,
            name="attention",
        )
        latents = latents + attention(queries, jnp.concatenate([media, queries], axis=1), mask)
        mlp = Mlp(self.hidden, self.act, init_with=PLAIN, dtype=self.dtype, use_bias=False, name="mlp")
        return latents + mlp(LayerNorm(EPSILON, self.dtype, name="mlp_norm")(latents))


class Resampler(nn.Module):
    """Tokens of images or videos [b, t, f, v, d] -> [b, t, latents, d]; every medium by itself.

    Params: latents [q, d]; layer_{j}/...; norm; where there are such tables frame_embedding [f, d] and media_embedding
    [t, d].

    Attributes:
        heads, head_width: of the attention, whose inner width need not be d. hidden: of the feed-forward; None: 4 d.
        frames: rows of the table of frame embeddings; 0: there is none. A video of more frames has embeddings
            interpolated linearly between the first and the last one (arXiv 2204.14198: 8 in training, 30 in tests).
        media: rows of the table of embeddings of the media of a prompt; 0: there is none.
        act: of the feed-forward. qk_norm: queries and keys have a LayerNorm over each head (Idefics).
    """

    depth: int = 6
    heads: int = 8
    head_width: int = 64
    latents: int = 64
    hidden: int | None = None
    frames: int = 0
    media: int = 0
    dtype: Any = jnp.float32
    act: str = "gelu"
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t f v d"],
        mask: Bool[Array, "b t f v"] | Int[Array, "b t f v"] | None = None,
    ) -> Float[Array, "b t q d"]:
        """mask: 1 = a token, 0 = padding, of a video with fewer frames than others for example.

        Raises MmjaxError for more media than there are embeddings for.
        """
        b, t, f, _, d = x.shape
        normal = nn.initializers.normal(1.0)
        x = x.astype(self.dtype)
        if self.frames:
            table = self.param("frame_embedding", normal, (self.frames, d))
            x = x + frame_rows(table, f)[:, None].astype(x.dtype)
        if self.media:
            if t > self.media:
                raise MmjaxError(f"{t} images or videos in a prompt; the resampler has embeddings for {self.media}")
            table = self.param("media_embedding", normal, (self.media, d))
            x = x + table[:t, None, None].astype(x.dtype)
        x = rearrange(x, "b t f v d -> (b t) (f v) d")
        allowed = None
        if mask is not None:
            allowed = rearrange(mask.astype(bool), "b t f v -> (b t) (f v)")
            allowed = jnp.pad(allowed, ((0, 0), (0, self.latents)), constant_values=True)[:, None, None]
        latents = self.param("latents", normal, (self.latents, d)).astype(x.dtype)
        latents = repeat(latents, "q d -> m q d", m=b * t)
        hidden = 4 * d if self.hidden is None else self.hidden
        for j in range(self.depth):
            sizes = (self.heads, self.head_width, hidden, self.dtype, self.act, self.qk_norm)
            layer = ResamplerLayer(*sizes, name=f"layer_{j}")
            latents = layer(latents, x, allowed)
        latents = LayerNorm(EPSILON, self.dtype, name="norm")(latents)
        return rearrange(latents, "(b t) q d -> b t q d", b=b)


def frame_rows(table: Float[Array, "f d"], count: int) -> Float[Array, "count d"]:
    """The first `count` rows; of more than there are, as many between the first and the last, interpolated linearly.

    >>> frame_rows(jnp.array([[0.0], [1.0]]), 3).tolist()
    [[0.0], [0.5], [1.0]]
    """
    size = table.shape[0]
    if count <= size:
        return table[:count]
    positions = np.linspace(0, size - 1, count)
    lower = np.minimum(positions.astype(int), max(size - 2, 0))
    upper, share = np.minimum(lower + 1, size - 1), jnp.asarray((positions - lower)[:, None], table.dtype)
    return (1 - share) * table[lower] + share * table[upper]
