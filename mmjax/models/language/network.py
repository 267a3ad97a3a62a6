"""The decoder of the language models: one stack, whose config says which model it is.

A block is attention and a feed-forward around residuals. It runs in two ways over the same parameters: over a whole
prompt, which leaves its keys and values behind, and one token at a time over what is kept (`mmjax.nn.kv_cache`).

Parameter paths: token_embedding [v, d]; position_embedding [places, d] if learned; project_in, project_out (OPT-350m);
block_{i}/norm_1, norm_2, block_{i}/attention/{q,k,v,out,q_norm,k_norm}, block_{i}/mlp/{gate,up,down}; norm;
head/kernel [d, v] unless it is tied.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from mmjax.models.language.config import Alibi, DecoderConfig, Learned
from mmjax.nn import int8, kv_cache
from mmjax.nn.activation import activation
from mmjax.nn.attention import dot_product_attention
from mmjax.nn.kv_cache import KeyValues
from mmjax.nn.masks import padding_mask
from mmjax.nn.norm import LayerNorm, RMSNorm
from mmjax.nn.rotary import Rotary, rotate
from mmjax.nn.transformer import Dense
from mmjax.types import Array, Bool, Float, Int

INIT = nn.initializers.normal(0.02)


class Places(NamedTuple):
    """How order enters a block. turns: (cosines, sines) [b, l, k / 2]. bias: of scores, [b, h, l or 1, s]."""

    turns: tuple[Array, Array] | None
    bias: Array | None


def alibi_slopes(heads: int) -> np.ndarray:
    """float32 [h]: 2^(-8 i / n) of the next power of two n; where that is not `heads`, every other first."""
    power = 2 ** int(np.ceil(np.log2(heads)))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    if power != heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:heads]
    return slopes.astype(np.float32)


def token_places(mask: Int[Array, "b s"] | Bool[Array, "b s"]) -> Int[Array, "b s"]:
    """The place of each token among the tokens of its row, from 0; of padding: of the token before, -1 at the start."""
    return jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1


class Attention(nn.Module):
    """Causal attention with grouped keys and values. `__call__` takes whole prompts, `step` one token a row."""

    config: DecoderConfig

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        self.q = Dense(c.heads * c.head_width, c.qkv_bias, dtype, INIT)
        self.k = Dense(c.kv_heads * c.head_width, c.qkv_bias, dtype, INIT)
        self.v = Dense(c.kv_heads * c.head_width, c.qkv_bias, dtype, INIT)
        self.out = Dense(c.width, c.out_bias, dtype, nn.initializers.normal(0.02 / (2 * c.depth) ** 0.5))
        if c.qk_norm:
            self.q_norm, self.k_norm = _norm(c), _norm(c)

    def _project(self, x: Float[Array, "b l d"], turns: tuple[Array, Array] | None) -> tuple[Array, Array, Array]:
        c = self.config
        q, k, v = self.q(x), self.k(x), self.v(x)
        if c.clip_qkv is not None:
            q, k, v = (jnp.clip(y, -c.clip_qkv, c.clip_qkv) for y in (q, k, v))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (rearrange(y, "b l (h k) -> b l h k", k=c.head_width) for y in (q, k, v))
        if turns is not None:
            q, k = rotate(q, *turns), rotate(k, *turns)
        return q, k, v

    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b 1 #l s"], places: Places, past: KeyValues | None = None
    ) -> tuple[Float[Array, "b l d"], KeyValues]:
        """past: what is before x, of which `mask` and `places.bias` tell too. Returns also all that x can see."""
        q, k, v = self._project(x, places.turns)
        kept = kv_cache.from_tokens(k, v)
        if past is not None:
            kept = KeyValues(*(jnp.concatenate(pair, axis=2) for pair in zip(past, kept)))
            k, v = (rearrange(y, "b g s k -> b s g k") for y in kept)
        mixed = dot_product_attention(q, k, v, mask, causal=True, bias=places.bias)
        return self.out(rearrange(mixed, "b l h k -> b l (h k)")), kept

    def step(
        self,
        x: Float[Array, "b r d"],
        prompt: KeyValues,
        prompt_mask: Bool[Array, "b s"],
        new: KeyValues,
        index: Int[Array, ""],
        places: Places,
    ) -> tuple[Float[Array, "b r d"], KeyValues]:
        q, k, v = self._project(x, places.turns)
        new = kv_cache.write(new, k, v, index)
        mixed = kv_cache.attend(q, prompt, prompt_mask, new, index, places.bias)
        return self.out(rearrange(mixed, "b r h k -> b r (h k)")), new


class FeedForward(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        act = activation(c.act)
        y = Dense(c.hidden, c.mlp_bias, dtype, INIT, name="up")(x)
        y = act(Dense(c.hidden, c.mlp_bias, dtype, INIT, name="gate")(x)) * y if c.gated else act(y)
        down = nn.initializers.normal(0.02 / (2 * c.depth) ** 0.5)
        return Dense(c.width, c.mlp_bias, dtype, down, name="down")(y)


def _norm(config: DecoderConfig) -> nn.Module:
    dtype = jnp.dtype(config.dtype)
    if config.norm == "rms":
        return RMSNorm(config.epsilon, dtype)
    return LayerNorm(config.epsilon, dtype, config.norm == "layer")


class Block(nn.Module):
    """One layer; `attend` below is either of the attention's two ways."""

    config: DecoderConfig

    def setup(self) -> None:
        self.norm_1, self.norm_2 = _norm(self.config), _norm(self.config)
        self.attention, self.mlp = Attention(self.config), FeedForward(self.config)

    def __call__(self, x: Array, mask: Array, places: Places, past: KeyValues | None = None) -> tuple[Array, KeyValues]:
        return self._around(x, lambda y: self.attention(y, mask, places, past))

    def step(self, x: Array, *rest: Any) -> tuple[Array, KeyValues]:
        """See `Attention.step`."""
        return self._around(x, lambda y: self.attention.step(y, *rest))

    def _around(self, x: Array, attend: Any) -> tuple[Array, KeyValues]:
        c = self.config
        if c.parallel:
            mixed, kept = attend(self.norm_1(x))
            return x + mixed + self.mlp(self.norm_2(x)), kept
        mixed, kept = attend(self.norm_1(x) if c.norm_first else x)
        x = x + mixed if c.norm_first else self.norm_1(x + mixed)
        if c.norm_first:
            return x + self.mlp(self.norm_2(x)), kept
        return self.norm_2(x + self.mlp(x)), kept


class Decoder(nn.Module):
    """Ids or embeddings -> next tokens' logits, in one pass or step by step."""

    config: DecoderConfig

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        narrow = c.embed_width or c.width
        self.token_embedding = self.param("token_embedding", INIT, (c.vocab_size, narrow))
        if isinstance(c.positions, Learned):
            size = (c.context + c.positions.first, c.width)
            self.position_embedding = self.param("position_embedding", INIT, size)
        if c.embed_width is not None:
            self.project_in = Dense(c.width, False, dtype, INIT)
            self.project_out = Dense(c.embed_width, False, dtype, INIT)
        block = nn.remat(Block, methods=["__call__"]) if c.remat else Block
        self.blocks = [block(c, name=f"block_{i}") for i in range(c.depth)]
        if c.final_norm:
            self.norm = _norm(c)
        if not c.tied:
            self.head = Dense(c.vocab_size, False, dtype, INIT)

    # -------------------------------------------------------------------------------------------------- whole prompts

    def __call__(
        self,
        ids: Int[Array, "b l"] | None = None,
        mask: Int[Array, "b l"] | None = None,
        embeds: Float[Array, "b l d"] | None = None,
    ) -> dict[str, Any]:
        """{"states": depth + 1 arrays [b, l, d], the last normed; "logits": float32 [b, l, v]}.

        mask: 1 = a token. Padding is seen by no token; as in transformers it takes part in the places of learned and
        rotary positions, but for OPT's.
        """
        x = self.embed(jnp.asarray(ids)) if embeds is None else embeds
        valid = jnp.ones(x.shape[:2], jnp.int32) if mask is None else mask
        learned = self.config.positions
        counts = isinstance(learned, Learned) and learned.of_tokens
        places = token_places(valid) if counts else jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        states, _ = self.run(x, valid, places)
        return {"states": states, "logits": self.logits(states[-1])}

    def hidden(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Of texts without padding, what the head's matrix multiplies."""
        x = self.embed(ids)
        states, _ = self.run(x, jnp.ones(ids.shape, jnp.int32), jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape))
        return states[-1] if self.config.embed_width is None else self.project_out(states[-1])

    def embed(self, ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        """Rows of the embedding, brought to the model's width."""
        x = int8.rows(self.token_embedding, ids).astype(self.config.dtype)
        return x if self.config.embed_width is None else self.project_in(x)

    def run(
        self,
        x: Float[Array, "b l d"],
        mask: Int[Array, "b s"],
        places: Int[Array, "b s"],
        past: tuple[KeyValues, ...] | None = None,
        reach: Int[Array, ""] | None = None,
    ) -> tuple[list[Float[Array, "b l d"]], tuple[KeyValues, ...]]:
        """The states after each block, and all keys and values. `past` is before x; mask and places tell of both.

        reach: the length that the longest row will grow to; None: that of `mask`.
        """
        length, size = x.shape[1], mask.shape[1]
        own = places[:, size - length :]
        x = self._place(x, own)
        allowed = padding_mask(mask)
        if self.config.window is not None:
            near = own[:, :, None] - places[:, None, :] < self.config.window
            allowed = allowed & near[:, None]
        entry = self._places(own, places, size if reach is None else reach)
        states, kept = [x], []
        for i, block in enumerate(self.blocks):
            x, keys = block(x, allowed, entry, None if past is None else past[i])
            states.append(x)
            kept.append(keys)
        states[-1] = self._last(x)
        return states, tuple(kept)

    def logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """float32 logits of normed states."""
        if self.config.embed_width is not None:
            x = self.project_out(x)
        if not self.config.tied:
            return self.head(x).astype(jnp.float32)
        return int8.scores(x, self.token_embedding)

    # -------------------------------------------------------------------------------------------------- token by token

    def step(
        self,
        ids: Int[Array, "b r"],
        prompt: tuple[KeyValues, ...],
        prompt_mask: Bool[Array, "b s"],
        prompt_places: Int[Array, "b s"],
        rows: tuple[KeyValues, ...],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "b r v"], tuple[KeyValues, ...]]:
        """(logits of the token after `ids`, rows with these tokens' keys and values in slot `index`)."""
        capacity = rows[0].k.shape[1]
        lengths = prompt_mask.sum(-1, dtype=jnp.int32)
        own = jnp.broadcast_to((lengths + index)[:, None], ids.shape)
        slots = jnp.broadcast_to(lengths[:, None] + jnp.arange(capacity), (ids.shape[0], capacity))
        keys = jnp.concatenate([prompt_places, slots], -1)
        x = self._place(self.embed(ids), own)
        entry = self._places(own, keys, lengths.max() + capacity - 1)
        if entry.bias is not None:
            entry = entry._replace(bias=rearrange(entry.bias, "b h 1 s -> b 1 h s"))
        if self.config.window is not None:
            far = own[:, :1] - keys >= self.config.window
            entry = entry._replace(bias=jnp.where(far, jnp.finfo(jnp.float32).min, 0.0)[:, None, None])
        written = []
        for block, kept, new in zip(self.blocks, prompt, rows):
            x, new = block.step(x, kept, prompt_mask, new, index, entry)
            written.append(new)
        return self.logits(self._last(x)), tuple(written)

    # ------------------------------------------------------------------------------------------------------- the parts

    def _last(self, x: Array) -> Array:
        return self.norm(x) if self.config.final_norm else x

    def _place(self, x: Float[Array, "b l d"], places: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Adds learned positions. Beyond the table's end its last row is taken, as nothing reads such a token."""
        if not isinstance(self.config.positions, Learned):
            return x
        rows = jnp.clip(places + self.config.positions.first, 0, self.position_embedding.shape[0] - 1)
        return x + self.position_embedding[rows].astype(x.dtype)

    def _places(self, own: Int[Array, "b l"], keys: Int[Array, "b s"], length: int | Int[Array, ""]) -> Places:
        positions = self.config.positions
        if isinstance(positions, Rotary):
            return Places(positions.turns(jnp.maximum(own, 0), self.config.head_width, length), None)
        if isinstance(positions, Alibi):
            # The same for every query: softmax takes no notice of what all keys' scores share.
            slopes = jnp.asarray(alibi_slopes(self.config.heads))
            return Places(None, slopes[None, :, None, None] * keys[:, None, None, :].astype(jnp.float32))
        return Places(None, None)
