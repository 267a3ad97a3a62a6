"""The engine: prompts in, ids out, by one program a shape; whole, or as they come."""

import functools
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.generation import beam_search, sampling
from mmjax.generation.decodable import Decodable, DecodeState
from mmjax.generation.options import GenerationOptions
from mmjax.generation.stopping import Stops
from mmjax.types import Array, Float, Int, PRNGKeyArray


class Generated(NamedTuple):
    """ids: int32 [b, n, t], pad behind a row's end; scores: float32 [b, n], summed log-probabilities, for beams divided
    by length ** length_penalty. state: what the model remembers (not of a beam search). groups: int32 [b, n], the group
    that each beam is of, from 0 (of a beam search alone)."""

    ids: Int[Array, "b n t"]
    scores: Float[Array, "b n"]
    state: DecodeState | None = None
    groups: Int[Array, "b n"] | None = None


def generate(
    decodable: Decodable,
    variables: Mapping[str, Any],
    inputs: Mapping[str, Any],
    options: GenerationOptions,
    rng: PRNGKeyArray | int = 0,
    stops: Stops | None = None,
) -> Generated:
    """All tokens of all items.

    inputs: see `Decodable`; arrays [b, ...]. rng: a key or a seed, for draws alone. decodable: hashable.
    One item's tokens do not depend on what else is in the batch, but for rounding.
    """
    rng = jax.random.key(rng) if isinstance(rng, int) else rng
    if options.num_beams > 1:
        ids, scores, groups = _search(decodable, options, variables, dict(inputs), stops)
        return Generated(ids, scores, groups=groups)
    carry = _sample(decodable, options, variables, dict(inputs), rng, stops)
    return Generated(carry.ids, carry.scores, carry.state)


def stream(
    decodable: Decodable,
    variables: Mapping[str, Any],
    inputs: Mapping[str, Any],
    options: GenerationOptions,
    rng: PRNGKeyArray | int = 0,
    stops: Stops | None = None,
    every: int = 1,
) -> Generator[np.ndarray, None, DecodeState]:
    """The same tokens as `generate`'s, int32 [b, n, m], as they come: m is `every`, but for the first and last.

    The generator's own result is what the model remembers.
    Raises ValueError for a beam search, whose past tokens change.
    """
    if options.num_beams > 1:
        raise ValueError("a beam search has no tokens to tell before it ends")
    rng = jax.random.key(rng) if isinstance(rng, int) else rng
    carry = _begin(decodable, options, variables, dict(inputs), rng, stops)
    told = 0
    while True:
        written, done = int(carry.written), bool(jnp.all(carry.done))
        yield np.asarray(carry.ids[..., told:written])
        told = written
        if done or written >= options.max_new_tokens:
            return carry.state
        carry = _advance(decodable, options, variables, carry, min(written + every, options.max_new_tokens), stops)


_begin = functools.partial(jax.jit, static_argnums=(0, 1))(sampling.begin)
_advance = functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)(sampling.advance)
_search = functools.partial(jax.jit, static_argnums=(0, 1))(beam_search.search)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(
    decodable: Decodable,
    options: GenerationOptions,
    variables: Mapping[str, Any],
    inputs: Mapping[str, Any],
    rng: PRNGKeyArray,
    stops: Stops | None,
) -> sampling.Sampling:
    carry = sampling.begin(decodable, options, variables, inputs, rng, stops)
    return sampling.advance(decodable, options, variables, carry, options.max_new_tokens, stops)
