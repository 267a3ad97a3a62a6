"""Attention to two contexts at once: one text about two images (BLIP's models/nlvr_encoder.py)."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from mmjax.nn.transformer import Dense, MultiHeadAttention
from mmjax.types import Array, Bool, Float


class TwinAttention(nn.Module):
    """Two attentions from the same queries, each to a context of its own, and one result.

    Params: first and second, each a `MultiHeadAttention`; with `merged` merge, a `Dense` from both results, the first
    one's channels first, without activation. Without it the result is their mean.

    Attributes:
        make_attention: makes each of the two.
        merged: whether a matrix merges the results.
    """

    make_attention: Callable[[], MultiHeadAttention]
    merged: bool

    def setup(self) -> None:
        self.first, self.second = self.make_attention(), self.make_attention()
        if self.merged:
            one = self.first
            self.merge = Dense(one.width, dtype=one.dtype, kernel_init=one.init_with.out)

    def prefill(
        self,
        x: Float[Array, "b l d"],
        contexts: Float[Array, "b 2 s e"],
        mask: Bool[Array, "#b #h #l s"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b l d"], None]:
        """The result, and no cache: this attention is no decoder's. mask: of both contexts."""
        y, z = (attend(x, contexts[:, i], mask, train) for i, attend in enumerate((self.first, self.second)))
        return self.merge(jnp.concatenate([y, z], axis=-1)) if self.merged else (y + z) / 2, None
