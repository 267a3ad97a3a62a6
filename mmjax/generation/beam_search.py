"""Beam search as one compiled loop, by the rules of transformers 5 (generation/utils.py, `_beam_search`).

For each item, with K beams: of all continuations the best max(2, 1 + number of eos ids) K are looked at. Those that
end compete for K places if they are among the first K, by their sum of log-probabilities / length ** length_penalty;
of those that do not, the best K run on. An item closes when its running beams can no longer win (`early_stopping`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from mmjax.generation import stopping
from mmjax.generation.decodable import Decodable, DecodeState
from mmjax.generation.options import GenerationOptions
from mmjax.generation.scores import constrain, seen_ids
from mmjax.generation.stopping import Stops
from mmjax.types import Array, Bool, Float, Int

FAR = -1e9
"""A sum of log-probabilities that no beam has: transformers' own number, as it takes part in comparisons."""


class Beams(NamedTuple):
    """Running beams, and those that have ended; both [b, K, ...], the best first."""

    state: DecodeState
    ids: Int[Array, "b k t"]
    sums: Float[Array, "b k"]
    ended_ids: Int[Array, "b k t"]
    ended_scores: Float[Array, "b k"]
    ended: Bool[Array, "b k"]
    open: Bool[Array, "b"]
    written: Int[Array, ""]
    seen: Bool[Array, "b k v"] | None
    stop: Int[Array, "b k"]
    all_hit: Bool[Array, ""]


def search(
    decodable: Decodable,
    options: GenerationOptions,
    variables: Mapping[str, Any],
    inputs: Mapping[str, Any],
    stops: Stops | None,
) -> tuple[Int[Array, "b n t"], Float[Array, "b n"]]:
    """(ids, scores) of the best num_return_sequences beams of each item, the best first."""
    k, room = options.num_beams, options.max_new_tokens
    logits, state = decodable.prefill(variables, inputs, k, room)
    b, v = logits.shape
    seen = seen_ids(inputs, options, (b, k, v))
    empty = jnp.full((b, k, room), options.pad, jnp.int32)
    first = jnp.where(jnp.arange(k) == 0, 0.0, FAR)
    beams = Beams(
        state=state,
        ids=empty,
        sums=jnp.broadcast_to(first, (b, k)),
        ended_ids=empty,
        ended_scores=jnp.full((b, k), FAR),
        ended=jnp.zeros((b, k), bool),
        open=jnp.ones(b, bool),
        written=jnp.int32(0),
        seen=seen,
        stop=stopping.begin(stops, b, k),
        all_hit=jnp.array(False),
    )
    beams = extend(options, jnp.broadcast_to(logits[:, None], (b, k, v)), beams, stops)

    def body(beams: Beams) -> Beams:
        last = jax.lax.dynamic_index_in_dim(beams.ids, beams.written - 1, axis=-1, keepdims=False)
        logits, state = decodable.step(variables, last, beams.state)
        return extend(options, logits, beams._replace(state=state), stops)

    beams = jax.lax.while_loop(lambda beams: going(options, beams), body, beams)
    n = options.num_return_sequences
    return beams.ended_ids[:, :n], beams.ended_scores[:, :n]


def going(options: GenerationOptions, beams: Beams) -> Bool[Array, ""]:
    """Whether any item can still change."""
    more = (beams.written < options.max_new_tokens) & jnp.any(beams.open) & ~beams.all_hit
    if options.early_stopping is True:
        more = more & ~jnp.all(beams.ended)
    return more


def extend(options: GenerationOptions, logits: Float[Array, "b k v"], beams: Beams, stops: Stops | None) -> Beams:
    """One token more for every beam, given the logits behind its last."""
    k, v = options.num_beams, logits.shape[-1]
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    scores = constrain(scores, options, beams.written, beams.seen, beams.ids) + beams.sums[..., None]
    sums, flat = jax.lax.top_k(rearrange(scores, "b k v -> b (k v)"), max(2, 1 + len(options.eos)) * k)
    parents, tokens = flat // v, (flat % v).astype(jnp.int32)
    ids = jax.lax.dynamic_update_slice(_of(beams.ids, parents), tokens[..., None], (0, 0, beams.written))
    written = beams.written + 1
    stop = stopping.advance(stops, _of(beams.stop, parents), tokens)
    hit = jnp.isin(tokens, jnp.asarray(options.eos, jnp.int32)) | stopping.matched(stops, stop)
    hit = hit | (written >= options.max_new_tokens)

    running, places = jax.lax.top_k(sums + jnp.where(hit, FAR, 0.0), k)
    ended_ids, ended_scores, ended = _end(options, beams, ids, sums, hit, written)
    source = _of(parents, places)
    seen = beams.seen
    if seen is not None:
        token = _of(tokens, places)
        b, r = (jnp.arange(n) for n in token.shape)
        seen = _of(seen, source).at[b[:, None], r[None], token].set(True)
    # The rows of all items share the leaves' first axis.
    moved = (jnp.arange(source.shape[0])[:, None] * k + source).reshape(-1)
    state = beams.state._replace(rows=jax.tree.map(lambda leaf: leaf[moved], beams.state.rows))
    beams = Beams(
        state=state,
        ids=_of(ids, places),
        sums=running,
        ended_ids=ended_ids,
        ended_scores=ended_scores,
        ended=ended,
        open=beams.open,
        written=written,
        seen=seen,
        stop=_of(stop, places),
        all_hit=jnp.all(hit),
    )
    return beams._replace(open=beams.open & _can_improve(options, beams))


def _end(
    options: GenerationOptions, beams: Beams, ids: Array, sums: Array, hit: Array, written: Array
) -> tuple[Array, Array, Array]:
    """The best of what had ended and what ends now: ids, scores, whether a place is taken."""
    k = options.num_beams
    takes = hit & (jnp.arange(hit.shape[1]) < k) & beams.open[:, None]
    if options.early_stopping is True:
        takes = takes & ~jnp.all(beams.ended, axis=-1, keepdims=True)
    scores = sums / written.astype(jnp.float32) ** options.length_penalty
    scores = jnp.where(takes, scores, FAR)
    scores = jnp.concatenate([beams.ended_scores, scores], axis=1)
    best, places = jax.lax.top_k(scores, k)
    both = jnp.concatenate([beams.ended_ids, ids], axis=1)
    taken = jnp.concatenate([beams.ended, takes], axis=1)
    return _of(both, places), best, _of(taken, places)


def _can_improve(options: GenerationOptions, beams: Beams) -> Bool[Array, "b"]:
    """Whether the best running beam could still take a place."""
    length = beams.written
    if options.early_stopping == "never" and options.length_penalty > 0:
        length = jnp.asarray(options.max_new_tokens)
    best = beams.sums[:, 0] / length.astype(jnp.float32) ** options.length_penalty
    worst = jnp.where(jnp.all(beams.ended, axis=-1), jnp.min(beams.ended_scores, axis=-1), FAR)
    return best > worst


def _of(values: Array, places: Int[Array, "b m"]) -> Array:
    """values[i, places[i, j]]."""
    return jnp.take_along_axis(values, places.reshape(*places.shape, *[1] * (values.ndim - 2)), axis=1)
