"""BERT's encoder and its heads (arXiv 1810.04805; google-research/bert modeling.py)."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.nn.activation import activation
from mmjax.nn.dropout import Dropout
from mmjax.nn.kv_cache import KeyValues
from mmjax.nn.masks import padding_mask
from mmjax.nn.norm import LayerNorm
from mmjax.nn.stack import LayerCache, Stack, standard_block
from mmjax.nn.transformer import Dense, Init, Initializer
from mmjax.types import Array, Bool, Float, Int

ZEROS = nn.initializers.zeros


@dataclass(frozen=True)
class BertConfig:
    """Sizes, and which heads stand on the encoder; class methods give the published sizes.

    Attributes:
        vocab_size: 0: there are queries alone, and no text: no table, no feed-forward but theirs (BLIP-2's stage 2).
        width, hidden: of the tokens and of the feed-forward.
        positions, types: rows of the tables of positions and of token types; types=0: there is no such table.
        act: "gelu" (erf) in Hugging Face's BERTs, "gelu_tanh" in Google's code: 5e-4 apart.
        dropout: after the embeddings, each attention, each feed-forward, and before a head of classes.
        attention_dropout: of the attention weights.
        pooler: tanh(W h + b) of the first token. the input of nsp and classes.
        mlm: the MLM head; its output matrix is the word embedding.
        nsp: the head for next sentences: class 0 if the second follows the first.
        classes: of whole texts. token_classes: of each token. 0: there is no such head.
        spans: the head for the first and last token of an answer.
        cross_from, cross_every: the first block with attention to a context (None: there is none); of those after it
            every `cross_every`-th has it too (ALBEF and BLIP: 1, BLIP-2: 2).
        merge_from: cross attention is to two contexts at once, [b, 2, s, e] (BLIP's NLVR2): a matrix merges the two
            results from this block on, before it their mean is used. None: there is one context.
        query_feed_forward: the first tokens may be queries, with feed-forwards of their own (BLIP-2's Q-Former).
        causal: a token attends to itself and to earlier ones: a decoder.
        pooling: of the last states to a text's vector (`BertModel.encode_text`): their mean, the first token's, or the
            maximum of each channel. sentence_length: the tokens of such a text, at most.
        init: of matrices and tables: "truncated" at twice `init_std` and not scaled up again, as in TensorFlow, so that
            their spread is 0.88 of it; or "normal", as in the PyTorch originals (Hugging Face, ALBEF, BLIP).
        init_std: Hugging Face's initializer_range. 0.02 is for hundreds of channels.
        remat: blocks are computed again in the backward pass.
        dtype: compute dtype; norms' statistics, softmax and logits are float32.
    """

    vocab_size: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    types: int = 2
    act: str = "gelu"
    epsilon: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    pooler: bool = True
    mlm: bool = False
    nsp: bool = False
    classes: int = 0
    token_classes: int = 0
    spans: bool = False
    cross_from: int | None = None
    cross_every: int = 1
    merge_from: int | None = None
    query_feed_forward: bool = False
    causal: bool = False
    pooling: Literal["mean", "cls", "max"] = "mean"
    sentence_length: int = 256
    init: Literal["truncated", "normal"] = "truncated"
    init_std: float = 0.02
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises MmjaxError for heads without their input, or two that public files keep under one name."""
        if (self.nsp or self.classes) and not self.pooler:
            raise MmjaxError(f"bert: nsp={self.nsp}, classes={self.classes} need the pooler, and pooler=False")
        if self.classes and self.token_classes:
            raise MmjaxError(f"bert: classes={self.classes} and token_classes={self.token_classes}: one of the two")
        if not self.vocab_size and (self.types or self.pooler or self.mlm or not self.query_feed_forward):
            raise MmjaxError(
                "bert: vocab_size=0: without text there are types=0, pooler=False, mlm=False, query_feed_forward=True; "
                f"it has {self.types}, {self.pooler}, {self.mlm}, {self.query_feed_forward}"
            )
        if self.merge_from is not None and (self.cross_from is None or self.causal):
            raise MmjaxError(
                f"bert: merge_from={self.merge_from}: two contexts are of an encoder with cross attention, and "
                f"cross_from={self.cross_from}, causal={self.causal}"
            )

    @property
    def initializer(self) -> Initializer:
        """The initializer of matrices and tables."""
        kinds = {"truncated": nn.initializers.truncated_normal, "normal": nn.initializers.normal}
        return kinds[self.init](self.init_std)

    @classmethod
    def _of(cls, fields: dict[str, Any], **size: Any) -> Self:
        return cls(**size | fields)

    @classmethod
    def base(cls, **fields: Any) -> Self:
        """BERT-Base uncased; vocab_size is 28996 for cased, 119547 for multilingual, 21128 for Chinese."""
        return cls(**fields)

    @classmethod
    def large(cls, **fields: Any) -> Self:
        return cls._of(fields, width=1024, depth=24, heads=16, hidden=4096)

    @classmethod
    def small(cls, depth: int, width: int, **fields: Any) -> Self:
        """One of the 24 of arXiv 1908.08962: depths 2 to 12, widths 128 to 768, heads 64 wide."""
        return cls._of(fields, width=width, depth=depth, heads=width // 64, hidden=4 * width)

    @classmethod
    def tiny(cls, **fields: Any) -> Self:
        return cls.small(2, 128, **fields)

    @classmethod
    def minilm(cls, depth: int = 6, **fields: Any) -> Self:
        """MiniLM-L6-H384 (all-MiniLM-L6-v2) and L12: heads 32 wide."""
        return cls._of(fields, width=384, depth=depth, hidden=1536)


class Embeddings(nn.Module):
    """Word + type + position, a norm, dropout. Params: words [v, d], positions [p, d], types [t, d], norm."""

    config: BertConfig
    axis_name: str | None = None

    def setup(self) -> None:
        c = self.config
        if c.vocab_size:
            self.words = self.param("words", c.initializer, (c.vocab_size, c.width))
            self.positions = self.param("positions", c.initializer, (c.positions, c.width))
        if c.types:
            self.types = self.param("types", c.initializer, (c.types, c.width))
        self.norm = LayerNorm(c.epsilon, jnp.dtype(c.dtype))
        self.dropout = Dropout(c.dropout, self.axis_name)

    def __call__(
        self,
        ids: Int[Array, "b l"] | None = None,
        types: Int[Array, "b l"] | None = None,
        train: bool = False,
        inputs_embeds: Float[Array, "b l d"] | None = None,
        queries: Float[Array, "b n d"] | None = None,
        position_ids: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b n_l d"]:
        """types: None means zeros. position_ids: None: 0, 1, ..., padding included.

        inputs_embeds: instead of the rows of `words`. queries: come before the tokens, without position or type; then
        there may be no token. Raises MmjaxError for more tokens than positions.
        """
        x = self.words[ids] if ids is not None else inputs_embeds
        if x is not None:
            x = self._add_types_and_positions(x, types, position_ids)
        parts = [part for part in (queries, x) if part is not None]
        return self.dropout(self.norm(jnp.concatenate(parts, axis=1)), train)

    def _add_types_and_positions(
        self, x: Float[Array, "b l d"], types: Array | None, position_ids: Array | None
    ) -> Float[Array, "b l d"]:
        c, length = self.config, x.shape[1]
        if length > c.positions:
            raise MmjaxError(f"texts of {length} tokens are longer than positions={c.positions}")
        if c.types:
            x = x + (self.types[0] if types is None else self.types[types])
        return x + (self.positions[:length] if position_ids is None else self.positions[position_ids])

    def logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """x E^T, float32: the words as an output matrix."""
        words = self.words.astype(x.dtype)
        return jnp.einsum("...d,vd->...v", x, words, preferred_element_type=jnp.float32)


def _mask(mask: Array | None) -> Array | None:
    """The mask in the form that blocks take."""
    return mask if mask is None or mask.ndim == 4 else padding_mask(mask)


class Transform(nn.Module):
    """The MLM head before its output matrix: norm(act(W x + b)). Params: dense, norm."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x = activation(c.act)(Dense(c.width, dtype=dtype, kernel_init=c.initializer, name="dense")(x))
        return LayerNorm(c.epsilon, dtype, name="norm")(x)


class Bert(nn.Module):
    """Params: embeddings, encoder/block_{i}, and as configured pooler, mlm_transform, mlm_bias [v], nsp, classifier,
    token_classifier, spans.

    axis_name: the mapped axis that cuts the batch, for dropout.
    """

    config: BertConfig
    axis_name: str | None = None

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        dense = functools.partial(Dense, kernel_init=c.initializer)
        self.embeddings = Embeddings(c, self.axis_name)
        block = functools.partial(
            standard_block,
            c.width,
            c.heads,
            c.hidden,
            c.act,
            causal=c.causal,
            epsilon=c.epsilon,
            attention_dropout=c.attention_dropout,
            init_with=Init(c.initializer, c.initializer, c.initializer, c.initializer, ZEROS),
            dtype=dtype,
            axis_name=self.axis_name,
            query_feed_forward=c.query_feed_forward,
            norm_first=False,
            dropout=c.dropout,
        )
        crossing: dict[str, Any] = {"cross_every": c.cross_every, "merge_from": c.merge_from}
        self.encoder = Stack(c.depth, block, c.cross_from, remat=c.remat, **crossing)
        if c.pooler:
            self.pooler = dense(c.width, dtype=dtype)
        if c.mlm:
            self.mlm_transform = Transform(c)
            self.mlm_bias = self.param("mlm_bias", ZEROS, (c.vocab_size,))
        if c.nsp:
            self.nsp = dense(2)
        if c.classes:
            self.classifier = dense(c.classes)
        if c.token_classes:
            self.token_classifier = dense(c.token_classes)
        if c.spans:
            self.spans = dense(2)
        self.drop = Dropout(c.dropout, self.axis_name)

    def __call__(
        self,
        ids: Int[Array, "b l"],
        attention_mask: Int[Array, "b l"] | None = None,
        token_types: Int[Array, "b l"] | None = None,
        masked_positions: Int[Array, "b m"] | None = None,
        train: bool = False,
    ) -> dict[str, Any]:
        """All outputs of the network and its heads; logits are float32.

        attention_mask: 1 = a token, 0 = padding; None: all are tokens. token_types: None means zeros.
        masked_positions: the positions that "mlm_logits" are of; None: all of them.
        train: with dropout, which needs the rng "dropout".

        Returns "states": depth + 1 arrays [b, l, d], the embeddings first; "pooled" [b, d]; "mlm_logits" [b, l, v] or
        [b, m, v]; "nsp_logits" [b, 2]; "logits" [b, c]; "token_logits" [b, l, c]; "span_logits" [b, l, 2].
        """
        c = self.config
        states = self.run(self.embeddings(ids, token_types, train), attention_mask, train=train)
        outputs: dict[str, Any] = {"states": states}
        if c.pooler:
            outputs["pooled"] = jnp.tanh(self.pooler(states[-1][:, 0]))
        if c.mlm:
            outputs["mlm_logits"] = self.mlm_logits(states[-1], masked_positions)
        return outputs | self._classes(states[-1], outputs.get("pooled"), train)

    def run(
        self,
        x: Float[Array, "b l d"],
        attention_mask: Int[Array, "b l"] | Bool[Array, "#b 1 l l"] | None = None,
        context: Float[Array, "b m e"] | Float[Array, "b 2 m e"] | None = None,
        context_mask: Int[Array, "b m"] | None = None,
        train: bool = False,
        first: int = 0,
        last: int | None = None,
        queries: int = 0,
        context_index: Int[Array, "b"] | None = None,
        outputs: int | None = None,
    ) -> list[Float[Array, "b l d"]]:
        """Blocks `first` to before `last` over states, the embeddings' at first: the input, and each block's output.

        attention_mask: 1 = a token, or who may attend to whom [b, 1, l, l], True = may (`mmjax.nn.masks`).
        context: of cross attention, which is skipped without one; context_mask: of its tokens, 1 = a token.
        queries: the number of first tokens that are queries.
        context_index, outputs: see `Stack`.
        """
        masks = (_mask(attention_mask), _mask(context_mask))
        options: dict[str, Any] = {"context_index": context_index, "outputs": outputs}
        return self.encoder(x, masks[0], context, masks[1], train, first, last, queries, **options)

    def embed(
        self,
        ids: Int[Array, "b l"] | None = None,
        token_types: Int[Array, "b l"] | None = None,
        train: bool = False,
        inputs_embeds: Float[Array, "b l d"] | None = None,
        queries: Float[Array, "b n d"] | None = None,
        position_ids: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b n_l d"]:
        """The first block's input; see `Embeddings`."""
        return self.embeddings(ids, token_types, train, inputs_embeds, queries, position_ids)

    # -------------------------------------------------------------------------------------------------- token by token

    def run_cached(
        self,
        x: Float[Array, "b l d"],
        attention_mask: Int[Array, "b l"] | Bool[Array, "#b 1 l s"] | None = None,
        context: Float[Array, "b m e"] | None = None,
        train: bool = False,
        queries: int = 0,
        past: Sequence[LayerCache] | None = None,
    ) -> tuple[Float[Array, "b l d"], list[LayerCache]]:
        """The last block's output of `run`, and the keys and values of all blocks.

        past: those of the tokens before x, which `attention_mask` covers too: s = past + l.
        """
        return self.encoder.prefill(x, _mask(attention_mask), context, past=past, train=train, queries=queries)

    def prefill(
        self,
        ids: Int[Array, "b l"],
        attention_mask: Bool[Array, "b l"],
        context: Float[Array, "b m e"] | Float[Array, "b 2 m e"] | None = None,
        context_mask: Bool[Array, "b m"] | None = None,
    ) -> tuple[Float[Array, "b v"], list[LayerCache]]:
        """The logits of the token after each prompt's last, and the keys and values that `step` continues from.

        Padding, on either side, takes no position here: a prompt's result does not depend on the others of its batch.
        """
        x = self.embed(ids, position_ids=jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0))
        x, caches = self.encoder.prefill(x, _mask(attention_mask), context, _mask(context_mask))
        last = ids.shape[1] - 1 - jnp.argmax(attention_mask[:, ::-1], axis=1)
        return self.mlm_logits(jnp.take_along_axis(x, last[:, None, None], axis=1))[:, 0], caches

    def step(
        self,
        ids: Int[Array, "b r"],
        caches: list[LayerCache],
        new: list[KeyValues],
        index: Int[Array, ""],
        prompt_mask: Bool[Array, "b l"],
        context_mask: Bool[Array, "b m"] | None = None,
        queries: int = 0,
    ) -> tuple[Float[Array, "b r v"], list[KeyValues]]:
        """The logits after one more token a row, and the rows' keys and values with that token's in slot `index`.

        queries: the number of the prompt's first keys that are of queries, which have no position.
        """
        position_ids = jnp.broadcast_to(jnp.sum(prompt_mask, axis=1, keepdims=True) - queries + index, ids.shape)
        rows = (rearrange(x, "b r -> (b r) 1") for x in (ids, position_ids))
        x = rearrange(self.embed(next(rows), position_ids=next(rows)), "(b r) 1 d -> b r d", b=len(ids))
        x, new = self.encoder.step(x, caches, new, index, prompt_mask, context_mask)
        return self.mlm_logits(x), new

    def mlm_logits(
        self, x: Float[Array, "b l d"], positions: Int[Array, "b m"] | None = None
    ) -> Float[Array, "b l v"] | Float[Array, "b m v"]:
        """The logits of tokens, from the last states; positions: of these alone."""
        if positions is not None:  # before the head, which is most of a small model's work
            x = jnp.take_along_axis(x, positions[..., None], axis=1)
        return self.embeddings.logits(self.mlm_transform(x)) + self.mlm_bias

    def _classes(self, x: Array, pooled: Any, train: bool) -> dict[str, Array]:
        """Heads of a few outputs, float32; those of `classes` and `token_classes` with dropout before them.

        pooled: None where there is no pooler, and so no head that reads it.
        """
        c, outputs = self.config, {}
        if c.nsp:
            outputs["nsp_logits"] = self.nsp(pooled)
        if c.classes:
            outputs["logits"] = self.classifier(self.drop(pooled, train))
        if c.token_classes:
            outputs["token_logits"] = self.token_classifier(self.drop(x, train))
        if c.spans:
            outputs["span_logits"] = self.spans(x)
        return outputs
