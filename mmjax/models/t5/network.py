"""T5 (arXiv 1910.10683; transformers modeling_t5.py), T5 1.1 and Flan-T5.

Parameter paths: embedding, head (where it is not the embedding), and of `encoder` and `decoder`: bias/table, block_{i}
as in `mmjax.nn.stack`, norm. There are no biases but those of positions.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.generation.decodable import DecodeState
from mmjax.nn import int8, kv_cache
from mmjax.nn.dropout import Dropout
from mmjax.nn.kv_cache import KeyValues
from mmjax.nn.masks import padding_mask
from mmjax.nn.norm import RMSNorm
from mmjax.nn.relative_positions import RelativeBias
from mmjax.nn.stack import Block, LayerCache, Stack
from mmjax.nn.transformer import Init, Mlp, MultiHeadAttention, PositionInputs
from mmjax.types import Array, Bool, Float, Int, Params

normal = nn.initializers.normal


@dataclass(frozen=True)
class T5Config:
    """Class methods give the published sizes (parameter counts: tests/models/test_t5.py).

    Attributes:
        depth, decoder_depth: blocks of the two stacks; decoder_depth 0: an encoder alone.
        head_width: of a head; heads * head_width need not be the width (384 against 512 in flan-t5-small).
        hidden: width of the feed-forward. gated: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
        act: "relu" in T5, "gelu_tanh" in 1.1 and Flan; BLIP-2 uses the erf "gelu" instead.
        tied: the head is the embedding. scaled: the decoder's output times width^-0.5 before it. Both in T5, neither in
            1.1 and Flan.
        buckets, max_distance: of relative positions.
        pad, start: ids; `start` is the decoder's first input. eos: ids that end a text.
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


class T5Stack(nn.Module):
    """Blocks that share one bias of positions, and a last norm.

    Scores are not scaled: the initial queries are small instead.
    """

    config: T5Config
    decoder: bool
    axis_name: str | None = None

    def setup(self) -> None:
        c, inner = self.config, self.config.heads * self.config.head_width
        narrow = normal(c.width**-0.5)
        queries = normal((c.width * c.head_width) ** -0.5)
        init = Init(narrow, normal(inner**-0.5), narrow, normal(c.hidden**-0.5), q=queries)
        common: dict[str, Any] = {"dropout": c.dropout, "axis_name": self.axis_name}
        parts: dict[str, Any] = {"init_with": init, "dtype": c.dtype, **common}
        norm = functools.partial(RMSNorm, c.epsilon, c.dtype)
        attention = functools.partial(
            MultiHeadAttention,
            c.heads,
            c.width,
            inner,
            causal=self.decoder,
            qkv_bias=False,
            out_bias=False,
            scale=1.0,
            **parts,
        )
        mlp = functools.partial(Mlp, c.hidden, c.act, c.gated, use_bias=False, **parts)
        depth, cross_from = (c.decoder_depth, 0) if self.decoder else (c.depth, None)
        self.stack = Stack(depth, functools.partial(Block, norm, attention, mlp, **common), cross_from, remat=c.remat)
        nn.share_scope(self, self.stack)  # block_{i} are beside the bias
        self.bias = RelativeBias(c.heads, not self.decoder, c.buckets, c.max_distance, narrow)
        self.norm = RMSNorm(c.epsilon, c.dtype)
        self.dropout = Dropout(c.dropout, self.axis_name)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Int[Array, "b l"] | None = None,
        context: Float[Array, "b s d"] | None = None,
        context_mask: Int[Array, "b s"] | None = None,
        train: bool = False,
    ) -> list[Float[Array, "b l d"]]:
        """The input of every block, and the last one's output after the norm: depth + 1 arrays."""
        mask, context_mask = (None if m is None else padding_mask(m) for m in (mask, context_mask))
        positions = self._positions(x.shape[1])
        states = self.stack(self.dropout(x, train), mask, context, context_mask, train, positions=positions)
        return [*states[:-1], self.dropout(self.norm(states[-1]), train)]

    def prefill(
        self, x: Float[Array, "b p d"], context: Float[Array, "b s d"], context_mask: Bool[Array, "b s"]
    ) -> tuple[Float[Array, "b d"], list[LayerCache]]:
        """The last token's state, and the keys and values of all of them."""
        positions = self._positions(x.shape[1])
        x, caches = self.stack.prefill(x, None, context, padding_mask(context_mask), positions)
        return self.norm(x[:, -1]), caches

    def step(
        self,
        x: Float[Array, "b r d"],
        caches: Sequence[LayerCache],
        new: Sequence[KeyValues],
        index: Int[Array, ""],
        context_mask: Bool[Array, "b s"],
    ) -> tuple[Float[Array, "b r d"], list[KeyValues]]:
        """The next token of each row: see `Stack.step`."""
        prompt, capacity = caches[0].prompt.k.shape[2], new[0].k.shape[1]
        bias = self.bias((prompt + index)[None], jnp.arange(prompt + capacity))
        x, new = self.stack.step(x, caches, new, index, None, context_mask, PositionInputs(bias=bias))
        return self.norm(x), new

    def _positions(self, length: int) -> PositionInputs:
        return PositionInputs(bias=self.bias(jnp.arange(length), jnp.arange(length)))


class T5(nn.Module):
    """Ids -> logits. axis_name: the mapped axis that cuts the batch, for dropout."""

    config: T5Config
    axis_name: str | None = None

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", normal(1.0), (c.vocab_size, c.width))
        self.encoder = T5Stack(c, False, self.axis_name)
        if c.decoder_depth:
            self.decoder = T5Stack(c, True, self.axis_name)
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
        """The encoder's states. Raises MmjaxError unless it gets exactly one of ids and embeds."""
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
        return self.decoder(self.embed(decoder_ids), None, context, attention_mask, train)

    def hidden(
        self,
        embeds: Float[Array, "b s d"],
        decoder_ids: Int[Array, "b l"],
        attention_mask: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b l d"]:
        """The input of the head's matrix, from embeddings of the encoder's tokens; see `output_layer`."""
        context = self.encode(None, attention_mask, embeds)[-1]
        return self._scaled(self.decode(decoder_ids, context, attention_mask)[-1])

    def logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        return int8.scores(self._scaled(x), self.embedding if self.config.tied else self.head)

    def _scaled(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        c = self.config
        return (x * c.width**-0.5 if c.scaled else x).astype(c.dtype)

    def prefill(self, inputs: Mapping[str, Array], rows: int, capacity: int) -> tuple[Float[Array, "b v"], DecodeState]:
        """See `mmjax.models.t5.decoding`."""
        c, mask = self.config, inputs.get("attention_mask")
        context = self.encode(inputs.get("input_ids"), mask, inputs.get("inputs_embeds"))[-1]
        b, s = context.shape[:2]
        mask = jnp.ones((b, s), bool) if mask is None else mask.astype(bool)
        prompt = inputs.get("decoder_input_ids", jnp.full((b, 1), c.start))
        x, caches = self.decoder.prefill(self.embed(prompt), context, mask)
        new = kv_cache.empty(b, rows, c.heads, capacity, c.head_width, jnp.dtype(c.dtype))
        state = DecodeState({"mask": mask, "caches": caches}, [new] * c.decoder_depth, jnp.int32(0))
        return self.logits(x), state

    def step(self, ids: Int[Array, "b r"], state: DecodeState) -> tuple[Float[Array, "b r v"], DecodeState]:
        items, index = state.items, state.index
        x, new = self.decoder.step(self.embed(ids), items["caches"], state.rows, index, items["mask"])
        return self.logits(x), DecodeState(items, new, index + 1)


def output_layer(params: Params, config: T5Config) -> dict[str, Any]:
    """The arguments of `linear_cross_entropy` that turn the result of `T5.hidden` into logits."""
    return {"kernel": params["embedding" if config.tied else "head"], "tied": True}
