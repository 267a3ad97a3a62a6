"""The block that the lineage's encoders and decoders share, and a stack of them.

A stack runs over whole sequences, and, as a decoder, one token at a time over the cache of such a pass.

Parameter paths within a `Stack`: block_{i}/norm_1, block_{i}/attention/{q,k,v,out}; with cross attention
block_{i}/cross_norm, block_{i}/cross_attention/{q,k,v,out} (to two contexts: {first,second}/{q,k,v,out}, merge);
block_{i}/norm_2, block_{i}/mlp/{up,down} (gated: {gate,up,down}); with a feed-forward for queries block_{i}/query_norm,
block_{i}/query_mlp/{up,down}; with layer scale block_{i}/{scale_1,cross_scale,scale_2}.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.nn.dropout import Dropout, DropPath
from mmjax.nn.kv_cache import KeyValues
from mmjax.nn.norm import LayerNorm
from mmjax.nn.remat import rematerialised
from mmjax.nn.transformer import NO_POSITIONS, Init, Mlp, MultiHeadAttention, PositionInputs
from mmjax.nn.twin_attention import TwinAttention
from mmjax.types import Array, Bool, Float, Int

Before: TypeAlias = Callable[[int, Array], Array]
"""(number of a block, the state before it) -> the block's input."""


class LayerCache(NamedTuple):
    """Keys and values of one layer after a full pass: of the sequence itself, and of the context (None where the layer
    does not attend to one). They depend on the prompt and the context alone: an item's beams share them."""

    prompt: KeyValues
    context: KeyValues | None = None


class Block(nn.Module):
    """Self attention, with `cross` attention to a context, and feed-forward, each around a residual with a norm.

    Its parts come from factory functions; `standard_block` has those of most systems.

    Attributes:
        make_norm, make_mlp: of each norm and feed-forward. make_attention: of the self attention, and with
            `causal=False` of the cross attention.
        cross: whether there is an attention to a context.
        merge: None: there is one context. Otherwise there are two, [b, 2, m, e], and two attentions (BLIP's NLVR2): a
            matrix merges their results (True), or their mean is used (False). Such a block has no `step`.
        query_feed_forward: the first tokens may be queries (BLIP-2's Q-Former). They have a norm and a feed-forward of
            their own, and they alone attend to the context.
        norm_first: x + f(norm(x)) (pre-norm), else norm(x + f(x)) (post-norm, as in BERT); a context is never normed.
        parallel: x + attention(norm_1(x)) + mlp(norm_2(x)) (GPT-NeoX).
        layer_scale: the initial value of a learned factor on each branch [d] (DINOv2); None: there is none.
        dropout: of each branch before it is added. drop_path: rate of stochastic depth.
        axis_name: the mapped axis that cuts the batch: an example's dropout depends on its index in the whole.
    """

    make_norm: Callable[[], nn.Module]
    make_attention: Callable[..., MultiHeadAttention]
    make_mlp: Callable[[], nn.Module]
    cross: bool = False
    merge: bool | None = None
    query_feed_forward: bool = False
    norm_first: bool = True
    parallel: bool = False
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    axis_name: str | None = None

    def setup(self) -> None:
        self.norm_1, self.attention = self.make_norm(), self.make_attention()
        if self.cross:
            make_cross = functools.partial(self.make_attention, causal=False)
            self.cross_norm = self.make_norm()
            self.cross_attention = make_cross() if self.merge is None else TwinAttention(make_cross, self.merge)
        self.norm_2, self.mlp = self.make_norm(), self.make_mlp()
        if self.query_feed_forward:
            self.query_norm, self.query_mlp = self.make_norm(), self.make_mlp()
        if self.layer_scale is not None:
            names = ("scale_1", "cross_scale", "scale_2") if self.cross else ("scale_1", "scale_2")
            init, shape = nn.initializers.constant(self.layer_scale), (self.attention.width,)
            self.scales = {name: self.param(name, init, shape) for name in names}
        self.drop, self.depth_drop = Dropout(self.dropout, self.axis_name), DropPath(self.drop_path, self.axis_name)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "#b #h #l l"] | None = None,
        context: Float[Array, "contexts m e"] | Float[Array, "b 2 m e"] | None = None,
        context_mask: Bool[Array, "#b #h #l m"] | None = None,
        train: bool = False,
        queries: int = 0,
        positions: PositionInputs = NO_POSITIONS,
        context_index: Int[Array, "b"] | None = None,
        outputs: int | None = None,
    ) -> Float[Array, "b _ d"]:
        """See `prefill`."""
        return self.prefill(x, mask, context, context_mask, train, queries, positions, None, context_index, outputs)[0]

    def prefill(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "#b #h #l s"] | None = None,
        context: Float[Array, "contexts m e"] | Float[Array, "b 2 m e"] | None = None,
        context_mask: Bool[Array, "#b #h #l m"] | None = None,
        train: bool = False,
        queries: int = 0,
        positions: PositionInputs = NO_POSITIONS,
        past: LayerCache | None = None,
        context_index: Int[Array, "b"] | None = None,
        outputs: int | None = None,
    ) -> tuple[Float[Array, "b _ d"], LayerCache]:
        """The whole sequence. mask: of the self-attention, besides causality. queries: their number at the start.

        context: for cross attention; a block that has one skips it without a context (BLIP's text mode).
        past, context_index: see `MultiHeadAttention.prefill`; the first is of the tokens before x.
        outputs: the number of first tokens that the result has; the others serve as keys alone. None: all.
        Raises MmjaxError for a context, queries or outputs in a block without what they need.
        """
        if context is not None and not self.cross:
            raise MmjaxError("a block with cross=False was given a context")
        if queries and not self.query_feed_forward:
            raise MmjaxError(f"a block with query_feed_forward=False was given {queries} queries")
        if outputs is not None and (self.attention.causal or queries or positions != NO_POSITIONS):
            raise MmjaxError(f"outputs={outputs}: not of a causal block, of queries or of relative positions")
        past_prompt, normed = None if past is None else past.prompt, self._before(self.norm_1, x)
        x, first = x[:, :outputs], normed[:, :outputs]
        before = x
        y, prompt = self.attention.prefill(
            first, None if outputs is None else normed, mask, train, positions, past_prompt
        )
        x = self._joined(self.norm_1, x, y, "scale_1", train)
        if not self.query_feed_forward:
            x, context_cache = self._cross(x, context, context_mask, train, context_index)
            return self._feed_forward(x, before, self.norm_2, self.mlp, train), LayerCache(prompt, context_cache)
        parts = []
        if queries:
            first, _ = self._cross(x[:, :queries], context, context_mask, train, context_index)
            parts.append(self._feed_forward(first, before, self.query_norm, self.query_mlp, train))
        if queries < x.shape[1]:
            parts.append(self._feed_forward(x[:, queries:], before, self.norm_2, self.mlp, train))
        return jnp.concatenate(parts, axis=1), LayerCache(prompt)

    def step(
        self,
        x: Float[Array, "b r d"],
        cache: LayerCache,
        new: KeyValues,
        index: Int[Array, ""],
        prompt_mask: Bool[Array, "b l"] | None = None,
        context_mask: Bool[Array, "b m"] | None = None,
        positions: PositionInputs = NO_POSITIONS,
    ) -> tuple[Float[Array, "b r d"], KeyValues]:
        """One token a row; returns `new` with its key and value in slot `index`.

        cache: of the prompt and the context, as the full pass returned it; once an item, for all its rows. The masks
        are of its keys, True = a token.
        """
        before, normed = x, self._before(self.norm_1, x)
        y, new = self.attention.step(normed, cache.prompt, prompt_mask, new, index, positions)
        x = self._joined(self.norm_1, x, y, "scale_1")
        if cache.context is not None:
            y = self.cross_attention.cross_step(self._before(self.cross_norm, x), cache.context, context_mask)
            x = self._joined(self.cross_norm, x, y, "cross_scale")
        return self._feed_forward(x, before, self.norm_2, self.mlp), new

    def _cross(
        self, x: Array, context: Array | None, mask: Array | None, train: bool, index: Array | None
    ) -> tuple[Array, KeyValues | None]:
        if context is None:
            return x, None
        # Attention to two contexts has no index.
        options: Any = {} if index is None else {"context_index": index}
        y, cache = self.cross_attention.prefill(self._before(self.cross_norm, x), context, mask, train, **options)
        return self._joined(self.cross_norm, x, y, "cross_scale", train), cache

    def _feed_forward(self, x: Array, before: Array, norm: Any, mlp: Any, train: bool = False) -> Array:
        """before: the block's input, which a parallel block reads here too."""
        y = mlp(self._before(norm, before if self.parallel else x), train)
        return self._joined(norm, x, y, "scale_2", train)

    def _before(self, norm: Any, x: Array) -> Array:
        return norm(x) if self.norm_first else x

    def _joined(self, norm: Any, x: Array, y: Array, scale: str, train: bool = False) -> Array:
        """The residual: x and its branch y."""
        y = self.drop(y, train)
        if self.layer_scale is not None:
            y = y * self.scales[scale].astype(y.dtype)
        x = x + self.depth_drop(y, train)
        return x if self.norm_first else norm(x)


def standard_block(
    width: int,
    heads: int,
    hidden: int,
    act: str = "gelu",
    gated: bool = False,
    causal: bool = False,
    epsilon: float = 1e-6,
    attention_dropout: float = 0.0,
    activation_dropout: float = 0.0,
    init_with: Init | None = None,
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    key_bias: bool = True,
    **fields: Any,
) -> Block:
    """A `Block` with layer norms, as many heads of keys as of queries, and biases everywhere, but with `key_bias=False`
    of keys: ViT, BERT, CLIP.

    hidden: the feed-forward's middle. attention_dropout, activation_dropout: of the attention's weights, and after the
    feed-forward's activation. fields: of `Block`.
    """
    parts: dict[str, Any] = {"init_with": init_with or Init(), "dtype": dtype, "axis_name": axis_name}
    norm = functools.partial(LayerNorm, epsilon, dtype)
    attention = functools.partial(
        MultiHeadAttention, heads, width, causal=causal, dropout=attention_dropout, key_bias=key_bias, **parts
    )
    mlp = functools.partial(Mlp, hidden, act, gated, activation_dropout, **parts)
    return Block(norm, attention, mlp, axis_name=axis_name, **fields)


class Stack(nn.Module):
    """Blocks one after the other: block_0, block_1, ...; unrolled, not scanned (on CPU a scan copies every weight).

    Attributes:
        make_block: makes a `Block` with the fields cross, drop_path, name.
        cross_from: the first block with cross attention; of those after it every `cross_every`-th has it too. None:
            there is none.
        merge_from: each cross attention is to two contexts; from this block on a matrix merges the two results, before
            it their mean is used. None: there is one context. See `Block`.
        drop_path: of the last block; from the first it rises linearly from 0.
        remat: a block's activations are computed again in the backward pass instead of being stored.

    before(i, x): each way through takes such a function, which makes the input of block i out of the state before it:
    layers of a sibling between those of a stack whose parameters stay as they are (Flamingo).
    """

    depth: int
    make_block: Callable[..., Block]
    cross_from: int | None = None
    drop_path: float = 0.0
    remat: bool = False
    cross_every: int = 1
    merge_from: int | None = None

    def setup(self) -> None:
        last = max(self.depth - 1, 1)
        crossed = () if self.cross_from is None else range(self.cross_from, self.depth, self.cross_every)
        self.blocks = [
            self.make_block(
                cross=i in crossed,
                drop_path=self.drop_path * i / last,
                name=f"block_{i}",
                **({} if self.merge_from is None else {"merge": i >= self.merge_from}),
            )
            for i in range(self.depth)
        ]

    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "#b #h #l l"] | None = None,
        context: Float[Array, "contexts m e"] | Float[Array, "b 2 m e"] | None = None,
        context_mask: Bool[Array, "#b #h #l m"] | None = None,
        train: bool = False,
        first: int = 0,
        last: int | None = None,
        queries: int = 0,
        positions: PositionInputs = NO_POSITIONS,
        before: Before | None = None,
        context_index: Int[Array, "b"] | None = None,
        outputs: int | None = None,
    ) -> list[Float[Array, "b _ d"]]:
        """The input, and the output of every block: depth + 1 arrays; XLA stores what is used alone.

        context: of the blocks with cross attention, which skip it without one. first, last: of the blocks, those from
        `first` to before `last`, as a slice takes them. queries, context_index: see `Block.prefill`; outputs likewise,
        of the last of these blocks.
        """
        chosen = list(enumerate(self.blocks))[first:last]

        def run(
            outputs: int | None, block: Block, x: Array, mask: Any, context: Any, context_mask: Any, *rest: Any
        ) -> Array:
            return block(x, mask, context, context_mask, train, queries, *rest, outputs=outputs)

        states = [x]
        for i, block in chosen:
            x = states[-1] if before is None else before(i, states[-1])
            context_inputs = (context, context_mask) if block.cross else (None, None)
            inputs: Any = (x, mask, *context_inputs, positions, context_index)
            one = functools.partial(run, outputs if i == chosen[-1][0] else None)
            states.append(rematerialised(one, block, *inputs) if self.remat else one(block, *inputs))
        return states

    def prefill(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "#b #h #l s"] | None = None,
        context: Float[Array, "contexts m e"] | Float[Array, "b 2 m e"] | None = None,
        context_mask: Bool[Array, "#b #h #l m"] | None = None,
        positions: PositionInputs = NO_POSITIONS,
        past: Sequence[LayerCache] | None = None,
        before: Before | None = None,
        train: bool = False,
        queries: int = 0,
    ) -> tuple[Float[Array, "b l d"], list[LayerCache]]:
        """The last block's output, and each block's keys and values. past: those of the tokens before x.

        Gradients flow through what is cached, so that tokens can be trained on those of an earlier pass (BLIP-2).
        """

        def run(
            block: Block, x: Array, mask: Any, context: Any, context_mask: Any, positions: Any, past: Any
        ) -> tuple[Array, LayerCache]:
            return block.prefill(x, mask, context, context_mask, train, queries, positions, past)

        caches = []
        for i, block in enumerate(self.blocks):
            x = x if before is None else before(i, x)
            context_inputs = (context, context_mask) if block.cross else (None, None)
            inputs: Any = (x, mask, *context_inputs, positions, None if past is None else past[i])
            x, cache = rematerialised(run, block, *inputs) if self.remat and train else run(block, *inputs)
            caches.append(cache)
        return x, caches

    def step(
        self,
        x: Float[Array, "b r d"],
        caches: Sequence[LayerCache],
        new: Sequence[KeyValues],
        index: Int[Array, ""],
        prompt_mask: Bool[Array, "b l"] | None = None,
        context_mask: Bool[Array, "b m"] | None = None,
        positions: PositionInputs = NO_POSITIONS,
        before: Before | None = None,
    ) -> tuple[Float[Array, "b r d"], list[KeyValues]]:
        """One token a row through every block: see `Block.step`."""
        written = []
        for i, (block, cache, slots) in enumerate(zip(self.blocks, caches, new, strict=True)):
            x = x if before is None else before(i, x)
            x, slots = block.step(x, cache, slots, index, prompt_mask, context_mask, positions)
            written.append(slots)
        return x, written
