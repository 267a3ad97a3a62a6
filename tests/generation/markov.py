"""A model whose next token depends on the last one alone: everything that it generates can be counted by hand."""

import dataclasses

import jax.numpy as jnp

from mmjax.generation.decodable import DecodeState


@dataclasses.dataclass(frozen=True)
class Markov:
    """`Decodable`; variables are {"table": log-probabilities [v, v]}, after the last id of a prompt."""

    def prefill(self, variables, inputs, rows, capacity):
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", jnp.ones_like(ids))
        last = ids.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=-1)
        logits = variables["table"][jnp.take_along_axis(ids, last[:, None], 1)[:, 0]]
        read = jnp.full((ids.shape[0] * rows, capacity), -1, jnp.int32)
        return logits, DecodeState({}, {"read": read}, jnp.int32(0))

    def step(self, variables, ids, state):
        read = state.rows["read"].at[:, state.index].set(ids.reshape(-1))
        return variables["table"][ids], DecodeState({}, {"read": read}, state.index + 1)
