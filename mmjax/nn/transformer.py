"""The transformer: attention with its projections, feed-forward networks, the residual block, and a stack of blocks.

Parameter paths within an `Encoder`: block_{i}/norm_1, block_{i}/attention/{q,k,v,out}, block_{i}/scale_1,
block_{i}/norm_2, block_{i}/mlp/{up,down} (gated: {gate,up,down}), block_{i}/scale_2.

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
from mmjax.nn.dropout import Dropout, DropPath
from mmjax.nn.int8 import product
from mmjax.nn.norm import LayerNorm
from mmjax.nn.remat import rematerialised
from mmjax.types import Array, Bool, Float

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
    """Queries from x, keys and values from `context` or x itself. Params: q, k, v, out, each a `Dense`.

    Attributes:
        heads: divides the width of the queries.
        width: of queries, keys and values; None: the width of x, which is also that of the result.
        causal: a token attends to itself and to earlier ones.
        dropout: rate on the attention weights. axis_name: the mapped axis that cuts the batch, for dropout alone.
        use_bias: of q, k and v; `out` always has one.

    Inside `apply(..., mutable=["intermediates"])` the weights [b, h, l, s] are kept as "weights".
    """

    heads: int
    width: int | None = None
    causal: bool = False
    dropout: float = 0.0
    use_bias: bool = True
    init_with: Init = Init()
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        context: Float[Array, "b s e"] | None = None,
        mask: Bool[Array, "#b #h #l s"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b l d"]:
        width = self.width or x.shape[-1]
        if width % self.heads:
            raise MmjaxError(f"{self.heads} heads do not divide the width {width}")
        context = x if context is None else context

        def project(name: str, value: Array) -> Array:
            kernel_init = self.init_with.qkv
            dense = Dense(width, self.use_bias, self.dtype, kernel_init, name=name)
            return rearrange(dense(value), "b n (h k) -> b n h k", h=self.heads)

        q, k, v = project("q", x), project("k", context), project("v", context)
        if self.is_mutable_collection("intermediates") and not self.is_initializing():
            self.sow("intermediates", "weights", attention_weights(q, k, mask, self.causal))
        rng = self.make_rng("dropout") if train and self.dropout else None
        mixed = dot_product_attention(
            q,
            k,
            v,
            mask,
            causal=self.causal,
            dropout_rate=self.dropout,
            dropout_rng=rng,
            axis_name=self.axis_name,
        )
        mixed = rearrange(mixed, "b l h k -> b l (h k)")
        return Dense(x.shape[-1], True, self.dtype, self.init_with.out, name="out")(mixed)


class Mlp(nn.Module):
    """down(act(up(x))), or gated: down(silu(gate(x)) * up(x)), the SwiGLU of DINOv2's largest model.

    dropout: after the activation and after `down`, as in the original ViT.
    inner_dropout: whether after the activation too; BERT has none there.
    """

    hidden: int
    act: str = "gelu"
    gated: bool = False
    dropout: float = 0.0
    init_with: Init = Init()
    dtype: Any = jnp.float32
    axis_name: str | None = None
    inner_dropout: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], train: bool = False) -> Float[Array, "b n d"]:
        def dense(name: str, features: int, kernel_init: Initializer) -> Dense:
            return Dense(features, True, self.dtype, kernel_init, self.init_with.mlp_bias, name=name)

        h = dense("up", self.hidden, self.init_with.up)(x)
        if self.gated:
            h = jax.nn.silu(dense("gate", self.hidden, self.init_with.up)(x)) * h
        else:
            h = activation(self.act)(h)
        h = Dropout(self.dropout if self.inner_dropout else 0.0, self.axis_name)(h, train)
        h = dense("down", x.shape[-1], self.init_with.down)(h)
        return Dropout(self.dropout, self.axis_name)(h, train)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each around a residual: x + f(norm(x)), or norm(x + f(x)) as in BERT.

    Attributes:
        norm_first: which of the two.
        layer_scale: the initial value of a learned factor on each branch [d] (DINOv2); None: there is none.
        drop_path: rate of stochastic depth. dropout: after attention and within the feed-forward.
        inner_dropout: whether also after the feed-forward's activation.
        axis_name: the mapped axis that cuts the batch: what an example loses depends on its place in the whole.
    """

    heads: int
    hidden: int
    act: str = "gelu"
    gated: bool = False
    causal: bool = False
    norm_first: bool = True
    epsilon: float = 1e-6
    layer_scale: float | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    init_with: Init = Init()
    dtype: Any = jnp.float32
    axis_name: str | None = None
    inner_dropout: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "#b #h #n n"] | None = None, train: bool = False
    ) -> Float[Array, "b n d"]:
        def attend(y: Array) -> Array:
            attention = MultiHeadAttention(
                self.heads,
                causal=self.causal,
                dropout=self.attention_dropout,
                init_with=self.init_with,
                dtype=self.dtype,
                axis_name=self.axis_name,
                name="attention",
            )
            return Dropout(self.dropout, self.axis_name)(attention(y, mask=mask, train=train), train)

        def feed_forward(y: Array) -> Array:
            mlp = Mlp(
                self.hidden,
                self.act,
                self.gated,
                self.dropout,
                self.init_with,
                self.dtype,
                self.axis_name,
                self.inner_dropout,
                name="mlp",
            )
            return mlp(y, train)

        for i, branch in enumerate((attend, feed_forward), start=1):
            norm = LayerNorm(self.epsilon, self.dtype, name=f"norm_{i}")
            y = branch(norm(x) if self.norm_first else x)
            if self.layer_scale is not None:
                scale = self.param(f"scale_{i}", nn.initializers.constant(self.layer_scale), (x.shape[-1],))
                y = y * scale.astype(self.dtype)
            x = x + DropPath(self.drop_path, self.axis_name, name=f"drop_path_{i}")(y, train)
            x = x if self.norm_first else norm(x)
        return x


class Encoder(nn.Module):
    """Blocks one after the other: block_0, block_1, ...; unrolled, not scanned (on CPU a scan copies every weight).

    Attributes:
        block: what all blocks share, as a dict of `TransformerBlock`'s fields.
        drop_path: of the last block; from the first it rises linearly from 0.
        remat: a block's activations are computed again in the backward pass instead of being kept.
    """

    depth: int
    block: dict[str, Any]
    drop_path: float = 0.0
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "#b #h #n n"] | None = None, train: bool = False
    ) -> list[Float[Array, "b n d"]]:
        """The input and the output of every block: depth + 1 arrays; what is not used is not kept by XLA."""
        run = _rematerialised if self.remat else _plain
        states = [x]
        for i in range(self.depth):
            rate = self.drop_path * i / max(self.depth - 1, 1)
            states.append(
                run(TransformerBlock(**self.block, drop_path=rate, name=f"block_{i}"), states[-1], mask, train)
            )
        return states


def _plain(block: TransformerBlock, x: Array, mask: Array | None, train: bool) -> Array:
    return block(x, mask, train)


def _rematerialised(block: TransformerBlock, x: Array, mask: Array | None, train: bool) -> Array:
    return rematerialised(lambda block, x, mask: block(x, mask, train), block, x, mask)
