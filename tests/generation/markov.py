"""A model whose next token depends on the last one alone: all generations can be enumerated by hand."""

import dataclasses

import jax.numpy as jnp

from mmjax.generation.decodable import DecodeState


@dataclasses.dataclass(frozen=True)
class Markov:
    """`Decodable`; variables are {"table": log-probabilities [v, v]}, after the last id of a prompt.

    They are multiplied by 1 + rate * ids read: with a rate texts of the same transitions are not equally likely.
    Embeddings [b, l, 1] are ids as numbers. Of an encoder-decoder the decoder's ids are those that are read.
    """

    rate: float = 0.0

    def prefill(self, variables, inputs, rows, capacity):
        ids = inputs["inputs_embeds"][..., 0].astype(int) if "inputs_embeds" in inputs else inputs["input_ids"]
        mask = inputs.get("attention_mask", jnp.ones_like(ids))
        if "decoder_input_ids" in inputs:
            ids = inputs["decoder_input_ids"]
            mask = jnp.ones_like(ids)
        last = ids.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=-1)
        length = mask.sum(-1)
        logits = variables["table"][jnp.take_along_axis(ids, last[:, None], 1)[:, 0]] * (
            1 + self.rate * length[:, None]
        )
        read = jnp.full((ids.shape[0] * rows, capacity), -1, jnp.int32)
        return logits, DecodeState({"length": length}, {"read": read}, jnp.int32(0))

    def step(self, variables, ids, state):
        read = state.rows["read"].at[:, state.index].set(ids.reshape(-1))
        length = state.items["length"][:, None, None] + state.index + 1
        logits = variables["table"][ids] * (1 + self.rate * length)
        return logits, DecodeState(state.items, {"read": read}, state.index + 1)
