"""The contract between a model that generates and the engine: two pure functions and what they pass on."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from mmjax.types import Array, Float, Int


class DecodeState(NamedTuple):
    """What a model remembers while it generates. The engine moves `rows` from beam to beam and touches nothing else.

    Attributes:
        items: leaves [b, ...]: one copy an item, read only: the prompt's keys and values, an encoder's, masks, lengths.
        rows: leaves [b r ..., ...]: a copy a row (a beam or a sample): what was generated. Equal shares of the first
            axis belong to the rows, item after item; so heads may stand on it too, see `mmjax.nn.kv_cache`.
        index: how many tokens have been given to `step`; the slot that the next one is written to.
    """

    items: Any
    rows: Any
    index: Int[Array, ""]


class Decodable(Protocol):
    """A model as the engine sees it. Both functions are pure and are traced inside the engine's one program.

    Its inputs are arrays by name, [b, ...]: `input_ids` and `attention_mask` (left or right padded; decoder-only: the
    prompt; encoder-decoder: the encoder's), `inputs_embeds` where a prefix is no text, `decoder_input_ids` where an
    encoder-decoder is to begin with more than its start token, and what else a system knows.
    """

    def prefill(
        self, variables: Mapping[str, Any], inputs: Mapping[str, Array], rows: int, capacity: int
    ) -> tuple[Float[Array, "b v"], DecodeState]:
        """Reads the prompt (an encoder-decoder: encodes, and reads the start token), once an item.

        Returns the float32 logits of the first new token, and a state with room for `capacity` tokens in `rows` rows.
        """
        ...

    def step(
        self, variables: Mapping[str, Any], ids: Int[Array, "b r"], state: DecodeState
    ) -> tuple[Float[Array, "b r v"], DecodeState]:
        """One token a row is read; returns the float32 logits of the next, and the state with `index` one larger."""
        ...
