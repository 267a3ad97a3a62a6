"""BLIP-2's query transformer (Q-Former): a BERT whose first tokens are learned queries, which attend to an image.

In the first stage texts follow the queries; in the second one InstructBLIP's instructions, or nothing.
"""

from typing import Any

import jax.numpy as jnp

from mmjax.models.bert.network import Bert, BertConfig
from mmjax.types import Array, Float, Int


def qformer(**fields: Any) -> BertConfig:
    """BERT-base's size with [DEC], with cross attention in every second layer (LAVIS blip2.py:43-58)."""
    kind: dict[str, Any] = {"vocab_size": 30523, "types": 0, "pooler": False, "mlm": True, "init": "normal"}
    kind |= {"cross_from": 0, "cross_every": 2, "query_feed_forward": True}
    return BertConfig(**(kind | fields))


def query_states(
    module: Bert,
    queries: Float[Array, "q d"],
    image_tokens: Float[Array, "b n e"],
    ids: Int[Array, "b l"] | None = None,
    mask: Int[Array, "b l"] | None = None,
    train: bool = False,
) -> Float[Array, "b q d"]:
    """The states of the queries, which attend to the image and, with a text, to each other and the text.

    ids: of the text, [CLS] first. mask: 1 = a token.
    """
    q = len(queries)
    x = module.embed(ids, train=train, queries=jnp.broadcast_to(queries, (len(image_tokens), *queries.shape)))
    valid = None if mask is None else mask_behind_queries(mask, q)
    return module.run(x, valid, image_tokens, train=train, queries=q)[-1][:, :q]


def mask_behind_queries(mask: Int[Array, "b l"], queries: int) -> Int[Array, "b q_l"]:
    """The padding mask of queries with a text behind them."""
    return jnp.concatenate([jnp.ones((len(mask), queries), mask.dtype), mask], axis=1)
