"""Blocks of encoders and decoders: a full pass over a sequence, and one token at a time over what was kept.

Parameter paths within a `Stack`: block_{i}/attention/{q,k,v,out}, block_{i}/attention_norm, and in a decoder
block_{i}/cross_attention/{q,k,v,out}, block_{i}/cross_attention_norm; block_{i}/mlp/{up,down}, block_{i}/mlp_norm.
A norm is named after its branch, so that an encoder and a decoder can share what both have.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.nn.activation import activation
from mmjax.nn.attention import attention_weights, dot_product_attention
from mmjax.nn.dropout import Dropout
from mmjax.nn.kv_cache import KeyValues, attend, from_tokens, write
from mmjax.nn.norm import LayerNorm
from mmjax.nn.transformer import Dense, Init
from mmjax.types import Array, Bool, Float, Int


class Kept(NamedTuple):
    """Keys and values of one layer after a full pass: of the sequence itself, and of what it looked at (None in an
    encoder). They depend on the prompt and the context alone: an item's beams share them."""

    own: KeyValues
    cross: KeyValues | None = None


class CachedAttention(nn.Module):
    """Multi-head attention whose keys and values can be kept. Params: q, k, v, out, each a `Dense` with a bias.

    Attributes:
        width: of the queries' input, the heads together, and the result. The context may have another.
        causal: in a full pass a token attends to itself and to earlier ones.
        dropout: rate on the attention weights. axis_name: the mapped axis that cuts the batch, for dropout alone.

    Inside `apply(..., mutable=["intermediates"])` a full pass keeps its weights [b, h, l, s] as "weights".
    """

    heads: int
    width: int
    causal: bool = False
    dropout: float = 0.0
    init_with: Init = Init()
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        if self.width % self.heads:
            raise MmjaxError(f"{self.heads} heads do not divide the width {self.width}")
        qkv, out = self.init_with.qkv, self.init_with.out
        self.q, self.k, self.v = (Dense(self.width, True, self.dtype, qkv) for _ in range(3))
        self.out = Dense(self.width, True, self.dtype, out)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        context: Float[Array, "b s e"] | None = None,
        mask: Bool[Array, "#b #h #l s"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b l d"], KeyValues]:
        """The result, and the keys and values of the context (of x itself where it is None)."""
        context = x if context is None else context
        q, k, v = (self._heads(y) for y in (self.q(x), self.k(context), self.v(context)))
        if self.is_mutable_collection("intermediates") and not self.is_initializing():
            self.sow("intermediates", "weights", attention_weights(q, k, mask, self.causal))
        rng = self.make_rng("dropout") if train and self.dropout else None
        mixed = dot_product_attention(
            q, k, v, mask, causal=self.causal, dropout_rate=self.dropout, dropout_rng=rng, axis_name=self.axis_name
        )
        return self.out(rearrange(mixed, "b l h k -> b l (h k)")), from_tokens(k, v)

    def step(
        self,
        x: Float[Array, "b r d"],
        prompt: KeyValues,
        prompt_mask: Bool[Array, "b s"] | None,
        new: KeyValues,
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "b r d"], KeyValues]:
        """One token a row, over the prompt and the row's own tokens, which it joins in slot `index`."""
        new = write(new, self._heads(self.k(x)), self._heads(self.v(x)), index)
        mixed = attend(self._heads(self.q(x)), prompt, prompt_mask, new, index)
        return self.out(rearrange(mixed, "b r h k -> b r (h k)")), new

    def look(
        self, x: Float[Array, "b r d"], context: KeyValues, mask: Bool[Array, "b s"] | None
    ) -> Float[Array, "b r d"]:
        """One token a row, over the kept keys and values of a context alone."""
        mixed = attend(self._heads(self.q(x)), context, mask, None, 0)
        return self.out(rearrange(mixed, "b r h k -> b r (h k)"))

    def _heads(self, x: Float[Array, "b l d"]) -> Float[Array, "b l h k"]:
        return rearrange(x, "b l (h k) -> b l h k", h=self.heads)


class FeedForward(nn.Module):
    """down(act(up(x))). Params: up, down. dropout: after the activation (torch's layer; the paper has none there)."""

    hidden: int
    act: str = "gelu"
    dropout: float = 0.0
    init_with: Init = Init()
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"], train: bool = False) -> Float[Array, "*b d"]:
        init = self.init_with
        h = activation(self.act)(Dense(self.hidden, True, self.dtype, init.up, init.mlp_bias, name="up")(x))
        h = Dropout(self.dropout, self.axis_name)(h, train)
        return Dense(x.shape[-1], True, self.dtype, init.down, init.mlp_bias, name="down")(h)


class Block(nn.Module):
    """Self attention, in a decoder cross attention, and feed-forward, each around a residual with a norm.

    Attributes:
        width, heads, hidden: of the states, the attentions, the feed-forward's middle.
        causal: of the self attention. cross: whether there is an attention to a context.
        norm_first: x + f(norm(x)) (pre-norm), else norm(x + f(x)) (post-norm); a context is never normed here.
        dropout: of each branch before it is added. attention_dropout, activation_dropout: of the attention's weights
            and after the feed-forward's activation.
        axis_name: the mapped axis that cuts the batch, for dropout.
    """

    width: int
    heads: int
    hidden: int
    act: str = "gelu"
    causal: bool = False
    cross: bool = False
    norm_first: bool = False
    epsilon: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_with: Init = Init()
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        def attention(causal: bool) -> CachedAttention:
            return CachedAttention(
                self.heads, self.width, causal, self.attention_dropout, self.init_with, self.dtype, self.axis_name
            )

        self.attention, self.attention_norm = attention(self.causal), LayerNorm(self.epsilon, self.dtype)
        if self.cross:
            self.cross_attention, self.cross_attention_norm = attention(False), LayerNorm(self.epsilon, self.dtype)
        self.mlp = FeedForward(
            self.hidden, self.act, self.activation_dropout, self.init_with, self.dtype, self.axis_name
        )
        self.mlp_norm = LayerNorm(self.epsilon, self.dtype)
        self.drop = Dropout(self.dropout, self.axis_name)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "#b #h #l l"] | None = None,
        context: Float[Array, "b s e"] | None = None,
        context_mask: Bool[Array, "#b #h #l s"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b l d"], Kept]:
        """The whole sequence. mask: of the self attention, besides `causal`. context: for cross attention.

        Raises MmjaxError if a context is given to a block without cross attention, or none to one with it.
        """
        if self.cross != (context is not None):
            raise MmjaxError(f"a block with cross={self.cross} was given {'no' if self.cross else 'a'} context")
        y, own = self.attention(self._before(self.attention_norm, x), None, mask, train)
        x = self._after(self.attention_norm, x + self.drop(y, train))
        seen = None
        if self.cross:
            y, seen = self.cross_attention(self._before(self.cross_attention_norm, x), context, context_mask, train)
            x = self._after(self.cross_attention_norm, x + self.drop(y, train))
        y = self.mlp(self._before(self.mlp_norm, x), train)
        return self._after(self.mlp_norm, x + self.drop(y, train)), Kept(own, seen)

    def step(
        self,
        x: Float[Array, "b r d"],
        kept: Kept,
        new: KeyValues,
        index: Int[Array, ""],
        prompt_mask: Bool[Array, "b l"] | None = None,
        context_mask: Bool[Array, "b s"] | None = None,
    ) -> tuple[Float[Array, "b r d"], KeyValues]:
        """One token a row; returns `new` with its key and value in slot `index`.

        kept: of the prompt and the context, as the full pass gave it; once an item, for all its rows. The masks are of
        its keys, True = a token.
        """
        y, new = self.attention.step(self._before(self.attention_norm, x), kept.own, prompt_mask, new, index)
        x = self._after(self.attention_norm, x + y)
        if kept.cross is not None:
            query = self._before(self.cross_attention_norm, x)
            x = self._after(self.cross_attention_norm, x + self.cross_attention.look(query, kept.cross, context_mask))
        y = self.mlp(self._before(self.mlp_norm, x))
        return self._after(self.mlp_norm, x + y), new

    def _before(self, norm: LayerNorm, x: Array) -> Array:
        return norm(x) if self.norm_first else x

    def _after(self, norm: LayerNorm, x: Array) -> Array:
        return x if self.norm_first else norm(x)


class Stack(nn.Module):
    """Blocks one after the other: block_0, block_1, ... fields: what all share, as a dict of `Block`'s fields."""

    depth: int
    fields: dict[str, Any]

    def setup(self) -> None:
        self.block = [Block(**self.fields) for _ in range(self.depth)]

    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "#b #h #l l"] | None = None,
        context: Float[Array, "b s e"] | None = None,
        context_mask: Bool[Array, "#b #h #l s"] | None = None,
        train: bool = False,
    ) -> tuple[list[Float[Array, "b l d"]], list[Kept]]:
        """The input and the output of every block, and what each kept; XLA drops what is not used."""
        states, kept = [x], []
        for block in self.block:
            y, layer = block(states[-1], mask, context, context_mask, train)
            states.append(y)
            kept.append(layer)
        return states, kept

    def step(
        self,
        x: Float[Array, "b r d"],
        kept: Sequence[Kept],
        new: Sequence[KeyValues],
        index: Int[Array, ""],
        prompt_mask: Bool[Array, "b l"] | None = None,
        context_mask: Bool[Array, "b s"] | None = None,
    ) -> tuple[Float[Array, "b r d"], list[KeyValues]]:
        """One token a row through every block: see `Block.step`."""
        written = []
        for block, layer, rows in zip(self.block, kept, new, strict=True):
            x, rows = block.step(x, layer, rows, index, prompt_mask, context_mask)
            written.append(rows)
        return x, written
