"""The Transformer (arXiv 1706.03762) and its forms in torch.nn.Transformer and Marian, as one configurable network.

what                     paper          torch.nn.Transformer      Marian
embeddings               one for all    three tables             one for all, or two (softmax tied)
norms after the stacks   none           two                       none
positions                interleaved    by hand (interleaved)     concatenated
bias of the logits       none           the generator's           final_logits_bias, not trained
look-up of the pad id    an ordinary    an ordinary               gets no gradient
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.generation.decodable import DecodeState
from mmjax.nn import kv_cache, sinusoids
from mmjax.nn.dropout import Dropout
from mmjax.nn.kv_cache import KeyValues
from mmjax.nn.masks import padding_mask
from mmjax.nn.norm import LayerNorm
from mmjax.nn.stack import Block, LayerCache, Stack, standard_block
from mmjax.nn.transformer import XAVIER, Init
from mmjax.types import Array, Bool, Float, Int

EPSILON = 1e-5


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and variants. The defaults are the paper's base model; `base` and `big` are its two.

    Attributes:
        vocab_size: of the source, and of the target where `target_vocab_size` is None.
        shared_embeddings: source and target look up one matrix. tied_output: the logits are products with the target's.
        output_bias: of the logits.
        scale_embedding: embeddings are multiplied by sqrt(width) when looked up (not as the output's matrix).
        positions: see `mmjax.nn.sinusoids`.
        max_length: of either sequence; None: any.
        act: of the feed-forward: "relu", "silu" (Marian's swish), "gelu".
        norm_first: pre-norm blocks. final_norm: a norm after each stack.
        fixed_pad: look-ups of `pad` give its row no gradient (torch's padding_idx).
        dropout: of branches and of the embedded tokens. attention_dropout, activation_dropout: see `Block`.
        pad, eos, start: ids; the decoder begins with `start`, which may be `pad` (Marian).
        forced_eos: a text of greatest length ends with `eos` all the same (Marian).
        dtype: compute dtype; norms' statistics, softmax and logits are float32.
    """

    vocab_size: int = 37000
    target_vocab_size: int | None = None
    width: int = 512
    encoder_depth: int = 6
    decoder_depth: int = 6
    encoder_heads: int = 8
    decoder_heads: int = 8
    encoder_hidden: int = 2048
    decoder_hidden: int = 2048
    shared_embeddings: bool = True
    tied_output: bool = True
    output_bias: bool = False
    scale_embedding: bool = True
    positions: sinusoids.Layout = "interleaved"
    max_length: int | None = None
    act: str = "relu"
    norm_first: bool = False
    final_norm: bool = False
    fixed_pad: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    pad: int = 0
    eos: int = 2
    start: int = 1
    forced_eos: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises MmjaxError for one matrix of two sizes."""
        if self.shared_embeddings and self.outputs != self.vocab_size:
            raise MmjaxError(f"shared_embeddings with vocabularies of {self.vocab_size} and {self.target_vocab_size}")

    @property
    def outputs(self) -> int:
        """Size of the target's vocabulary."""
        return self.vocab_size if self.target_vocab_size is None else self.target_vocab_size

    @classmethod
    def base(cls, **fields: Any) -> Self:
        """Table 3 of the paper."""
        return cls(**fields)

    @classmethod
    def big(cls, **fields: Any) -> Self:
        """Its dropout is that of English-German; English-French has 0.1."""
        sizes = {"width": 1024, "encoder_heads": 16, "decoder_heads": 16}
        sizes |= {"encoder_hidden": 4096, "decoder_hidden": 4096}
        return cls(**{**sizes, "dropout": 0.3, **fields})

    @classmethod
    def small(cls, vocab_size: int, width: int, depth: int, heads: int, **fields: Any) -> Self:
        """The paper's form at any size: both stacks alike, feed-forwards four times as wide."""
        depths = {"encoder_depth": depth, "decoder_depth": depth}
        heads_hidden = {"encoder_heads": heads, "decoder_heads": heads}
        heads_hidden |= {"encoder_hidden": 4 * width, "decoder_hidden": 4 * width}
        return cls(**{"vocab_size": vocab_size, "width": width, **depths, **heads_hidden, **fields})


class Transformer(nn.Module):
    """Params: embedding [v, d] (or source_embedding, target_embedding), encoder, decoder, and as the config has them
    encoder_norm, decoder_norm, output_kernel [d, v], output_bias [v]."""

    config: TransformerConfig
    axis_name: str | None = None

    def setup(self) -> None:
        c, initializer = self.config, nn.initializers.normal(self.config.width**-0.5)
        if c.shared_embeddings:
            self.embedding = self.param("embedding", initializer, (c.vocab_size, c.width))
        else:
            self.source_embedding = self.param("source_embedding", initializer, (c.vocab_size, c.width))
            self.target_embedding = self.param("target_embedding", initializer, (c.outputs, c.width))
        self.encoder = Stack(c.encoder_depth, self._block(c.encoder_heads, c.encoder_hidden, decoder=False))
        self.decoder = Stack(c.decoder_depth, self._block(c.decoder_heads, c.decoder_hidden, decoder=True), 0)
        if c.final_norm:
            self.encoder_norm, self.decoder_norm = (LayerNorm(EPSILON, jnp.dtype(c.dtype)) for _ in range(2))
        if not c.tied_output:
            self.output_kernel = self.param("output_kernel", XAVIER, (c.width, c.outputs))
        if c.output_bias:
            self.output_bias = self.param("output_bias", nn.initializers.zeros, (c.outputs,))
        self.drop = Dropout(c.dropout, self.axis_name)

    def _block(self, heads: int, hidden: int, decoder: bool) -> Callable[..., Block]:
        c, zeros = self.config, nn.initializers.zeros
        # torch draws q, k and v as one matrix of three times the width, whence the half of Xavier's variance.
        init = Init(qkv=nn.initializers.variance_scaling(0.5, "fan_in", "uniform"), mlp_bias=zeros)
        return functools.partial(
            standard_block,
            c.width,
            heads,
            hidden,
            c.act,
            causal=decoder,
            epsilon=EPSILON,
            attention_dropout=c.attention_dropout,
            activation_dropout=c.activation_dropout,
            init_with=init,
            dtype=jnp.dtype(c.dtype),
            axis_name=self.axis_name,
            norm_first=c.norm_first,
            dropout=c.dropout,
        )

    def __call__(
        self,
        ids: Int[Array, "b s"],
        decoder_ids: Int[Array, "b l"],
        mask: Bool[Array, "b s"] | None = None,
        decoder_mask: Bool[Array, "b l"] | None = None,
        train: bool = False,
    ) -> dict[str, Any]:
        """All outputs, for training: those of `encode` and `decode`, and "memory", the encoder's output."""
        memory, states = self.encode(ids, mask, train)
        return self.decode(decoder_ids, memory, mask, decoder_mask, train) | {
            "memory": memory,
            "encoder_states": states,
        }

    def encode(
        self, ids: Int[Array, "b s"], mask: Bool[Array, "b s"] | None = None, train: bool = False
    ) -> tuple[Float[Array, "b s d"], list[Float[Array, "b s d"]]]:
        """The encoder's result, and the states before and after each of its blocks. mask: True = a token."""
        x = self._embedded(ids, self._tables[0], train)
        states = self.encoder(x, None if mask is None else padding_mask(mask), train=train)
        return (self.encoder_norm(states[-1]) if self.config.final_norm else states[-1]), states

    def decode(
        self,
        ids: Int[Array, "b l"],
        memory: Float[Array, "b s d"],
        memory_mask: Bool[Array, "b s"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
        train: bool = False,
    ) -> dict[str, Any]:
        """{"logits": float32 [b, l, v], "last": the states that they are of, "decoder_states": before and after each
        block}."""
        x = self._embedded(ids, self._tables[1], train)
        mask, memory_mask = (None if m is None else padding_mask(m) for m in (mask, memory_mask))
        states = self.decoder(x, mask, memory, memory_mask, train)
        last = self.decoder_norm(states[-1]) if self.config.final_norm else states[-1]
        return {"logits": self._logits(last), "last": last, "decoder_states": states}

    def prefill(
        self, ids: Int[Array, "b s"], start: Int[Array, "b l"], mask: Bool[Array, "b s"]
    ) -> tuple[Float[Array, "b v"], list[LayerCache]]:
        """The logits after the decoder's first tokens, and the keys and values that `step` continues from.

        ids, mask: of the encoder.
        """
        memory, _ = self.encode(ids, mask)
        x = self._embedded(start, self._tables[1], False)
        x, caches = self.decoder.prefill(x, None, memory, padding_mask(mask))
        return self._logits(self.decoder_norm(x[:, -1]) if self.config.final_norm else x[:, -1]), caches

    def step(
        self,
        ids: Int[Array, "b r"],
        caches: list[LayerCache],
        new: list[KeyValues],
        index: Int[Array, ""],
        memory_mask: Bool[Array, "b s"] | None = None,
    ) -> tuple[Float[Array, "b r v"], list[KeyValues]]:
        """The logits after one more token a row, and the rows' keys and values with it."""
        prompt, capacity = caches[0].prompt.k.shape[2], new[0].k.shape[1]
        position = jax.lax.dynamic_slice_in_dim(self._positions(prompt + capacity), prompt + index, 1)
        x = self._lookup(ids, self._tables[1]) + position
        x, new = self.decoder.step(x, caches, new, index, context_mask=memory_mask)
        return self._logits(self.decoder_norm(x) if self.config.final_norm else x), new

    # ---------------------------------------------------------------------------------------------------------- tokens

    @property
    def _tables(self) -> tuple[Array, Array]:
        """The matrices of the source and of the target."""
        if self.config.shared_embeddings:
            return self.embedding, self.embedding
        return self.source_embedding, self.target_embedding

    def _lookup(self, ids: Int[Array, "b l"], table: Float[Array, "v d"]) -> Float[Array, "b l d"]:
        c, rows = self.config, table[ids]
        if c.fixed_pad:
            rows = jnp.where((ids == c.pad)[..., None], jax.lax.stop_gradient(rows), rows)
        return (rows * (c.width**0.5 if c.scale_embedding else 1.0)).astype(jnp.dtype(c.dtype))

    def _embedded(self, ids: Int[Array, "b l"], table: Float[Array, "v d"], train: bool) -> Float[Array, "b l d"]:
        return self.drop(self._lookup(ids, table) + self._positions(ids.shape[1]), train)

    def _positions(self, length: int) -> Float[Array, "l d"]:
        """Raises MmjaxError past `max_length`."""
        c = self.config
        if c.max_length is not None and length > c.max_length:
            raise MmjaxError(f"{length} tokens are more than max_length={c.max_length}")
        return jnp.asarray(sinusoids.sinusoids(length, c.width, c.positions), jnp.dtype(c.dtype))

    def _logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        kernel = self._tables[1].T if self.config.tied_output else self.output_kernel
        logits = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        return logits + self.output_bias.astype(jnp.float32) if self.config.output_bias else logits


@dataclass(frozen=True)
class TransformerDecodable:
    """A `mmjax.generation.decodable.Decodable`. Inputs: input_ids [b, s]; attention_mask [b, s], if anything is padded;
    decoder_input_ids [b, l], unpadded, if the decoder begins with more than its start token."""

    config: TransformerConfig

    def prefill(
        self, variables: Mapping[str, Any], inputs: Mapping[str, Array], rows: int, capacity: int
    ) -> tuple[Float[Array, "b v"], DecodeState]:
        """Encodes once an item, and keeps the cross attentions' keys and values beside those of the start.

        Raises MmjaxError if the start and `capacity` tokens are more than max_length.
        """
        c, ids = self.config, inputs["input_ids"]
        b = ids.shape[0]
        start = inputs.get("decoder_input_ids", jnp.full((b, 1), c.start, ids.dtype))
        mask = inputs.get("attention_mask", jnp.ones_like(ids)).astype(bool)
        longest = start.shape[1] + capacity
        if c.max_length is not None and longest > c.max_length:
            raise MmjaxError(f"{longest} tokens, {capacity} of them new, are more than max_length={c.max_length}")
        out: Any = Transformer(c).apply(variables, ids, start, mask, method="prefill")
        logits, caches = out
        heads, dtype = c.decoder_heads, jnp.dtype(c.dtype)
        new = [kv_cache.empty(b, rows, heads, capacity, c.width // heads, dtype) for _ in range(c.decoder_depth)]
        return logits, DecodeState({"caches": caches, "mask": mask}, new, jnp.zeros((), jnp.int32))

    def step(
        self, variables: Mapping[str, Any], ids: Int[Array, "b r"], state: DecodeState
    ) -> tuple[Float[Array, "b r v"], DecodeState]:
        caches, mask = state.items["caches"], state.items["mask"]
        result: Any = Transformer(self.config).apply(
            variables, ids, caches, state.rows, state.index, mask, method="step"
        )
        logits, rows = result
        return logits, DecodeState(state.items, rows, state.index + 1)
