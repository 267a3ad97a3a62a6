"""Beam search as one compiled loop, by the rules of transformers 5 (generation/utils.py, `_beam_search`) or older ones.

For each item, with K beams: of all continuations the best max(2, 1 + number of eos ids) K are looked at. Those that
end compete for K places if they are among the first K, by their sum of log-probabilities / length ** length_penalty;
of those that do not, the best K run on. An item closes when its running beams can no longer win (`early_stopping`).
What else a length counts, and how older versions close: `BeamRules`. Groups of beams have K and places of their own.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from mmjax.errors import MmjaxError
from mmjax.generation import stopping
from mmjax.generation.decodable import Decodable, DecodeState
from mmjax.generation.options import GenerationOptions
from mmjax.generation.scores import constrain, prompt_ids, prompt_length, seen_ids
from mmjax.generation.stopping import Stops
from mmjax.types import Array, Bool, Float, Int

FAR = -1e9
"""A sum of log-probabilities that no beam has: transformers' own number, as it takes part in comparisons."""


class Group(NamedTuple):
    """Beams that compete with one another, running ones and those that have ended; both [b, k, ...], the best first."""

    ids: Int[Array, "b k t"]
    sums: Float[Array, "b k"]
    ended_ids: Int[Array, "b k t"]
    ended_scores: Float[Array, "b k"]
    ended: Bool[Array, "b k"]
    open: Bool[Array, "b"]
    seen: Bool[Array, "b k v"] | None
    stop: Int[Array, "b k"]
    all_hit: Bool[Array, ""]


class Beams(NamedTuple):
    """All groups' beams; the rows of `state` are theirs, group after group. prompt: see `scores.prompt_ids`."""

    state: DecodeState
    groups: tuple[Group, ...]
    written: Int[Array, ""]
    prompt: Int[Array, "b l"] | None


def search(
    decodable: Decodable,
    options: GenerationOptions,
    variables: Mapping[str, Any],
    inputs: Mapping[str, Any],
    stops: Stops | None,
) -> tuple[Int[Array, "b n t"], Float[Array, "b n"], Int[Array, "b n"]]:
    """(ids, scores, groups) of the best num_return_sequences beams of each item, the best first.

    Raises MmjaxError where `beam_rules` count the ids of a prompt that holds none.
    """
    rows, room = options.num_beams, options.max_new_tokens
    logits, state = decodable.prefill(variables, inputs, rows, room)
    b, v = logits.shape
    size = rows // options.num_beam_groups
    prompt = prompt_ids(inputs, options, b)
    if options.beam_rules.prompt_counted and prompt is not None and prompt.shape[1] == 0:
        raise MmjaxError(
            "beam_rules count the prompt's ids, embeddings alone have none: bos= tells what they stand for"
        )
    empty = jnp.full((b, size, room), options.pad, jnp.int32)
    first = jnp.where(jnp.arange(size) == 0, 0.0, FAR)
    group = Group(
        ids=empty,
        sums=jnp.broadcast_to(first, (b, size)),
        ended_ids=empty,
        ended_scores=jnp.full((b, size), FAR),
        ended=jnp.zeros((b, size), bool),
        open=jnp.ones(b, bool),
        seen=seen_ids(prompt, options, (b, size, v)),
        stop=stopping.begin(stops, b, size),
        all_hit=jnp.array(False),
    )
    beams = Beams(state, (group,) * options.num_beam_groups, jnp.int32(0), prompt)
    beams = extend(options, jnp.broadcast_to(logits[:, None], (b, rows, v)), beams, stops)

    def body(beams: Beams) -> Beams:
        ids = jnp.concatenate([group.ids for group in beams.groups], axis=1)
        last = jax.lax.dynamic_index_in_dim(ids, beams.written - 1, axis=-1, keepdims=False)
        logits, state = decodable.step(variables, last, beams.state)
        return extend(options, logits, beams._replace(state=state), stops)

    beams = jax.lax.while_loop(lambda beams: going(options, beams), body, beams)
    groups = [_end_open(options, group, beams) for group in beams.groups]
    ids, scores = (jnp.concatenate(parts, axis=1) for parts in zip(*((g.ended_ids, g.ended_scores) for g in groups)))
    best, places = jax.lax.top_k(scores, options.num_return_sequences)
    return _of(ids, places), best, places // size


def going(options: GenerationOptions, beams: Beams) -> Bool[Array, ""]:
    """Whether any item can still change."""
    more = jnp.array(False)
    for group in beams.groups:
        more = more | (jnp.any(group.open) & ~group.all_hit & ~jnp.all(_filled(options, group)))
    return more & (beams.written < options.max_new_tokens)


def extend(options: GenerationOptions, logits: Float[Array, "b r v"], beams: Beams, stops: Stops | None) -> Beams:
    """One token more for every beam, given the logits behind its last."""
    size, v = options.num_beams // options.num_beam_groups, logits.shape[-1]
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    groups, sources, chosen = [], [], jnp.zeros((len(logits), 1, v))
    for i, group in enumerate(beams.groups):
        own = scores[:, i * size : (i + 1) * size] - (options.diversity_penalty * chosen if i else 0)
        extended, source, tokens = _extend(options, own, group, beams, stops)
        if options.num_beam_groups > 1:
            over = ~group.open | _filled(options, group)
            tokens = jnp.where(over[:, None], options.pad, tokens)
            chosen = chosen + jnp.sum(jax.nn.one_hot(tokens, v), axis=1, keepdims=True)
        groups.append(extended)
        sources.append(source + i * size)
    source = jnp.concatenate(sources, axis=1)
    rows = jax.tree.map(lambda leaf: _moved(leaf, source), beams.state.rows)
    state = beams.state._replace(rows=rows)
    return beams._replace(state=state, groups=tuple(groups), written=beams.written + 1)


def _extend(
    options: GenerationOptions, scores: Float[Array, "b k v"], group: Group, beams: Beams, stops: Stops | None
) -> tuple[Group, Int[Array, "b k"], Int[Array, "b k"]]:
    """A group after one token more, which of its beams each has come from, and the token."""
    rules, (_, k, v) = options.beam_rules, scores.shape
    scores = constrain(scores, options, beams.written, group.seen, group.ids, beams.prompt) + group.sums[..., None]
    sums, flat = jax.lax.top_k(rearrange(scores, "b k v -> b (k v)"), max(2, 1 + len(options.eos)) * k)
    parents, tokens = flat // v, (flat % v).astype(jnp.int32)
    closing = jnp.isin(tokens, jnp.asarray(options.eos, jnp.int32))
    if rules.first_eos_closes and len(options.eos) > 1:
        tokens = jnp.where(closing, options.eos[0], tokens)
    ids = jax.lax.dynamic_update_slice(_of(group.ids, parents), tokens[..., None], (0, 0, beams.written))
    written = beams.written + 1
    stop = stopping.advance(stops, _of(group.stop, parents), tokens)
    ends = closing | stopping.matched(stops, stop)
    hit = ends if rules.open_added else ends | (written >= options.max_new_tokens)

    running, places = jax.lax.top_k(sums + jnp.where(hit, FAR, 0.0), k)
    source, tokens = _of(parents, places), _of(tokens, places)
    seen = group.seen
    if seen is not None:
        b, r = (jnp.arange(n) for n in tokens.shape)
        seen = _of(seen, source).at[b[:, None], r[None], tokens].set(True)
    length = _counted(options, beams, written)
    if not rules.eos_counted:
        length = length - closing
    takes = hit & (jnp.arange(hit.shape[1]) < k)
    group = _end(options, group, ids, _normalised(options, sums, length), takes)
    best = sums[:, 0] if rules.bound_of_all else running[:, 0]
    group = group._replace(
        ids=_of(ids, places),
        sums=running,
        open=group.open & _can_improve(options, group, best, beams),
        seen=seen,
        stop=_of(stop, places),
        all_hit=jnp.all(hit),
    )
    return group, source, tokens


def _counted(options: GenerationOptions, beams: Beams, written: Array | int) -> Int[Array, ""]:
    """The length of so many tokens, with the prompt where the rules count it."""
    if not options.beam_rules.prompt_counted or beams.prompt is None:
        return jnp.asarray(written)
    return prompt_length(beams.prompt) + written


def _normalised(options: GenerationOptions, sums: Float[Array, "b *m"], length: Array) -> Float[Array, "b *m"]:
    """Sums of log-probabilities as beams of different lengths are compared by them."""
    length = length.astype(jnp.float32)
    return sums / ((5 + length) / 6 if options.beam_rules.gnmt else length) ** options.length_penalty


def _filled(options: GenerationOptions, group: Group) -> Bool[Array, "b"]:
    """Which items have as many ended beams as stop them early."""
    return jnp.all(group.ended, axis=-1) & (options.early_stopping is True)


def _end(options: GenerationOptions, group: Group, ids: Array, scores: Array, takes: Array) -> Group:
    """With the best of what had ended and what ends now, [b, m]: those that `takes` tells, of items that are open."""
    takes = takes & group.open[:, None] & ~_filled(options, group)[:, None]
    scores = jnp.concatenate([group.ended_scores, jnp.where(takes, scores, FAR)], axis=1)
    best, places = jax.lax.top_k(scores, group.ended.shape[1])
    both = jnp.concatenate([group.ended_ids, ids], axis=1)
    taken = jnp.concatenate([group.ended, takes], axis=1)
    return group._replace(ended_ids=_of(both, places), ended_scores=best, ended=_of(taken, places))


def _end_open(options: GenerationOptions, group: Group, beams: Beams) -> Group:
    """After the last token: with the beams that would run on, where the rules let them all compete."""
    if not options.beam_rules.open_added:
        return group
    scores = _normalised(options, group.sums, _counted(options, beams, beams.written))
    return _end(options, group, group.ids, scores, group.sums > FAR / 2)


def _can_improve(options: GenerationOptions, group: Group, best: Array, beams: Beams) -> Bool[Array, "b"]:
    """Whether what runs on, the sum of its best being `best`, could still take a place; beams: as they were before."""
    written = beams.written + (0 if options.beam_rules.bound_lags else 1)
    if options.early_stopping == "never" and options.length_penalty > 0:
        written = options.max_new_tokens
    worst = jnp.where(jnp.all(group.ended, axis=-1), jnp.min(group.ended_scores, axis=-1), FAR)
    return _normalised(options, best, _counted(options, beams, written)) > worst


def _moved(leaf: Array, source: Int[Array, "b r"]) -> Array:
    """A leaf of `DecodeState.rows`, each row in the place of those that come from it."""
    b, r = source.shape
    places = (jnp.arange(b)[:, None] * r + source).reshape(-1)
    return leaf.reshape(b * r, -1, *leaf.shape[1:])[places].reshape(leaf.shape)


def _of(values: Array, places: Int[Array, "b m"]) -> Array:
    """values[i, places[i, j]]."""
    return jnp.take_along_axis(values, places.reshape(*places.shape, *[1] * (values.ndim - 2)), axis=1)
