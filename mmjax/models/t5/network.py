"""T5 (arXiv 1910.10683; transformers modeling_t5.py), T5 1.1 and Flan-T5.

Parameter paths: embedding, head (where it is not the embedding), and of `encoder` and `decoder`: bias/table,
block_{i}/{attention_norm, attention/{q,k,v,out}, mlp_norm, mlp/{up,down}}, in gated ones also mlp/gate, in decoders
cross_norm and cross/{q,k,v,out}; norm. There are no biases but those of positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.generation.decodable import DecodeState
from mmjax.nn import int8, kv_cache
from mmjax.nn.activation import activation
from mmjax.nn.attention import dot_product_attention
from mmjax.nn.dropout import Dropout
from mmjax.nn.kv_cache import KeyValues
from mmjax.nn.masks import causal_mask, padding_mask
from mmjax.nn.norm import RMSNorm
from mmjax.nn.relative_positions import RelativeBias
from mmjax.nn.remat import rematerialised
from mmjax.nn.transformer import Dense
from mmjax.types import Array, Bool, Float, Int

normal = nn.initializers.normal


@dataclass(frozen=True)
class T5Config:
    """Class methods give the published sizes (parameter counts: tests/models/test_t5.py).

    Attributes:
        depth, decoder_depth: blocks of the two stacks; decoder_depth 0: an encoder alone.
        head_width: of a head; heads * head_width need not be the width (384 against 512 in flan-t5-small).
        hidden: width of the feed-forward. gated: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
        act: "relu" in T5, "gelu_tanh" in 1.1 and Flan; BLIP-2 puts the erf "gelu" in its place.
        tied: the head is the embedding. scaled: the decoder's output times width^-0.5 before it. Both in T5, neither in
            1.1 and Flan.
        buckets, max_distance: of relative positions.
        pad, start: ids; `start` is what a decoder reads first. eos: ids that end a text.
        remat: blocks are computed again in the backward pass.
        dtype: compute dtype; norms' statistics, softmax and logits are float32.
    """

    vocab_size: int = 32128
    width: int = 512
    depth: int = 6
    decoder_depth: int = 6
    heads: int = 8
    head_width: int = 64
    hidden: int = 2048
    act: str = "relu"
    gated: bool = False
    tied: bool = True
    scaled: bool = True
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    dropout: float = 0.1
    pad: int = 0
    eos: tuple[int, ...] = (1,)
    start: int = 0
    remat: bool = False
    dtype: str = "float32"

    @classmethod
    def _of(cls, depth: int, width: int, heads: int, hidden: int, fields: dict[str, Any]) -> Self:
        size: dict[str, Any] = {
            "depth": depth,
            "decoder_depth": depth,
            "width": width,
            "heads": heads,
            "hidden": hidden,
        }
        return cls(**size | fields)

    @classmethod
    def t5_small(cls, **fields: Any) -> Self:
        return cls(**fields)

    @classmethod
    def t5_base(cls, **fields: Any) -> Self:
        return cls._of(12, 768, 12, 3072, fields)

    @classmethod
    def t5_large(cls, **fields: Any) -> Self:
        return cls._of(24, 1024, 16, 4096, fields)

    @classmethod
    def flan_t5_small(cls, **fields: Any) -> Self:
        return cls._of(8, 512, 6, 1024, FLAN | fields)

    @classmethod
    def flan_t5_base(cls, **fields: Any) -> Self:
        return cls._of(12, 768, 12, 2048, FLAN | fields)

    @classmethod
    def flan_t5_large(cls, **fields: Any) -> Self:
        return cls._of(24, 1024, 16, 2816, FLAN | fields)

    @classmethod
    def flan_t5_xl(cls, **fields: Any) -> Self:
        return cls._of(24, 2048, 32, 5120, FLAN | fields)

    @classmethod
    def flan_t5_xxl(cls, **fields: Any) -> Self:
        return cls._of(24, 4096, 64, 10240, FLAN | fields)


FLAN = {"act": "gelu_tanh", "gated": True, "tied": False, "scaled": False}


class Attention(nn.Module):
    """Scores are not scaled: the initial queries are small instead. Params: q, k, v, out, without biases."""

    config: T5Config
    axis_name: str | None = None

    def setup(self) -> None:
        c = self.config
        inner = c.heads * c.head_width

        def dense(features: int, std: float) -> Dense:
            return Dense(features, False, c.dtype, normal(std))

        self.q = dense(inner, (c.width * c.head_width) ** -0.5)
        self.k, self.v = dense(inner, c.width**-0.5), dense(inner, c.width**-0.5)
        self.out = dense(c.width, inner**-0.5)

    def keys_values(self, context: Float[Array, "b s d"]) -> tuple[Float[Array, "b s h k"], Float[Array, "b s h k"]]:
        return self._heads(self.k(context)), self._heads(self.v(context))

    def _heads(self, x: Array) -> Array:
        return rearrange(x, "b n (h k) -> b n h k", h=self.config.heads)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        keys_values: tuple[Array, Array],
        mask: Bool[Array, "#b 1 #l s"] | None,
        bias: Float[Array, "1 h l s"] | None,
        train: bool,
    ) -> Float[Array, "b l d"]:
        rate = self.config.dropout
        mixed = dot_product_attention(
            self._heads(self.q(x)),
            *keys_values,
            mask,
            dropout_rate=rate,
            dropout_rng=self.make_rng("dropout") if train and rate else None,
            axis_name=self.axis_name,
            bias=bias,
            scale=1.0,
        )
        return self.out(rearrange(mixed, "b l h k -> b l (h k)"))

    def step(
        self,
        x: Float[Array, "b r d"],
        prompt: KeyValues,
        mask: Bool[Array, "b s"] | None,
        new: KeyValues | None,
        index: Int[Array, ""],
        bias: Float[Array, "1 1 h s_t"] | None,
    ) -> Float[Array, "b r d"]:
        """One token a row; its own key and value are in `new` already."""
        mixed = kv_cache.attend(self._heads(self.q(x)), prompt, mask, new, index, bias, scale=1.0)
        return self.out(rearrange(mixed, "b r h k -> b r (h k)"))


class Mlp(nn.Module):
    """Params: up, down, and gate if the config is gated."""

    config: T5Config
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], train: bool) -> Float[Array, "b l d"]:
        c, act = self.config, activation(self.config.act)

        def dense(name: str, features: int, x: Array) -> Array:
            return Dense(features, False, c.dtype, normal(x.shape[-1] ** -0.5), name=name)(x)

        h = dense("up", c.hidden, x)
        h = act(dense("gate", c.hidden, x)) * h if c.gated else act(h)
        return dense("down", c.width, Dropout(c.dropout, self.axis_name)(h, train))


class Kept(NamedTuple):
    """What a decoder's block keeps an item: keys and values of the tokens it began with, and of the encoder's."""

    prompt: KeyValues
    cross: KeyValues


class Block(nn.Module):
    """x + f(norm(x)) for attention, in decoders for attention over the encoder's tokens, and for the feed-forward."""

    config: T5Config
    decoder: bool
    axis_name: str | None = None

    def setup(self) -> None:
        c = self.config
        self.attention_norm, self.attention = RMSNorm(c.epsilon, c.dtype), Attention(c, self.axis_name)
        if self.decoder:
            self.cross_norm, self.cross = RMSNorm(c.epsilon, c.dtype), Attention(c, self.axis_name)
        self.mlp_norm, self.mlp = RMSNorm(c.epsilon, c.dtype), Mlp(c, self.axis_name)
        self.dropout = Dropout(c.dropout, self.axis_name)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        bias: Float[Array, "1 h l l"],
        context: Float[Array, "b s d"] | None,
        mask: Bool[Array, "#b 1 #l l"] | None,
        context_mask: Bool[Array, "b 1 1 s"] | None,
        train: bool,
    ) -> tuple[Float[Array, "b l d"], Kept | None]:
        y = self.attention_norm(x)
        own, kept = self.attention.keys_values(y), None
        x = x + self.dropout(self.attention(y, own, mask, bias, train), train)
        if context is not None:
            theirs = self.cross.keys_values(context)
            x = x + self.dropout(self.cross(self.cross_norm(x), theirs, context_mask, None, train), train)
            kept = Kept(kv_cache.from_tokens(*own), kv_cache.from_tokens(*theirs))
        return x + self.dropout(self.mlp(self.mlp_norm(x), train), train), kept

    def step(
        self,
        x: Float[Array, "b r d"],
        bias: Float[Array, "1 1 h p_t"],
        kept: Kept,
        context_mask: Bool[Array, "b s"],
        new: KeyValues,
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "b r d"], KeyValues]:
        y = self.attention_norm(x)
        new = kv_cache.write(new, *self.attention.keys_values(y), index)
        x = x + self.attention.step(y, kept.prompt, None, new, index, bias)
        x = x + self.cross.step(self.cross_norm(x), kept.cross, context_mask, None, index, None)
        return x + self.mlp(self.mlp_norm(x), False), new


class Stack(nn.Module):
    """Blocks that share one bias of positions, and a last norm."""

    config: T5Config
    decoder: bool
    axis_name: str | None = None

    def setup(self) -> None:
        c = self.config
        self.bias = RelativeBias(c.heads, not self.decoder, c.buckets, c.max_distance, normal(c.width**-0.5))
        depth = c.decoder_depth if self.decoder else c.depth
        self.block = [Block(c, self.decoder, self.axis_name) for _ in range(depth)]
        self.norm = RMSNorm(c.epsilon, c.dtype)
        self.dropout = Dropout(c.dropout, self.axis_name)

    def _masks(
        self, x: Array, mask: Array | None, context: Array | None
    ) -> tuple[Array, Array | None, Array | None, Array | None]:
        """bias, context, mask and context_mask as blocks take them; mask: of the encoder's tokens."""
        places = jnp.arange(x.shape[1])
        mask = None if mask is None else padding_mask(mask)
        if self.decoder:
            return self.bias(places, places), context, causal_mask(len(places), len(places)), mask
        return self.bias(places, places), None, mask, None

    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Int[Array, "b s"] | None,
        context: Float[Array, "b s d"] | None = None,
        train: bool = False,
    ) -> list[Float[Array, "b l d"]]:
        """The input of every block, and the last one's output after the norm: depth + 1 arrays."""

        def run(block: Block, x: Array, *others: Any) -> Array:
            bias, context, own_mask, context_mask = others
            return block(x, bias, context, own_mask, context_mask, train)[0]

        others = self._masks(x, mask, context)
        states = [self.dropout(x, train)]
        for block in self.block:
            x = states[-1]
            states.append(rematerialised(run, block, x, *others) if self.config.remat else run(block, x, *others))
        return [*states[:-1], self.dropout(self.norm(states[-1]), train)]

    def prefill(
        self, x: Float[Array, "b p d"], mask: Bool[Array, "b s"], context: Float[Array, "b s d"]
    ) -> tuple[Float[Array, "b d"], tuple[Kept, ...]]:
        """The last token, and what is kept of all of them."""
        bias, _, own_mask, context_mask = self._masks(x, mask, context)
        kept = []
        for block in self.block:
            x, of_block = block(x, bias, context, own_mask, context_mask, False)
            kept.append(of_block)
        return self.norm(x[:, -1]), tuple(kept)

    def step(self, x: Float[Array, "b r d"], state: DecodeState) -> tuple[Float[Array, "b r d"], tuple[KeyValues, ...]]:
        kept, written = state.items["blocks"], []
        begun, capacity = kept[0].prompt.k.shape[2], state.rows[0].k.shape[1]
        bias = rearrange(self.bias((begun + state.index)[None], jnp.arange(begun + capacity)), "1 h 1 s -> 1 1 h s")
        for block, of_block, new in zip(self.block, kept, state.rows):
            x, new = block.step(x, bias, of_block, state.items["mask"], new, state.index)
            written.append(new)
        return self.norm(x), tuple(written)


class T5(nn.Module):
    """Ids -> logits. axis_name: the mapped axis that cuts the batch, for dropout."""

    config: T5Config
    axis_name: str | None = None

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", normal(1.0), (c.vocab_size, c.width))
        self.encoder = Stack(c, False, self.axis_name)
        if c.decoder_depth:
            self.decoder = Stack(c, True, self.axis_name)
            if not c.tied:
                self.head = self.param("head", normal(c.width**-0.5), (c.vocab_size, c.width))

    def __call__(
        self,
        ids: Int[Array, "b s"] | None,
        decoder_ids: Int[Array, "b l"] | None = None,
        attention_mask: Int[Array, "b s"] | None = None,
        embeds: Float[Array, "b s d"] | None = None,
        train: bool = False,
    ) -> dict[str, Any]:
        """{"encoder", "decoder": depth + 1 states each, the last after the norm; "logits": float32 [b, l, v]}.

        attention_mask: of the encoder's tokens; the decoder's need none, for what pads them comes last.
        embeds: instead of ids. Without decoder_ids there are the encoder's states alone.
        """
        states = self.encode(ids, attention_mask, embeds, train)
        if decoder_ids is None or not self.config.decoder_depth:
            return {"encoder": states}
        decoded = self.decode(decoder_ids, states[-1], attention_mask, train)
        return {"encoder": states, "decoder": decoded, "logits": self.logits(decoded[-1])}

    def embed(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        return int8.rows(self.embedding, ids).astype(self.config.dtype)

    def encode(
        self,
        ids: Int[Array, "b s"] | None,
        attention_mask: Int[Array, "b s"] | None = None,
        embeds: Float[Array, "b s d"] | None = None,
        train: bool = False,
    ) -> list[Float[Array, "b s d"]]:
        """The encoder's states. Raises MmjaxError unless exactly one of ids and embeds is given."""
        if ids is not None and embeds is None:
            x = self.embed(ids)
        elif embeds is not None and ids is None:
            x = embeds.astype(self.config.dtype)
        else:
            raise MmjaxError("T5's encoder needs input_ids or inputs_embeds, one of the two")
        return self.encoder(x, attention_mask, train=train)

    def decode(
        self,
        decoder_ids: Int[Array, "b l"],
        context: Float[Array, "b s d"],
        attention_mask: Int[Array, "b s"] | None = None,
        train: bool = False,
    ) -> list[Float[Array, "b l d"]]:
        """The decoder's states; context: the encoder's last, attention_mask: of its tokens."""
        return self.decoder(self.embed(decoder_ids), attention_mask, context, train)

    def logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        c = self.config
        x = x * c.width**-0.5 if c.scaled else x
        return int8.scores(x.astype(c.dtype), self.embedding if c.tied else self.head)

    def prefill(self, inputs: Mapping[str, Array], rows: int, capacity: int) -> tuple[Float[Array, "b v"], DecodeState]:
        """See `mmjax.models.t5.decoding`."""
        c, mask = self.config, inputs.get("attention_mask")
        context = self.encode(inputs.get("input_ids"), mask, inputs.get("inputs_embeds"))[-1]
        b, s = context.shape[:2]
        mask = jnp.ones((b, s), bool) if mask is None else mask.astype(bool)
        begun = inputs.get("decoder_input_ids", jnp.full((b, 1), c.start))
        x, kept = self.decoder.prefill(self.embed(begun), mask, context)
        room = kv_cache.empty(b, rows, c.heads, capacity, c.head_width, jnp.dtype(c.dtype))
        state = DecodeState({"mask": mask, "blocks": kept}, (room,) * c.decoder_depth, jnp.int32(0))
        return self.logits(x), state

    def step(self, ids: Int[Array, "b r"], state: DecodeState) -> tuple[Float[Array, "b r v"], DecodeState]:
        x, rows = self.decoder.step(self.embed(ids), state)
        return self.logits(x), DecodeState(state.items, rows, state.index + 1)
