"""Greedy decoding and sampling: one compiled loop, which streaming leaves and enters again."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.generation import stopping
from mmjax.generation.decodable import Decodable, DecodeState
from mmjax.generation.options import GenerationOptions
from mmjax.generation.scores import constrain, nucleus, occurring_ids, prompt_ids
from mmjax.generation.stopping import Stops
from mmjax.types import Array, Bool, Float, Int, PRNGKeyArray


class Sampling(NamedTuple):
    """The carry of the decoding loop; r samples per item.

    ids: [b, r, t], pad where nothing is written yet. scores: [b, r], summed log-probabilities of the chosen tokens
    under the distributions they were chosen from. written: number of tokens per sample. done: samples that have ended.
    occurred: ids in each sample and its prompt, for penalties. stop: states of the stop-string automaton.
    """

    state: DecodeState
    ids: Int[Array, "b r t"]
    scores: Float[Array, "b r"]
    written: Int[Array, ""]
    done: Bool[Array, "b r"]
    prompt: Int[Array, "b l"] | None
    occurred: Bool[Array, "b r v"] | None
    stop: Int[Array, "b r"]
    rng: PRNGKeyArray


def begin(
    decodable: Decodable,
    options: GenerationOptions,
    variables: Mapping[str, Any],
    inputs: Mapping[str, Any],
    rng: PRNGKeyArray,
    stops: Stops | None,
) -> Sampling:
    """Processes the prompt and chooses the first token of each sample."""
    samples, capacity = options.num_return_sequences, options.max_new_tokens
    # The last token is not processed: a capacity of one less would do, but not a capacity of 0.
    logits, state = decodable.prefill(variables, inputs, samples, capacity)
    b, v = logits.shape
    prompt = prompt_ids(inputs, options, b)
    occurred = occurring_ids(prompt, options, (b, samples, v))
    empty = jnp.full((b, samples, capacity), options.pad, jnp.int32)
    stop = stopping.begin(stops, b, samples)
    done = jnp.zeros((b, samples), bool)
    start = Sampling(state, empty, jnp.zeros((b, samples)), jnp.int32(0), done, prompt, occurred, stop, rng)
    return choose(options, jnp.broadcast_to(logits[:, None], (b, samples, v)), start, stops)


def choose(options: GenerationOptions, logits: Float[Array, "b r v"], carry: Sampling, stops: Stops | None) -> Sampling:
    """Chooses the next token of every sample from its logits."""
    scores = constrain(logits.astype(jnp.float32), options, carry.written, carry.occurred, carry.ids, carry.prompt)
    if options.temperature > 0:
        scores = nucleus(scores, options)
        keys = _keys(carry.rng, carry.written, scores.shape[:2])
        token = jax.vmap(jax.vmap(jax.random.categorical))(keys, scores)
    else:
        token = jnp.argmax(scores, axis=-1)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), token[..., None], -1)[..., 0]
    token = jnp.where(carry.done, options.pad, token).astype(jnp.int32)
    stop = stopping.advance(stops, carry.stop, token)
    ended = jnp.isin(token, jnp.asarray(options.eos, jnp.int32)) | stopping.matched(stops, stop)
    occurred = carry.occurred
    if occurred is not None:
        b, r = (jnp.arange(n) for n in token.shape)
        occurred = occurred.at[b[:, None], r[None], token].set(True)
    return carry._replace(
        ids=jax.lax.dynamic_update_slice(carry.ids, token[..., None], (0, 0, carry.written)),
        scores=carry.scores + jnp.where(carry.done, 0.0, chosen),
        written=carry.written + 1,
        done=carry.done | ended,
        occurred=occurred,
        stop=jnp.where(carry.done, carry.stop, stop),
    )


def _keys(rng: PRNGKeyArray, written: Array, shape: tuple[int, ...]) -> Array:
    """A key for each sample and step, independent of the rest of the batch."""
    rng = jax.random.fold_in(rng, written)
    items = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(shape[0]))
    return jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(shape[1])))(items)


def advance(
    decodable: Decodable,
    options: GenerationOptions,
    variables: Mapping[str, Any],
    carry: Sampling,
    until: Int[Array, ""] | int,
    stops: Stops | None,
) -> Sampling:
    """Generates until every sample has `until` tokens, or all have ended."""

    def unfinished(carry: Sampling) -> Array:
        return (carry.written < until) & ~jnp.all(carry.done)

    def body(carry: Sampling) -> Sampling:
        last = jax.lax.dynamic_index_in_dim(carry.ids, carry.written - 1, axis=-1, keepdims=False)
        logits, state = decodable.step(variables, last, carry.state)
        return choose(options, logits, carry._replace(state=state), stops)

    return jax.lax.while_loop(unfinished, body, carry)
