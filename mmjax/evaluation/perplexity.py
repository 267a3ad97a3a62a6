"""Perplexity of a causal language model on a text longer than its context, in overlapping windows.

    score = perplexity(lambda params, ids, mask: network.apply({"params": params}, ids, mask), params, ids,
                       length=1024, stride=512)

A window begins `stride` tokens after the previous one and is scored on the tokens that no earlier window contains: each
token except the first of the text counts once, and after the first window each has at least length - stride tokens of
context. A stride of length - 1 is the cheapest and the most pessimistic; 1 gives each token the most context.

    >>> windows([5, 6, 7, 8, 9], length=3, stride=2).labels.tolist()  # of each token the next one
    [[6, 7, -100], [8, 9, -100]]
    >>> uniform = lambda params, ids, mask: jnp.zeros((*ids.shape, 10))
    >>> print(f"{perplexity(uniform, None, [5, 6, 7, 8, 9], length=3).value:.1f}")
    10.0
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.evaluation.bootstrap import bootstrap_interval
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score
from mmjax.objectives.classification import softmax_cross_entropy
from mmjax.objectives.language import IGNORED, next_tokens
from mmjax.types import Array, ArrayLike, Bool, Float, Int, Params

Logits = Callable[[Any, Array, Array], Array]
"""(variables, ids [b, l], mask [b, l], true at tokens) -> logits [b, l, v] of the next token at each position."""


class Windows(NamedTuple):
    """ids: 0 after the end of the text. mask: true at tokens. labels: the next token at each position, `IGNORED` where
    it is not scored."""

    ids: Int[np.ndarray, "w l"]
    mask: Bool[np.ndarray, "w l"]
    labels: Int[np.ndarray, "w l"]


def windows(ids: Int[ArrayLike, " n"], length: int, stride: int) -> Windows:
    """Cuts a text into windows. Raises MmjaxError: fewer than two tokens, length < 2, or stride not in [1, length)."""
    text = np.asarray(ids)
    if text.ndim != 1 or len(text) < 2 or not np.issubdtype(text.dtype, np.integer):
        raise MmjaxError(f"perplexity: ids should be [n], at least two integers, not {text.dtype} {list(text.shape)}")
    if length < 2 or not 1 <= stride < length:
        raise MmjaxError(f"perplexity: length={length} (at least 2) and stride={stride} (from 1 to below the length)")
    starts = np.arange(0, max(len(text) - length, 0) + stride, stride)
    starts = starts[: 1 + int(np.argmax(starts + length >= len(text)))]
    positions = starts[:, None] + np.arange(length)
    mask = positions < len(text)
    cut = np.where(mask, text[np.minimum(positions, len(text) - 1)], 0).astype(np.int32)
    fresh = (positions >= np.r_[0, starts[:-1] + length][:, None]) & mask
    labels = np.full_like(cut, IGNORED)
    labels[:, :-1] = np.where(fresh, cut, IGNORED)[:, 1:]
    return Windows(cut, mask, labels)


@functools.partial(jax.jit, static_argnames="logits")
def _nll(logits: Logits, variables: Any, ids: Array, mask: Array, labels: Array) -> Float[Array, "w"]:
    """Negative log-likelihood in nats, summed over the scored tokens of each window."""
    scores = logits(variables, ids, mask)
    each = softmax_cross_entropy(scores.reshape(-1, scores.shape[-1]), jnp.maximum(labels, 0).reshape(-1))
    return jnp.sum(jnp.where(labels == IGNORED, 0.0, each.reshape(labels.shape)), axis=1)


def perplexity(
    logits: Logits,
    variables: Any,
    ids: Int[ArrayLike, " n"],
    *,
    length: int,
    stride: int | None = None,
    batch_size: int = 8,
    resamples: int = 1000,
    seed: int = 0,
) -> Score:
    """exp of the mean negative log-likelihood of a text's tokens; the interval resamples windows; chance: v.

    Args:
        logits: see `Logits`; compiled once per function and shape.
        length: tokens of a window. stride: None: half the length.
        batch_size: windows per batch.

    Raises MmjaxError: see `windows`; or a token outside the vocabulary.
    """
    cut = windows(ids, length, max(length // 2, 1) if stride is None else stride)
    return _score(logits, variables, cut, batch_size, resamples, seed)


def _score(logits: Logits, variables: Any, cut: Windows, batch_size: int, resamples: int, seed: int) -> Score:
    batch_size = min(batch_size, len(cut.ids))
    missing = -len(cut.ids) % batch_size
    padded = [np.concatenate([x, np.repeat(x[-1:], missing, 0)]) for x in cut]
    vocabulary = jax.eval_shape(logits, variables, *(jnp.asarray(x[:batch_size]) for x in padded[:2])).shape[-1]
    if cut.ids.min() < 0 or cut.ids.max() >= vocabulary:
        raise MmjaxError(f"perplexity: tokens from {cut.ids.min()} to {cut.ids.max()}, a vocabulary of {vocabulary}")
    parts = [
        _nll(logits, variables, *(jnp.asarray(x[i : i + batch_size]) for x in padded))
        for i in range(0, len(padded[0]), batch_size)
    ]
    sums = np.concatenate([np.asarray(part, np.float64) for part in parts])[: len(cut.ids)]
    counts = (cut.labels != IGNORED).sum(1).astype(np.float64)

    def mean(totals: np.ndarray) -> np.ndarray:
        return np.exp(totals[..., 0] / totals[..., 1])

    low, high = bootstrap_interval(np.stack([sums, counts], 1), mean, resamples, seed)
    value = float(np.exp(sums.sum() / counts.sum()))
    return Score(value, int(counts.sum()), low, high, float(vocabulary), "perplexity")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PerplexityEvaluation(ScoredEvaluation):
    """`perplexity` of validation sequences, each scored independently; the interval resamples sequences.

    Attributes:
        logits: (params, ids [b, l], mask [b, l]) -> logits [b, l, v].
        columns: {"input_ids", "labels"} [n, l] of `mmjax.text.packing`; labels are aligned with their ids, not shifted.
    """

    name: str = "perplexity"
    logits: Logits
    columns: Mapping[str, np.ndarray]
    batch_size: int = 8

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        ids, labels = self.columns["input_ids"], np.asarray(next_tokens(jnp.asarray(self.columns["labels"])))
        cut = Windows(ids, np.ones(ids.shape, bool), labels)
        score = _score(self.logits, params, cut, self.batch_size, 1000, 0)
        return Outcome({"perplexity": score}, {"perplexity_rows": len(ids)})
