"""The parts of transformers: matrices, attention with its projections, feed-forward networks.

q, k and v have a matrix each: on CPU one fused matrix is slower (8 x 197 x 768: attention forward 39 against 44 ms,
with backward 140 against 145), and a mesh, a freezing rule or an adapter can name one of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

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
from mmjax.nn.rotary import rotate
from mmjax.types import Array, Bool, Float, Int

Initializer = Callable[..., Any]
XAVIER: Initializer = nn.initializers.xavier_uniform()
TINY: Initializer = nn.initializers.normal(1e-6)
TORCH: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""torch's default for matrices and convolutions: uniform within 1 / sqrt(fan_in)."""


def torch_bias(fan_in: int) -> Initializer:
    """torch's default for the bias of a matrix with `fan_in` inputs, or of such a convolution: the same bounds."""
    bound = fan_in**-0.5

    def uniform(rng: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return uniform


@dataclasses.dataclass(frozen=True)
class Init:
    """The initializers of a block's parameters. The defaults are the original ViT's (vit_jax/models_vit.py).

    qkv, out, up, down: of the matrices (up also of a gate). mlp_bias: of the feed-forward's biases; others are zero.
    q: of the queries' matrix where it is not `qkv` (T5).
    """

    qkv: Initializer = XAVIER
    out: Initializer = XAVIER
    up: Initializer = XAVIER
    down: Initializer = XAVIER
    mlp_bias: Initializer = TINY
    q: Initializer | None = None


class PositionInputs(NamedTuple):
    """The position inputs of self-attention.

    rope: (cosines, sines) [b, l, p] of the positions of its input, from `mmjax.nn.rotary`.
    bias: added to the scores, [#b, #h, #l, s] over all keys; in a step l is 1, and s is the prompt and all new slots.
    """

    rope: tuple[Array, Array] | None = None
    bias: Array | None = None


NO_POSITIONS = PositionInputs()


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


def torch_linear(features: int, inputs: int) -> Dense:
    """A `Dense` that begins as torch's Linear: weights and biases uniform within 1 / sqrt(inputs)."""
    return Dense(features, kernel_init=TORCH, bias_init=torch_bias(inputs))


class MultiHeadAttention(nn.Module):
    """Queries from x, keys and values from a context or x itself. Params: q, k, v, out, each a `Dense`; q_norm, k_norm.

    Attributes:
        width: of x and of the result; the context may have another.
        inner: of all heads' queries together; None: `width`. The heads divide it.
        causal: in a pass over a whole sequence a token attends to itself and to earlier ones.
        dropout: rate on the attention weights. axis_name: the mapped axis that cuts the batch, for dropout alone.
        kv_heads: heads of keys and values, which divide `heads`; None: as many.
        qkv_bias, out_bias: which products have one. key_bias: False: that of the keys has none (EVA).
        scale: of the scores; None: 1 / sqrt(head width).
        clip: queries, keys and values are clamped to +-clip (MPT). make_qk_norm: makes the norms over all heads of
            queries and of keys together, or with `norm_heads` over each head alone (Idefics).
        zero_masked: a query that may attend to nothing gets zero, not the mean of all values.

    Inside `apply(..., mutable=["intermediates"])` such a pass stores its weights [b, h, l, s] as "weights". Where the
    collection "perturbations" has zeros of that shape at the same path, they are added to the weights: the gradient by
    them is the weights' gradient. Other attentions run as always.
    """

    heads: int
    width: int
    inner: int | None = None
    causal: bool = False
    dropout: float = 0.0
    init_with: Init = Init()
    dtype: Any = jnp.float32
    axis_name: str | None = None
    kv_heads: int | None = None
    qkv_bias: bool = True
    key_bias: bool = True
    out_bias: bool = True
    scale: float | None = None
    clip: float | None = None
    make_qk_norm: Callable[[], nn.Module] | None = None
    norm_heads: bool = False
    zero_masked: bool = False

    def setup(self) -> None:
        inner, kv_heads = self.inner or self.width, self.kv_heads or self.heads
        if inner % self.heads or self.heads % kv_heads:
            raise MmjaxError(f"{self.heads} heads do not divide the width {inner}, or {kv_heads} not the heads")
        init, self.head_width = self.init_with, inner // self.heads
        self.q = Dense(inner, self.qkv_bias, self.dtype, init.qkv if init.q is None else init.q)
        self.k = Dense(self.head_width * kv_heads, self.qkv_bias and self.key_bias, self.dtype, init.qkv)
        self.v = Dense(self.head_width * kv_heads, self.qkv_bias, self.dtype, init.qkv)
        self.out = Dense(self.width, self.out_bias, self.dtype, init.out)
        if self.make_qk_norm is not None:
            self.q_norm, self.k_norm = self.make_qk_norm(), self.make_qk_norm()

    def __call__(
        self,
        x: Float[Array, "b l d"],
        context: Float[Array, "b s e"] | None = None,
        mask: Bool[Array, "#b #h #l s"] | None = None,
        train: bool = False,
        positions: PositionInputs = NO_POSITIONS,
    ) -> Float[Array, "b l d"]:
        return self.prefill(x, context, mask, train, positions)[0]

    def prefill(
        self,
        x: Float[Array, "b l d"],
        context: Float[Array, "contexts m e"] | None = None,
        mask: Bool[Array, "#b #h #l s"] | None = None,
        train: bool = False,
        positions: PositionInputs = NO_POSITIONS,
        past: KeyValues | None = None,
        context_index: Int[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b l d"], KeyValues]:
        """The result, and the keys and values of the context (of x itself where it is None).

        past: keys and values before those of x; mask and positions.bias cover them too, and they are in the result's.
        context_index: the context of each sequence, of [m, s, e], whose keys and values are computed once each; None:
            the i-th context is that of the i-th sequence.
        """
        context = x if context is None else context
        q = self._queries(x, positions.rope)
        k, v = self._keys(context, positions.rope), self._heads(self.v(context))
        if context_index is not None:
            k, v = k[context_index], v[context_index]
        cache = from_tokens(k, v)
        if past is not None:
            cache = KeyValues(*(jnp.concatenate(pair, axis=2) for pair in zip(past, cache)))
            k, v = (rearrange(y, "b g s k -> b s g k") for y in cache)
        options: dict[str, Any] = {"causal": self.causal, "bias": positions.bias, "scale": self.scale}
        options["zero_masked"] = self.zero_masked
        if self.is_mutable_collection("intermediates") and not self.is_initializing():
            self.sow("intermediates", "weights", attention_weights(q, k, mask, **options))
        rng = self.make_rng("dropout") if train and self.dropout else None
        options |= {"dropout_rate": self.dropout, "dropout_rng": rng, "axis_name": self.axis_name}
        options["offset"] = self.get_variable("perturbations", "weights")
        mixed = dot_product_attention(q, k, v, mask, **options)
        return self.out(rearrange(mixed, "b l h k -> b l (h k)")), cache

    def step(
        self,
        x: Float[Array, "b r d"],
        prompt: KeyValues,
        prompt_mask: Bool[Array, "b s"] | None,
        new: KeyValues,
        index: Int[Array, ""],
        positions: PositionInputs = NO_POSITIONS,
    ) -> tuple[Float[Array, "b r d"], KeyValues]:
        """One token a row, over the prompt and the row's own tokens, which it joins in slot `index`."""
        new = write(new, self._keys(x, positions.rope), self._heads(self.v(x)), index)
        bias = None if positions.bias is None else rearrange(positions.bias, "b h 1 s -> b 1 h s")
        mixed = attend(self._queries(x, positions.rope), prompt, prompt_mask, new, index, bias, self.scale)
        return self.out(rearrange(mixed, "b r h k -> b r (h k)")), new

    def cross_step(
        self, x: Float[Array, "b r d"], context: KeyValues, mask: Bool[Array, "b s"] | None
    ) -> Float[Array, "b r d"]:
        """One token a row, over the cached keys and values of a context alone."""
        mixed = attend(self._queries(x, None), context, mask, None, 0, None, self.scale, self.zero_masked)
        return self.out(rearrange(mixed, "b r h k -> b r (h k)"))

    def _queries(self, x: Float[Array, "b l d"], rope: tuple[Array, Array] | None) -> Float[Array, "b l h k"]:
        return self._rotated(self.q(x), None if self.make_qk_norm is None else self.q_norm, rope)

    def _keys(self, x: Float[Array, "b s d"], rope: tuple[Array, Array] | None) -> Float[Array, "b s g k"]:
        return self._rotated(self.k(x), None if self.make_qk_norm is None else self.k_norm, rope)

    def _rotated(self, y: Array, norm: Any, rope: tuple[Array, Array] | None) -> Array:
        y = self._heads(y, norm)
        return y if rope is None else rotate(y, *rope)

    def _heads(self, y: Float[Array, "b l d"], norm: Any = None) -> Float[Array, "b l h k"]:
        if self.clip is not None:
            y = jnp.clip(y, -self.clip, self.clip)
        if norm is not None and not self.norm_heads:
            y = norm(y)
        y = rearrange(y, "b l (h k) -> b l h k", k=self.head_width)
        return norm(y) if norm is not None and self.norm_heads else y


class Mlp(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x)), which with silu is SwiGLU. Params: up, gate, down.

    dropout: after the activation, as in the original ViT, T5 and torch's layer; BERT has none there.
    """

    hidden: int
    act: str = "gelu"
    gated: bool = False
    dropout: float = 0.0
    init_with: Init = Init()
    dtype: Any = jnp.float32
    axis_name: str | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"], train: bool = False) -> Float[Array, "*b d"]:
        def dense(name: str, features: int, kernel_init: Initializer) -> Dense:
            return Dense(features, self.use_bias, self.dtype, kernel_init, self.init_with.mlp_bias, name=name)

        act, h = activation(self.act), dense("up", self.hidden, self.init_with.up)(x)
        h = act(dense("gate", self.hidden, self.init_with.up)(x)) * h if self.gated else act(h)
        h = Dropout(self.dropout, self.axis_name)(h, train)
        return dense("down", x.shape[-1], self.init_with.down)(h)
