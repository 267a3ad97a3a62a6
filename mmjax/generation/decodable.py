"""The interface between a generating model and the engine: two pure functions and their state."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from mmjax.types import Array, Float, Int


class DecodeState(NamedTuple):
    """The state of a generating model. The engine reorders `rows` between beams and changes nothing else.

    Attributes:
        items: leaves [b, ...]: per item, read only: keys and values of the prompt or encoder, masks, lengths.
        rows: leaves [b r ..., ...]: per beam or sample: the cache of generated tokens. The first axis is divided evenly
            over the beams, item after item, so it may include heads, see `mmjax.nn.kv_cache`.
        index: number of tokens that `step` has processed; the cache slot of the next one.
    """

    items: Any
    rows: Any
    index: Int[Array, ""]


class Decodable(Protocol):
    """A model that the engine can decode. Both functions are pure and are traced inside the engine's program.

    Inputs are arrays [b, ...] by name: `input_ids` and `attention_mask` (left or right padded; the prompt of a
    decoder-only model, the encoder's input of an encoder-decoder), `inputs_embeds` for a prefix that is not text,
    `decoder_input_ids` if an encoder-decoder begins with more than its start token, and system-specific ones.
    """

    def prefill(
        self, variables: Mapping[str, Any], inputs: Mapping[str, Array], rows: int, capacity: int
    ) -> tuple[Float[Array, "b v"], DecodeState]:
        """Processes the prompt (an encoder-decoder: encodes, and processes the start token), once per item.

        Returns the float32 logits of the first new token, and a state with a capacity of `capacity` tokens for each of
        `rows` beams or samples per item.
        """
        ...

    def step(
        self, variables: Mapping[str, Any], ids: Int[Array, "b r"], state: DecodeState
    ) -> tuple[Float[Array, "b r v"], DecodeState]:
        """Processes one token per row; returns float32 logits of the next ones, and the state with `index` + 1."""
        ...
