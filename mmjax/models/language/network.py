"""The decoder of the language models: one stack for all families, see its config.

Its blocks are those of `mmjax.nn.stack`. They run in two ways with the same parameters: over a whole prompt, which
returns its keys and values, and one token at a time over cached ones (`mmjax.nn.kv_cache`).

Parameter paths: token_embedding [v, d]; position_embedding [positions, d] if learned; project_in, project_out
(OPT-350m); block_{i} as in `mmjax.nn.stack`; norm; head/{kernel [d, v], bias} unless it is tied; of added tokens
added_embedding [n, d] and added_head.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmjax.models.language.config import Alibi, DecoderConfig, Learned
from mmjax.nn import int8
from mmjax.nn.kv_cache import KeyValues
from mmjax.nn.masks import padding_mask
from mmjax.nn.norm import LayerNorm, RMSNorm
from mmjax.nn.rotary import Rotary
from mmjax.nn.stack import Before, Block, LayerCache, Stack
from mmjax.nn.transformer import Dense, Init, Mlp, MultiHeadAttention, PositionInputs
from mmjax.types import Array, Bool, Float, Int, Params

INIT = nn.initializers.normal(0.02)


def alibi_slopes(heads: int) -> np.ndarray:
    """float32 [h]: 2^(-8 i / n) of the next power of two n; where that is not `heads`, every other first."""
    power = 2 ** int(np.ceil(np.log2(heads)))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    if power != heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:heads]
    return slopes.astype(np.float32)


def token_positions(mask: Int[Array, "b s"] | Bool[Array, "b s"]) -> Int[Array, "b s"]:
    """Each token's position among the tokens of its row, from 0; of padding: of the token before, -1 at the start."""
    return jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1


def _norm(config: DecoderConfig) -> nn.Module:
    dtype = jnp.dtype(config.dtype)
    if config.norm == "rms":
        return RMSNorm(config.epsilon, dtype)
    return LayerNorm(config.epsilon, dtype, config.norm == "layer")


def _stack(c: DecoderConfig) -> Stack:
    norm, last = functools.partial(_norm, c), nn.initializers.normal(0.02 / (2 * c.depth) ** 0.5)
    init = Init(INIT, last, INIT, last, nn.initializers.zeros)
    common: dict[str, Any] = {"init_with": init, "dtype": jnp.dtype(c.dtype)}
    attention = functools.partial(
        MultiHeadAttention,
        c.heads,
        c.width,
        c.heads * c.head_width,
        causal=True,
        kv_heads=c.kv_heads,
        qkv_bias=c.qkv_bias,
        out_bias=c.out_bias,
        clip=c.clip_qkv,
        make_qk_norm=norm if c.qk_norm else None,
        **common,
    )
    mlp = functools.partial(Mlp, c.hidden, c.act, c.gated, use_bias=c.mlp_bias, **common)
    block = functools.partial(Block, norm, attention, mlp, norm_first=c.norm_first, parallel=c.parallel)
    return Stack(c.depth, block, remat=c.remat)


class Decoder(nn.Module):
    """Ids or embeddings -> next tokens' logits, in one pass or step by step.

    before(i, x): each way through takes such a function, which makes the input of block i out of the state before it
    (`mmjax.nn.stack.Stack`): layers of a sibling, while all parameters here stay where they are.
    """

    config: DecoderConfig

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        narrow = c.embed_width or c.width
        self.token_embedding = self.param("token_embedding", INIT, (c.vocab_size + c.unused_rows, narrow))
        if isinstance(c.positions, Learned):
            size = (c.context + c.positions.first, c.width)
            self.position_embedding = self.param("position_embedding", INIT, size)
        if c.embed_width is not None:
            self.project_in = Dense(c.width, False, dtype, INIT)
            self.project_out = Dense(c.embed_width, False, dtype, INIT)
        self.stack = _stack(c)
        nn.share_scope(self, self.stack)  # block_{i} are beside the embedding
        if c.final_norm:
            self.norm = _norm(c)
        if not c.tied:
            self.head = Dense(c.vocab_size + c.unused_rows, c.head_bias, dtype, INIT)
        if c.added_tokens:
            self.added_embedding = self.param("added_embedding", INIT, (c.added_tokens, narrow))
            if not c.tied:
                self.added_head = Dense(c.added_tokens, c.head_bias, dtype, INIT)

    # -------------------------------------------------------------------------------------------------- whole prompts

    def __call__(
        self,
        ids: Int[Array, "b l"] | None = None,
        mask: Int[Array, "b l"] | None = None,
        embeds: Float[Array, "b l d"] | None = None,
        before: Before | None = None,
    ) -> dict[str, Any]:
        """{"states": depth + 1 arrays [b, l, d], the last normed; "logits": float32 [b, l, v]}.

        mask: 1 = a token. No token attends to padding; as in transformers it takes part in the positions of learned and
        rotary positions, but for OPT's.
        """
        states = self._states(self.embed(jnp.asarray(ids)) if embeds is None else embeds, mask, before)
        return {"states": states, "logits": self.logits(states[-1])}

    def hidden(
        self,
        embeds: Float[Array, "b l d"],
        mask: Int[Array, "b l"] | None = None,
        before: Before | None = None,
    ) -> Float[Array, "b l e"]:
        """The input of the head's matrix; see `__call__`."""
        last = self._states(embeds, mask, before)[-1]
        return last if self.config.embed_width is None else self.project_out(last)

    def embed(self, ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        """Rows of the embedding, projected to the model's width."""
        c = self.config
        if c.added_tokens:
            x = int8.rows(self.token_embedding, jnp.minimum(ids, c.vocab_size - 1))
            added = self.added_embedding[jnp.maximum(ids - c.vocab_size, 0)]
            x = jnp.where((ids >= c.vocab_size)[..., None], added, x).astype(c.dtype)
        else:
            x = int8.rows(self.token_embedding, ids).astype(c.dtype)
        return x if self.config.embed_width is None else self.project_in(x)

    def prefill(
        self,
        x: Float[Array, "b l d"],
        mask: Int[Array, "b s"] | Bool[Array, "b s"],
        position_ids: Int[Array, "b s"],
        past: Sequence[LayerCache] | None = None,
        total_length: Int[Array, ""] | None = None,
        before: Before | None = None,
    ) -> tuple[Float[Array, "b l d"], list[LayerCache]]:
        """The normed states, and all keys and values. `past` is before x; mask and position_ids are of both.

        total_length: the length that the longest row will grow to; None: that of `mask`.
        """
        x, allowed, positions = self._inputs(x, mask, position_ids, total_length)
        x, caches = self.stack.prefill(x, allowed, positions=positions, past=past, before=before)
        return self._final(x), caches

    def logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """float32 logits of normed states."""
        if self.config.embed_width is not None:
            x = self.project_out(x)
        if self.config.tied:
            logits = int8.scores(x, self.token_embedding)
            added = int8.scores(x, self.added_embedding) if self.config.added_tokens else None
        else:
            logits, added = self.head(x), self.added_head(x) if self.config.added_tokens else None
        logits = logits[..., : self.config.vocab_size]
        return (logits if added is None else jnp.concatenate([logits, added], -1)).astype(jnp.float32)

    def _states(
        self, x: Float[Array, "b l d"], mask: Int[Array, "b l"] | None, before: Before | None
    ) -> list[Float[Array, "b l d"]]:
        valid = jnp.ones(x.shape[:2], jnp.int32) if mask is None else mask
        learned = self.config.positions
        counts = isinstance(learned, Learned) and learned.of_tokens
        if counts:  # padding has the row before the first token's (OPT: transformers modeling_opt.py)
            position_ids = jnp.where(valid.astype(bool), token_positions(valid), -1)
        else:
            position_ids = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        x, allowed, positions = self._inputs(x, valid, position_ids, None)
        states = self.stack(x, allowed, positions=positions, before=before)
        return [*states[:-1], self._final(states[-1])]

    # -------------------------------------------------------------------------------------------------- token by token

    def step(
        self,
        ids: Int[Array, "b r"],
        caches: Sequence[LayerCache],
        prompt_mask: Bool[Array, "b s"],
        prompt_positions: Int[Array, "b s"],
        new: Sequence[KeyValues],
        index: Int[Array, ""],
        before: Before | None = None,
    ) -> tuple[Float[Array, "b r v"], list[KeyValues]]:
        """(logits of the token after `ids`, `new` with these tokens' keys and values in slot `index`)."""
        capacity = new[0].k.shape[1]
        lengths = prompt_mask.sum(-1, dtype=jnp.int32)
        position_ids = jnp.broadcast_to((lengths + index)[:, None], ids.shape)
        slots = jnp.broadcast_to(lengths[:, None] + jnp.arange(capacity), (ids.shape[0], capacity))
        keys = jnp.concatenate([prompt_positions, slots], -1)
        x = self._add_learned(self.embed(ids), position_ids)
        positions = self._position_inputs(position_ids, keys, lengths.max() + capacity - 1)
        if self.config.window is not None:
            far = position_ids[:, :1] - keys >= self.config.window
            bias = jnp.where(far, jnp.finfo(jnp.float32).min, 0.0)[:, None, None]
            positions = positions._replace(bias=bias if positions.bias is None else positions.bias + bias)
        x, new = self.stack.step(x, caches, new, index, prompt_mask, positions=positions, before=before)
        return self.logits(self._final(x)), new

    # ------------------------------------------------------------------------------------------------------- the parts

    def _inputs(
        self, x: Array, mask: Array, position_ids: Int[Array, "b s"], total_length: Array | None
    ) -> tuple[Array, Array, PositionInputs]:
        """The first block's input, the mask besides causality, the position inputs. mask, position_ids: of all keys."""
        length, size = x.shape[1], mask.shape[1]
        new = position_ids[:, size - length :]
        allowed = padding_mask(mask)
        if self.config.window is not None:
            near = new[:, :, None] - position_ids[:, None, :] < self.config.window
            allowed = allowed & near[:, None]
        positions = self._position_inputs(new, position_ids, size if total_length is None else total_length)
        return self._add_learned(x, new), allowed, positions

    def _final(self, x: Array) -> Array:
        return self.norm(x) if self.config.final_norm else x

    def _add_learned(self, x: Float[Array, "b l d"], position_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Adds learned positions. Beyond the table's end its last row is taken, as nothing reads such a token."""
        if not isinstance(self.config.positions, Learned):
            return x
        rows = jnp.clip(position_ids + self.config.positions.first, 0, self.position_embedding.shape[0] - 1)
        return x + self.position_embedding[rows].astype(x.dtype)

    def _position_inputs(
        self, queries: Int[Array, "b l"], keys: Int[Array, "b s"], length: int | Int[Array, ""]
    ) -> PositionInputs:
        positions = self.config.positions
        if isinstance(positions, Rotary):
            return PositionInputs(rope=positions.rope(jnp.maximum(queries, 0), self.config.head_width, length))
        if isinstance(positions, Alibi):
            # The same for every query: softmax does not depend on a term common to all keys' scores.
            slopes = jnp.asarray(alibi_slopes(self.config.heads))
            return PositionInputs(bias=slopes[None, :, None, None] * keys[:, None, None, :].astype(jnp.float32))
        return PositionInputs()


def output_layer(params: Params, config: DecoderConfig) -> dict[str, Any]:
    """The arguments of `linear_cross_entropy` that turn the states of `Decoder.hidden` into logits."""
    v = config.vocab_size
    if config.tied:
        added = (params["added_embedding"], None) if config.added_tokens else None
        return {"kernel": _first(params["token_embedding"], v, 0), "tied": True, "added": added}
    heads = [(params[name]["kernel"], params[name].get("bias")) for name in ("head", "added_head") if name in params]
    kernel, bias = heads[0]
    layer = {"kernel": _first(kernel, v, 1), "bias": None if bias is None else bias[:v]}
    return layer | {"added": heads[1] if config.added_tokens else None}


def _first(matrix: int8.Matrix, count: int, axis: int) -> int8.Matrix:
    """The entries of the first ids, without the unused ones; an int8 matrix is two arrays."""
    return jax.tree.map(lambda array: jax.lax.slice_in_dim(array, 0, count, axis=axis), matrix)
