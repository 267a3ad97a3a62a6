"""Beam search as one compiled loop, by the rules of transformers 5 (generation/utils.py, `_beam_search`) or older ones.

For each item with K beams, the best max(2, 1 + number of eos ids) K continuations are candidates. Finished candidates
among the first K compete for K slots by their sum of log-probabilities / length ** length_penalty; the best K
unfinished ones continue. An item is closed when its running beams can no longer win (`early_stopping`). `BeamRules`
defines lengths and the closing rules of older versions. Groups of beams have K beams and slots each.
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
from mmjax.generation.scores import constrain, occurring_ids, prompt_ids, prompt_length
from mmjax.generation.stopping import Stops
from mmjax.types import Array, Bool, Float, Int

FAR = -1e9
"""A sum of log-probabilities that no beam has. The value is transformers', since it takes part in comparisons."""


class Group(NamedTuple):
    """Beams that compete with each other, running and finished ones; both [b, k, ...], the best first.

    occurred: ids in each beam and its prompt, for penalties. stop: states of the stop-string automaton.
    all_hit: every candidate of the last step finished.
    """

    ids: Int[Array, "b k t"]
    sums: Float[Array, "b k"]
    ended_ids: Int[Array, "b k t"]
    ended_scores: Float[Array, "b k"]
    ended: Bool[Array, "b k"]
    open: Bool[Array, "b"]
    occurred: Bool[Array, "b k v"] | None
    stop: Int[Array, "b k"]
    all_hit: Bool[Array, ""]


class Beams(NamedTuple):
    """The beams of all groups; the rows of `state` are these beams, group after group. prompt: see
    `scores.prompt_ids`."""

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

    Raises MmjaxError if `beam_rules` count the ids of a prompt without ids.
    """
    beams, capacity = options.num_beams, options.max_new_tokens
    logits, state = decodable.prefill(variables, inputs, beams, capacity)
    b, v = logits.shape
    size = beams // options.num_beam_groups
    prompt = prompt_ids(inputs, options, b)
    if options.beam_rules.prompt_counted and prompt is not None and prompt.shape[1] == 0:
        raise MmjaxError(
            "beam_rules count the prompt's ids, and a prompt of embeddings has none: set bos= to the id it represents"
        )
    empty = jnp.full((b, size, capacity), options.pad, jnp.int32)
    first = jnp.where(jnp.arange(size) == 0, 0.0, FAR)
    group = Group(
        ids=empty,
        sums=jnp.broadcast_to(first, (b, size)),
        ended_ids=empty,
        ended_scores=jnp.full((b, size), FAR),
        ended=jnp.zeros((b, size), bool),
        open=jnp.ones(b, bool),
        occurred=occurring_ids(prompt, options, (b, size, v)),
        stop=stopping.begin(stops, b, size),
        all_hit=jnp.array(False),
    )
    carry = Beams(state, (group,) * options.num_beam_groups, jnp.int32(0), prompt)
    carry = extend(options, jnp.broadcast_to(logits[:, None], (b, beams, v)), carry, stops)

    def body(carry: Beams) -> Beams:
        ids = jnp.concatenate([group.ids for group in carry.groups], axis=1)
        last = jax.lax.dynamic_index_in_dim(ids, carry.written - 1, axis=-1, keepdims=False)
        logits, state = decodable.step(variables, last, carry.state)
        return extend(options, logits, carry._replace(state=state), stops)

    carry = jax.lax.while_loop(lambda carry: unfinished(options, carry), body, carry)
    groups = [_end_open(options, group, carry) for group in carry.groups]
    ids, scores = (jnp.concatenate(parts, axis=1) for parts in zip(*((g.ended_ids, g.ended_scores) for g in groups)))
    best, indices = jax.lax.top_k(scores, options.num_return_sequences)
    return _take(ids, indices), best, indices // size


def unfinished(options: GenerationOptions, beams: Beams) -> Bool[Array, ""]:
    """Whether any item can still change."""
    more = jnp.array(False)
    for group in beams.groups:
        more = more | (jnp.any(group.open) & ~group.all_hit & ~jnp.all(_filled(options, group)))
    return more & (beams.written < options.max_new_tokens)


def extend(options: GenerationOptions, logits: Float[Array, "b r v"], beams: Beams, stops: Stops | None) -> Beams:
    """Extends every beam by one token, from the logits of its next token."""
    size, v = options.num_beams // options.num_beam_groups, logits.shape[-1]
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    groups, sources, chosen = [], [], jnp.zeros((len(logits), 1, v))
    for i, group in enumerate(beams.groups):
        group_scores = scores[:, i * size : (i + 1) * size] - (options.diversity_penalty * chosen if i else 0)
        extended, source, tokens = _extend(options, group_scores, group, beams, stops)
        if options.num_beam_groups > 1:
            closed = ~group.open | _filled(options, group)
            tokens = jnp.where(closed[:, None], options.pad, tokens)
            chosen = chosen + jnp.sum(jax.nn.one_hot(tokens, v), axis=1, keepdims=True)
        groups.append(extended)
        sources.append(source + i * size)
    source = jnp.concatenate(sources, axis=1)
    rows = jax.tree.map(lambda leaf: _reorder(leaf, source), beams.state.rows)
    state = beams.state._replace(rows=rows)
    return beams._replace(state=state, groups=tuple(groups), written=beams.written + 1)


def _extend(
    options: GenerationOptions, scores: Float[Array, "b k v"], group: Group, beams: Beams, stops: Stops | None
) -> tuple[Group, Int[Array, "b k"], Int[Array, "b k"]]:
    """The group extended by one token, the parent beam of each beam, and the new tokens."""
    rules, (_, k, v) = options.beam_rules, scores.shape
    scores = constrain(scores, options, beams.written, group.occurred, group.ids, beams.prompt) + group.sums[..., None]
    sums, flat = jax.lax.top_k(rearrange(scores, "b k v -> b (k v)"), max(2, 1 + len(options.eos)) * k)
    parents, tokens = flat // v, (flat % v).astype(jnp.int32)
    closing = jnp.isin(tokens, jnp.asarray(options.eos, jnp.int32))
    if rules.first_eos_closes and len(options.eos) > 1:
        tokens = jnp.where(closing, options.eos[0], tokens)
    ids = jax.lax.dynamic_update_slice(_take(group.ids, parents), tokens[..., None], (0, 0, beams.written))
    written = beams.written + 1
    stop = stopping.advance(stops, _take(group.stop, parents), tokens)
    ends = closing | stopping.matched(stops, stop)
    hit = ends if rules.open_added else ends | (written >= options.max_new_tokens)

    running, indices = jax.lax.top_k(sums + jnp.where(hit, FAR, 0.0), k)
    source, tokens = _take(parents, indices), _take(tokens, indices)
    occurred = group.occurred
    if occurred is not None:
        b, r = (jnp.arange(n) for n in tokens.shape)
        occurred = _take(occurred, source).at[b[:, None], r[None], tokens].set(True)
    length = _length(options, beams, written)
    if not rules.eos_counted:
        length = length - closing
    eligible = hit & (jnp.arange(hit.shape[1]) < k)
    group = _end(options, group, ids, _normalised(options, sums, length), eligible)
    best = sums[:, 0] if rules.bound_of_all else running[:, 0]
    group = group._replace(
        ids=_take(ids, indices),
        sums=running,
        open=group.open & _can_improve(options, group, best, beams),
        occurred=occurred,
        stop=_take(stop, indices),
        all_hit=jnp.all(hit),
    )
    return group, source, tokens


def _length(options: GenerationOptions, beams: Beams, written: Array | int) -> Int[Array, ""]:
    """The length of `written` tokens, plus the prompt's if the rules count it."""
    if not options.beam_rules.prompt_counted or beams.prompt is None:
        return jnp.asarray(written)
    return prompt_length(beams.prompt) + written


def _normalised(options: GenerationOptions, sums: Float[Array, "b *m"], length: Array) -> Float[Array, "b *m"]:
    """Sums of log-probabilities, normalised by length."""
    length = length.astype(jnp.float32)
    return sums / ((5 + length) / 6 if options.beam_rules.gnmt else length) ** options.length_penalty


def _filled(options: GenerationOptions, group: Group) -> Bool[Array, "b"]:
    """Items that early stopping closes: all their slots hold finished beams."""
    return jnp.all(group.ended, axis=-1) & (options.early_stopping is True)


def _end(options: GenerationOptions, group: Group, ids: Array, scores: Array, eligible: Array) -> Group:
    """Merges newly finished beams, those in the mask `eligible` [b, m], into the finished beams of open items."""
    eligible = eligible & group.open[:, None] & ~_filled(options, group)[:, None]
    scores = jnp.concatenate([group.ended_scores, jnp.where(eligible, scores, FAR)], axis=1)
    best, indices = jax.lax.top_k(scores, group.ended.shape[1])
    candidates = jnp.concatenate([group.ended_ids, ids], axis=1)
    ended = jnp.concatenate([group.ended, eligible], axis=1)
    return group._replace(ended_ids=_take(candidates, indices), ended_scores=best, ended=_take(ended, indices))


def _end_open(options: GenerationOptions, group: Group, beams: Beams) -> Group:
    """The group after the last token; running beams are added if the rules let them compete."""
    if not options.beam_rules.open_added:
        return group
    scores = _normalised(options, group.sums, _length(options, beams, beams.written))
    return _end(options, group, group.ids, scores, group.sums > FAR / 2)


def _can_improve(options: GenerationOptions, group: Group, best: Array, beams: Beams) -> Bool[Array, "b"]:
    """Whether a running beam, the best of which has the sum `best`, could still win a slot. beams: before this step."""
    written = beams.written + (0 if options.beam_rules.bound_lags else 1)
    if options.early_stopping == "never" and options.length_penalty > 0:
        written = options.max_new_tokens
    worst = jnp.where(jnp.all(group.ended, axis=-1), jnp.min(group.ended_scores, axis=-1), FAR)
    return _normalised(options, best, _length(options, beams, written)) > worst


def _reorder(leaf: Array, source: Int[Array, "b r"]) -> Array:
    """A leaf of `DecodeState.rows` in which row j of item i is the previous row source[i, j]."""
    b, r = source.shape
    indices = (jnp.arange(b)[:, None] * r + source).reshape(-1)
    return leaf.reshape(b * r, -1, *leaf.shape[1:])[indices].reshape(leaf.shape)


def _take(values: Array, indices: Int[Array, "b m"]) -> Array:
    """values[i, indices[i, j]]."""
    return jnp.take_along_axis(values, indices.reshape(*indices.shape, *[1] * (values.ndim - 2)), axis=1)
