"""What is done to a step's scores before a token is chosen: transformers' processors and warpers, in its order."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.generation.options import GenerationOptions
from mmjax.types import Array, Bool, Float, Int

NEVER = -jnp.inf


def seen_ids(
    inputs: Mapping[str, Any], options: GenerationOptions, shape: tuple[int, int, int]
) -> Bool[Array, "b r v"] | None:
    """Which ids each row's prompt holds, without its padding; None where no penalty asks. shape: (b, r, v).

    Of an encoder-decoder what the decoder begins with counts, not what the encoder reads; of embeddings nothing.
    """
    if options.repetition_penalty == 1:
        return None
    held = jnp.zeros((shape[0], shape[2]), bool)
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if ids is not None:
        mask = None if "decoder_input_ids" in inputs else inputs.get("attention_mask")
        kept = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
        held = held.at[jnp.arange(shape[0])[:, None], ids].max(kept)
    return jnp.broadcast_to(held[:, None], shape)


def constrain(
    scores: Float[Array, "b r v"],
    options: GenerationOptions,
    written: Int[Array, ""],
    seen: Bool[Array, "b r v"] | None,
    ids: Int[Array, "b r t"],
) -> Float[Array, "b r v"]:
    """Scores (logits, or log-probabilities in a beam search) after penalties and prohibitions; the forbidden are -inf.

    written: how many tokens the rows hold. seen: the ids of rows and prompts; asked where there is a penalty.
    ids: the rows' tokens so far, [b, r, max_new_tokens].
    """
    if seen is not None:
        penalised = jnp.where(scores < 0, scores * options.repetition_penalty, scores / options.repetition_penalty)
        scores = jnp.where(seen, penalised, scores)
    if options.no_repeat_ngram_size:
        scores = jnp.where(_repeating(ids, written, options.no_repeat_ngram_size, scores.shape[-1]), NEVER, scores)
    if options.suppress:
        scores = scores.at[..., jnp.asarray(options.suppress)].set(NEVER)
    if options.eos:
        ends = jnp.zeros(scores.shape[-1], bool).at[jnp.asarray(options.eos)].set(True)
        if options.min_new_tokens:
            scores = jnp.where(ends & (written < options.min_new_tokens), NEVER, scores)
        if options.forced_eos:
            forced = jnp.where(ends, 0.0, NEVER)
            scores = jnp.where(written == options.max_new_tokens - 1, forced, scores)
    return scores


def _repeating(ids: Int[Array, "b r t"], written: Int[Array, ""], size: int, vocabulary: int) -> Bool[Array, "b r v"]:
    """Which ids would complete a sequence of `size` ids that the row already holds."""
    length = ids.shape[-1]
    ends = jnp.arange(length)
    repeats = (ends >= size - 1) & (ends < written) & (written >= size - 1)
    for back in range(1, size):
        last = jax.lax.dynamic_index_in_dim(ids, jnp.maximum(written - back, 0), axis=-1)
        repeats = repeats & (jnp.roll(ids, back, axis=-1) == last)
    b, r = (jnp.arange(n) for n in ids.shape[:2])
    none = jnp.zeros((*ids.shape[:2], vocabulary), bool)
    return none.at[b[:, None, None], r[None, :, None], ids].max(jnp.broadcast_to(repeats, ids.shape))


def nucleus(logits: Float[Array, "*b v"], options: GenerationOptions) -> Float[Array, "*b v"]:
    """Logits divided by the temperature, -inf outside what may be drawn: top_k first, then top_p of what is left."""
    logits = logits / options.temperature
    vocabulary = logits.shape[-1]
    if 0 < options.top_k < vocabulary:
        kth = jax.lax.top_k(logits, options.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, NEVER, logits)
    if options.top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True)
        shares = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), axis=-1)
        # A token stays if what is likelier does not hold top_p yet; the likeliest always does.
        before = jnp.cumsum(shares, axis=-1) - shares
        stay = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, before < options.top_p, -1, inplace=False)
        logits = jnp.where(stay, logits, NEVER)
    return logits
