"""What transformers are made of: matrices, attention with its projections, feed-forward networks.

q, k and v have a matrix each: on CPU one fused matrix is slower (8 x 197 x 768: attention forward 39 against 44 ms,
with backward 140 against 145), and a mesh, a freezing rule or an adapter can name one of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.nn.activation import activation
from mmjax.nn.attention import attention_weights, dot_product_attention
from mmjax.nn.dropout import Dropout
from mmjax.nn.int8 import product
from mmjax.nn.kv_cache import KeyValues, attend, from_tokens, write
from mmjax.types import Array, Bool, Float, Int

Initializer = Callable[..., Any]
XAVIER: Initializer = nn.initializers.xavier_uniform()
TINY: Initializer = nn.initializers.normal(1e-6)


@dataclasses.dataclass(frozen=True)
class Init:
    """How a block's parameters begin. The defaults are the original ViT's (vit_jax/models_vit.py).

    qkv, out, up, down: of the matrices (up also of a gate). mlp_bias: of the feed-forward's biases; others are zero.
    """

    qkv: Initializer = XAVIER
    out: Initializer = XAVIER
    up: Initializer = XAVIER
    down: Initializer = XAVIER
    mlp_bias: Initializer = TINY


class Dense(nn.Module):
    """y = x W + b over the last axis. Params: kernel [in, features] (see `mmjax.nn.int8`), bias [features].

    The leading axes are folded into one: on CPU one large product takes 13 % less time, with its backward pass, than
    a batch of small ones.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = XAVIER
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b c"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = product(x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel)
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class MultiHeadAttention(nn.Module):
    """Queries from x, keys and values from a context or x itself. Params: q, k, v, out, each a `Dense`.

    Attributes:
        width: of x and of the result; the context may have another.
        inner: of queries, keys and values, all heads together; None: `width`. The heads divide it.
        causal: in a pass over a whole sequence a token attends to itself and to earlier ones.
        dropout: rate on the attention weights. axis_name: the mapped axis that cuts the batch, for dropout alone.

    Inside `apply(..., mutable=["intermediates"])` such a pass keeps its weights [b, h, l, s] as "weights".
    """

    heads: int
    width: int
    inner: int | None = None
    causal: bool = False
    dropout: float = 0.0
    init_with: Init = Init()
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        inner = self.width if self.inner is None else self.inner
        if inner % self.heads:
            raise MmjaxError(f"{self.heads} heads do not divide the width {inner}")
        self.q, self.k, self.v = (Dense(inner, True, self.dtype, self.init_with.qkv) for _ in range(3))
        self.out = Dense(self.width, True, self.dtype, self.init_with.out)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        context: Float[Array, "b s e"] | None = None,
        mask: Bool[Array, "#b #h #l s"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b l d"]:
        return self.prefill(x, context, mask, train)[0]

    def prefill(
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


class Mlp(nn.Module):
    """down(act(up(x))), or gated: down(silu(gate(x)) * up(x)), the SwiGLU of DINOv2's largest model.

    dropout: after the activation, as in the original ViT and torch's layer; BERT has none there.
    """

    hidden: int
    act: str = "gelu"
    gated: bool = False
    dropout: float = 0.0
    init_with: Init = Init()
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"], train: bool = False) -> Float[Array, "*b d"]:
        def dense(name: str, features: int, kernel_init: Initializer) -> Dense:
            return Dense(features, True, self.dtype, kernel_init, self.init_with.mlp_bias, name=name)

        h = dense("up", self.hidden, self.init_with.up)(x)
        if self.gated:
            h = jax.nn.silu(dense("gate", self.hidden, self.init_with.up)(x)) * h
        else:
            h = activation(self.act)(h)
        h = Dropout(self.dropout, self.axis_name)(h, train)
        return dense("down", x.shape[-1], self.init_with.down)(h)
