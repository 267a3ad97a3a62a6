"""Stop strings in the compiled loop: an automaton over tokens, one state per sequence."""

from typing import NamedTuple

import jax.numpy as jnp

from mmjax.types import Array, Bool, Int


class Stops(NamedTuple):
    """transitions: int32 [states, v], the next state by state and token; matched: the absorbing state.

    `mmjax.text.stop_strings` builds them from strings. start: [b], the state after each item's prompt.
    """

    transitions: Int[Array, "states v"]
    matched: Int[Array, ""]
    start: Int[Array, "b"]


def advance(stops: Stops | None, state: Int[Array, "b r"], ids: Int[Array, "b r"]) -> Int[Array, "b r"]:
    """The states after one more token per sequence."""
    return state if stops is None else jnp.asarray(stops.transitions)[state, ids]


def matched(stops: Stops | None, state: Int[Array, "*b"]) -> Bool[Array, "*b"]:
    """Mask of the sequences that contain a stop string."""
    return jnp.zeros(state.shape, bool) if stops is None else state == stops.matched


def begin(stops: Stops | None, b: int, r: int) -> Int[Array, "b r"]:
    """The states before the first token, for r sequences per item."""
    start = jnp.zeros(b, jnp.int32) if stops is None else jnp.asarray(stops.start, jnp.int32)
    return jnp.broadcast_to(start[:, None], (b, r))
