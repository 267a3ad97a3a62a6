"""Stop strings in the compiled loop: an automaton over tokens, one state a row."""

from typing import NamedTuple

import jax.numpy as jnp

from mmjax.types import Array, Bool, Int


class Stops(NamedTuple):
    """transitions: int32 [states, v], after state and token; matched: the state from which none leads away.

    `mmjax.text.stop_strings` makes them for strings. start: [b], the state in which each item's prompt leaves it.
    """

    transitions: Int[Array, "states v"]
    matched: Int[Array, ""]
    start: Int[Array, "b"]


def advance(stops: Stops | None, state: Int[Array, "b r"], ids: Int[Array, "b r"]) -> Int[Array, "b r"]:
    """The states after one token more a row."""
    return state if stops is None else jnp.asarray(stops.transitions)[state, ids]


def matched(stops: Stops | None, state: Int[Array, "*b"]) -> Bool[Array, "*b"]:
    """Which rows have met a stop string."""
    return jnp.zeros(state.shape, bool) if stops is None else state == stops.matched


def begin(stops: Stops | None, b: int, rows: int) -> Int[Array, "b r"]:
    """The states before the first token."""
    start = jnp.zeros(b, jnp.int32) if stops is None else jnp.asarray(stops.start, jnp.int32)
    return jnp.broadcast_to(start[:, None], (b, rows))
