"""The generation engine: prompts -> ids, one compiled program per shape; all tokens at once, or streamed."""

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
    """ids: int32 [b, n, t], pad after a sequence's end; scores: float32 [b, n], summed log-probabilities, for beams
    divided by length ** length_penalty. state: the final decode state (None for beam search). groups: int32 [b, n], the
    group of each beam, from 0 (beam search only)."""

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
    """Generates all tokens of all items.

    inputs: see `Decodable`; arrays [b, ...]. rng: a key or a seed, used by sampling only. decodable: hashable.
    An item's tokens do not depend on the other items of the batch, except for rounding.
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
    """Yields the tokens of `generate` as they are generated, int32 [b, n, m]; m is `every`, except first and last.

    The generator returns the final decode state.
    Raises ValueError for a beam search, whose past tokens change.
    """
    if options.num_beams > 1:
        raise ValueError("a beam search cannot stream: its tokens change until it ends")
    rng = jax.random.key(rng) if isinstance(rng, int) else rng
    carry = _begin(decodable, options, variables, dict(inputs), rng, stops)
    yielded = 0
    while True:
        written, done = int(carry.written), bool(jnp.all(carry.done))
        yield np.asarray(carry.ids[..., yielded:written])
        yielded = written
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
