"""Changes to a step's scores before a token is chosen: transformers' processors and warpers, in its order."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.generation.options import GenerationOptions
from mmjax.types import Array, Bool, Float, Int

NEVER = -jnp.inf


def prompt_ids(inputs: Mapping[str, Any], options: GenerationOptions, b: int) -> Int[Array, "b l"] | None:
    """The ids of each prompt, left-padded with -1; None if no option needs them.

    These are the decoder_input_ids if present (encoder-decoders need them explicitly), else the input_ids; for
    embeddings only, `options.bos` or none. Padding is excluded (transformers counts it in n-grams).
    """
    counted = options.num_beams > 1 and options.beam_rules.prompt_counted
    penalised = options.repetition_penalty != 1 or options.no_repeat_ngram_size > 0
    if not (counted or penalised or options.forced_bos is not None):
        return None
    prefix = "decoder_" if "decoder_input_ids" in inputs else ""
    ids, mask = (inputs.get(f"{prefix}{name}") for name in ("input_ids", "attention_mask"))
    if ids is None:
        return jnp.full((b, 0 if options.bos is None else 1), options.bos or 0, jnp.int32)
    mask = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
    return jnp.take_along_axis(jnp.where(mask, ids, -1), jnp.argsort(mask, axis=-1), axis=-1).astype(jnp.int32)


def prompt_length(prompt: Int[Array, "b l"]) -> Int[Array, ""]:
    """The number of ids of the longest prompt."""
    return jnp.max(jnp.sum(prompt >= 0, axis=-1))


def occurring_ids(
    prompt: Int[Array, "b l"] | None, options: GenerationOptions, shape: tuple[int, int, int]
) -> Bool[Array, "b r v"] | None:
    """Mask of the ids in each sequence's prompt; None without a repetition penalty. shape: (b, r, v)."""
    if options.repetition_penalty == 1 or prompt is None:
        return None
    occurred = jnp.zeros((shape[0], shape[2]), bool)
    occurred = occurred.at[jnp.arange(shape[0])[:, None], prompt].max(prompt >= 0)
    return jnp.broadcast_to(occurred[:, None], shape)


def constrain(
    scores: Float[Array, "b r v"],
    options: GenerationOptions,
    written: Int[Array, ""],
    occurred: Bool[Array, "b r v"] | None,
    ids: Int[Array, "b r t"],
    prompt: Int[Array, "b l"] | None,
) -> Float[Array, "b r v"]:
    """Scores (logits, or log-probabilities in a beam search) after penalties; forbidden ids are -inf.

    written: number of generated tokens. occurred: mask of the ids in each sequence and its prompt, for the repetition
    penalty. ids: the generated tokens, [b, r, max_new_tokens]. prompt: see `prompt_ids`.
    """
    if occurred is not None:
        penalised = jnp.where(scores < 0, scores * options.repetition_penalty, scores / options.repetition_penalty)
        scores = jnp.where(occurred, penalised, scores)
    if options.no_repeat_ngram_size and prompt is not None:
        prompts = jnp.broadcast_to(prompt[:, None], (*ids.shape[:2], prompt.shape[1]))
        sequence, length = jnp.concatenate([prompts, ids], axis=-1), prompt.shape[1] + written
        scores = jnp.where(_repeating(sequence, length, options.no_repeat_ngram_size, scores.shape[-1]), NEVER, scores)
    if options.suppress:
        scores = scores.at[..., jnp.asarray(options.suppress)].set(NEVER)
    ends = jnp.zeros(scores.shape[-1], bool).at[jnp.asarray(options.eos, jnp.int32)].set(True)
    if options.eos and options.min_new_tokens:
        scores = jnp.where(ends & (written < options.min_new_tokens), NEVER, scores)
    if options.forced_bos is not None and prompt is not None:
        forced = jnp.full(scores.shape[-1], NEVER).at[options.forced_bos].set(0.0)
        scores = jnp.where(prompt_length(prompt) + written == 1, forced, scores)
    if options.eos and options.forced_eos:
        forced = jnp.where(ends, 0.0, NEVER)
        scores = jnp.where(written == options.max_new_tokens - 1, forced, scores)
    return scores


def _repeating(ids: Int[Array, "b r t"], written: Int[Array, ""], size: int, vocabulary: int) -> Bool[Array, "b r v"]:
    """Mask of ids that would complete an n-gram of `size` ids that occurs in the first `written` ids; -1 is no id."""
    length = ids.shape[-1]
    ends = jnp.arange(length)
    repeats = (ids >= 0) & (ends >= size - 1) & (ends < written) & (written >= size - 1)
    for back in range(1, size):
        last = jax.lax.dynamic_index_in_dim(ids, jnp.maximum(written - back, 0), axis=-1)
        repeats = repeats & (jnp.roll(ids, back, axis=-1) == last)
    b, r = (jnp.arange(n) for n in ids.shape[:2])
    none = jnp.zeros((*ids.shape[:2], vocabulary), bool)
    return none.at[b[:, None, None], r[None, :, None], ids].max(jnp.broadcast_to(repeats, ids.shape))


def nucleus(logits: Float[Array, "*b v"], options: GenerationOptions) -> Float[Array, "*b v"]:
    """Logits divided by the temperature, -inf for tokens excluded by top_k, then by top_p of the rest."""
    logits = logits / options.temperature
    vocabulary = logits.shape[-1]
    if 0 < options.top_k < vocabulary:
        kth = jax.lax.top_k(logits, options.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, NEVER, logits)
    if options.top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True)
        shares = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), axis=-1)
        # A token is included if the more probable ones do not reach top_p; the most probable one always is.
        before = jnp.cumsum(shares, axis=-1) - shares
        included = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, before < options.top_p, -1, inplace=False)
        logits = jnp.where(included, logits, NEVER)
    return logits
