"""Losses of language models: cross-entropy of tokens from logits, or from hidden states without materialised logits.

All count the tokens whose label is not `IGNORED`. Some return the mean over them, as torch's `cross_entropy` does, but
before its division (`mmjax.types.Mean`): devices and micro-batches may count different numbers of tokens. Others return
the sum over each text's tokens, which ranks answers and trains answer decoders.

    >>> ids = jnp.array([[4, 2, 7]])
    >>> next_tokens(ids).tolist()
    [[2, 7, -100]]
    >>> loss = token_cross_entropy(jnp.zeros((1, 3, 10)), next_tokens(ids))
    >>> nll = loss.nll.value
    >>> print(f"{nll:.3f} nats, perplexity {perplexity(nll):.1f}, {loss.nll.count:.0f} tokens")
    2.303 nats, perplexity 10.0, 2 tokens
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.nn import int8
from mmjax.nn.groups import group_totals
from mmjax.objectives.distillation import distilled_cross_entropy
from mmjax.types import Array, Bool, Float, Int, Mean

IGNORED = -100
"""The label of a token that is not counted (torch's and transformers' ignore_index)."""
BLOCK = 2**25
"""Number of logits that `linear_cross_entropy` holds at a time by default: 128 MiB."""


class TokenLoss(NamedTuple):
    """Float32 means over tokens; each `.count` is the number of counted tokens, or the sum of their weights.

    Attributes:
        loss: to be minimised, with smoothing and z-loss. Its value is NaN, which a train step refuses, if no token is
            counted or a counted label is outside the vocabulary.
        nll: negative log-likelihood without smoothing and z-loss, in nats, for `perplexity`. Without a gradient.
    """

    loss: Mean
    nll: Mean


def next_tokens(
    ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | Int[Array, "b l"] | None = None
) -> Int[Array, "b l"]:
    """Labels of a causal model: for each token the next one, for the last `IGNORED`. The length stays l.

    ids: tokens, or labels some of which are already ignored. mask: false or 0 where there is no token.
    """
    labels = ids if mask is None else jnp.where(mask.astype(bool), ids, IGNORED)
    return jnp.concatenate([labels[:, 1:], jnp.full_like(labels[:, :1], IGNORED)], axis=1)


def shift_right(labels: Int[Array, "b l"], start: int, pad: int) -> Int[Array, "b l"]:
    """The inputs of an encoder-decoder's decoder for `labels`: the start token and the labels before.

    Ignored labels are padding.
    """
    before = jnp.where(labels == IGNORED, pad, labels)[:, :-1]
    return jnp.concatenate([jnp.full_like(labels[:, :1], start), before], axis=1)


def perplexity(nll: Float[Array, "*rest"]) -> Float[Array, "*rest"]:
    """exp of a mean negative log-likelihood in nats."""
    return jnp.exp(nll)


def token_cross_entropy(
    logits: Float[Array, "*b v"],
    labels: Int[Array, "*b"],
    *,
    weights: Float[Array, "*b"] | None = None,
    label_smoothing: Float[Array, ""] | float = 0.0,
    z_loss: Float[Array, ""] | float = 0.0,
    epsilon: float = 0.0,
) -> TokenLoss:
    """Mean over counted tokens of -sum_v q_v log softmax(logits)_v, in float32.

    Args:
        labels: token ids; tokens with the label `IGNORED` are not counted.
        weights: of each token in the mean; None: equal weights.
        label_smoothing: s in q = (1 - s) onehot + s / v (torch's; the original Transformer's spreads s over v - 1).
        z_loss: factor on log^2 of the softmax's normaliser, which keeps it near 1 (PaLM, arXiv 2204.02311, section 5).
        epsilon: added to the number of tokens: 1e-5 in Google's BERT (run_pretraining.py), whose loss of no token is 0.
    """
    losses, nll = _from_logits(logits, labels, label_smoothing, z_loss)
    return _means(losses, nll, labels, logits.shape[-1], weights, epsilon)


def distilled_token_cross_entropy(
    logits: Float[Array, "*b v"],
    teacher: Float[Array, "*b v"],
    labels: Int[Array, "*b"],
    alpha: Float[Array, ""] | float,
    weights: Float[Array, "*b"] | None = None,
) -> TokenLoss:
    """Mean over counted tokens of `distilled_cross_entropy`: ALBEF's masked language model (models/xbert.py:1423-1431).

    teacher: logits of the momentum model for the same tokens; without a gradient. weights: of each token in the mean;
    None: equal weights.
    """
    losses = _distilled(logits, teacher, labels, alpha)
    _, nll = _from_logits(logits, labels, 0.0, 0.0)
    return _means(losses, nll, labels, logits.shape[-1], weights, 0.0)


def group_mean_weights(
    labels: Int[Array, "b l"], groups: int = 1, axis_name: str | None = None
) -> Float[Array, "b l"] | None:
    """Weights of tokens by which their mean is the mean over groups of each group's mean over its counted tokens.

    The originals average so: a process has the mean over its tokens, and the gradients of processes are averaged. A
    group without a counted token, for which the originals have NaN, does not count. None for one group: equal weights,
    which also any cut into micro-batches leaves as they are.
    """
    if groups == 1:
        return None
    counts = group_totals(jnp.sum(labels != IGNORED, axis=1, dtype=jnp.float32), groups, axis_name)
    return jnp.where(labels != IGNORED, 1 / jnp.maximum(counts, 1)[:, None], 0.0)


def token_accuracy(logits: Float[Array, "*b v"], labels: Int[Array, "*b"]) -> Mean:
    """The share of labels with the largest logit, in [0, 1], of those that are not `IGNORED`."""
    return Mean.of((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32), labels != IGNORED)


def text_cross_entropy(
    logits: Float[Array, "*b l v"], labels: Int[Array, "*b l"], *, label_smoothing: Float[Array, ""] | float = 0.0
) -> Float[Array, "*b"]:
    """Each text's sum over its counted tokens of `token_cross_entropy`'s terms.

    0 where none is counted; NaN where a counted label is outside the vocabulary. Without smoothing this is minus the
    text's log-probability, by which ALBEF ranks answers. BLIP ranks with its smoothing of 0.1 (models/med.py:914).
    """
    losses, _ = _from_logits(logits, labels, label_smoothing, 0.0)
    return _sum(losses, labels, logits.shape[-1])


def distilled_text_cross_entropy(
    logits: Float[Array, "*b l v"],
    teacher: Float[Array, "*b l v"],
    labels: Int[Array, "*b l"],
    alpha: Float[Array, ""] | float,
) -> Float[Array, "*b"]:
    """Each text's sum over its counted tokens of `distilled_cross_entropy` (ALBEF's VQA, models/xbert.py:1290-1302).

    0 where none is counted; NaN where a counted label is outside the vocabulary. No gradient reaches the teacher.
    """
    losses = _distilled(logits, teacher, labels, alpha)
    return _sum(losses, labels, logits.shape[-1])


def answer_loss(losses: Float[Array, "*a"], weights: Float[Array, "*a"], questions: int) -> Float[Array, ""]:
    """sum(weights * losses) / questions: a question may have several answers, weighted by how common they are.

    An answer of weight 0 is padding and does not count, whatever its loss. If all devices have the same number of
    questions, the mean of their values is that of the global batch (ALBEF models/model_vqa.py, BLIP
    models/blip_vqa.py).
    """
    return jnp.sum(jnp.where(weights > 0, weights * losses, 0.0)) / questions


def linear_cross_entropy(
    hidden: Float[Array, "*b d"],
    kernel: int8.Matrix,
    labels: Int[Array, "*b"],
    *,
    tied: bool = False,
    bias: Float[Array, "v"] | None = None,
    added: tuple[Float[Array, "d n"] | Float[Array, "n d"], Float[Array, "n"] | None] | None = None,
    logit_scale: Float[Array, ""] | float = 1.0,
    weights: Float[Array, "*b"] | None = None,
    label_smoothing: Float[Array, ""] | float = 0.0,
    z_loss: Float[Array, ""] | float = 0.0,
    epsilon: float = 0.0,
    block: int | None = None,
) -> TokenLoss:
    """`token_cross_entropy` of logit_scale * hidden @ kernel + bias, one block of the vocabulary after the other.

    Logits and their gradient are computed twice, in the forward and in the backward pass, and never more than one block
    of them exists at a time. Products have hidden's dtype (such as bfloat16) and are summed in float32; each gradient
    has the dtype of its array. A frozen kernel costs no gradient.

    Blocks divide the vocabulary, not the tokens: each block of the kernel's gradient is then computed once, in the
    kernel's dtype, and reduced once on a mesh. (tokamax 0.0.12's linear_softmax_cross_entropy_loss has a Pallas kernel
    for TPU only and materialises all logits elsewhere; it ignores no label and has neither bias nor smoothing.)

    Args:
        kernel: of the output layer, [d, v]; if `tied` an embedding table, [v, d]. In int8 it gets no gradient.
        added: (kernel, bias) of n more vocabulary entries, trained beside a frozen kernel; without label_smoothing.
        block: vocabulary entries per block; None: as many as give `BLOCK` logits.
        others: see `token_cross_entropy`.

    Raises MmjaxError: shapes that do not fit, block < 1, or label_smoothing with added entries.
    """
    shape = kernel.qvalue.shape if int8.is_int8(kernel) else kernel.shape
    d, v = shape[::-1] if tied else shape
    if hidden.shape != (*labels.shape, d) or (bias is not None and bias.shape != (v,)):
        shapes = f"hidden {list(hidden.shape)}, kernel {list(shape)}, labels {list(labels.shape)}"
        raise MmjaxError(
            f"linear_cross_entropy: {shapes}, bias {None if bias is None else list(bias.shape)}: tied={tied}"
        )
    if block is not None and block < 1:
        raise MmjaxError(f"linear_cross_entropy: block={block}: at least 1")
    size = min(v, block or max(BLOCK // max(labels.size, 1), 1))
    states = _counted((hidden * logit_scale).astype(hidden.dtype), labels).reshape(-1, d)
    offsets = jnp.zeros(v, jnp.float32) if bias is None else bias
    normaliser, label_logit = _sums(_Layer(tied, size), states, kernel, offsets, _valid_labels(labels, v).reshape(-1))
    mean, entries = None, v
    if added is not None:
        normaliser, label_logit, entries = _with_added(
            states, tied, added, labels.reshape(-1) - v, normaliser, label_logit
        )
        entries += v
        if not _off(label_smoothing):
            raise MmjaxError("linear_cross_entropy: label_smoothing with added entries")
    if not _off(label_smoothing):  # the mean of all logits is the product with the mean of the kernel
        mean_kernel = jnp.mean(int8.dequantize(kernel).astype(jnp.float32), axis=0 if tied else 1)
        mean = jnp.matmul(states.astype(jnp.float32), mean_kernel, precision="highest")
        mean = mean + jnp.mean(offsets.astype(jnp.float32))
    losses = _losses(normaliser, label_logit, mean, label_smoothing, z_loss)
    nll, losses = (x.reshape(labels.shape) for x in (normaliser - label_logit, losses))
    return _means(losses, nll, labels, entries, weights, epsilon)


def _with_added(
    states: Array, tied: bool, added: tuple[Array, Array | None], index: Array, normaliser: Array, label_logit: Array
) -> tuple[Array, Array, int]:
    """The normaliser and the label's logit with the added tokens, and their number. index: of the labels among them."""
    kernel, bias = added
    logits = _product("td,vd->tv" if tied else "td,dv->tv", states, kernel.astype(states.dtype))
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    n = logits.shape[1]
    added_label_logit = jnp.take_along_axis(logits, jnp.clip(index, 0, n - 1)[:, None], axis=1)[:, 0]
    normaliser = jnp.logaddexp(normaliser, jax.nn.logsumexp(logits, axis=1))
    return normaliser, jnp.where((index >= 0) & (index < n), added_label_logit, label_logit), n


def _valid_labels(labels: Array, v: int) -> Array:
    """Labels that are safe to index with: ignored and invalid ones become 0."""
    return jnp.where((labels >= 0) & (labels < v), labels, 0)


def _counted(values: Array, labels: Array) -> Array:
    """`values` [.., d], 0 for ignored tokens: an infinity or NaN there would spread to every gradient."""
    return jnp.where((labels != IGNORED)[..., None], values, 0)


def _distilled(logits: Array, teacher: Array, labels: Array, alpha: Array | float) -> Array:
    """`distilled_cross_entropy` of each token; for ignored tokens an arbitrary number without a gradient."""
    labels_or_zero = jnp.where(labels == IGNORED, 0, labels)
    return distilled_cross_entropy(_counted(logits, labels), teacher, labels_or_zero, alpha)


def _from_logits(
    logits: Array, labels: Array, label_smoothing: Array | float, z_loss: Array | float
) -> tuple[Array, Array]:
    """(loss, negative log-likelihood) of each token."""
    logits = _counted(logits.astype(jnp.float32), labels)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    label_logit = jnp.take_along_axis(logits, _valid_labels(labels, logits.shape[-1])[..., None], axis=-1)[..., 0]
    mean = None if _off(label_smoothing) else jnp.mean(logits, axis=-1)
    return _losses(normaliser, label_logit, mean, label_smoothing, z_loss), normaliser - label_logit


def _off(factor: Array | float) -> bool:
    """Whether a factor is statically zero, so that its term is left out: 0 times a logit of -inf would be NaN."""
    return isinstance(factor, int | float) and factor == 0


def _losses(
    normaliser: Array, label_logit: Array, mean: Array | None, label_smoothing: Array | float, z_loss: Array | float
) -> Array:
    """Each token's loss from the log-sum-exp of its logits, the label's logit and the mean logit."""
    losses = normaliser - label_logit
    if mean is not None:
        losses += label_smoothing * (label_logit - mean)
    if not _off(z_loss):
        losses += z_loss * normaliser**2
    return losses


def _checked(values: Array, labels: Array, v: int) -> Array:
    """Each token's value: 0 where it is not counted, NaN where its label is outside the vocabulary."""
    counted = labels != IGNORED
    invalid = counted & ((labels < 0) | (labels >= v))
    return jnp.where(invalid, jnp.nan, jnp.where(counted, values, 0.0))


def _sum(losses: Array, labels: Array, v: int) -> Array:
    return jnp.sum(_checked(losses, labels, v), axis=-1)


def _means(losses: Array, nll: Array, labels: Array, v: int, weights: Array | None, epsilon: float) -> TokenLoss:
    counted = labels != IGNORED
    share = counted if weights is None else jnp.where(counted, weights, 0.0)

    def mean(values: Array) -> Mean:
        weighted = Mean.of(_checked(values, labels, v), share)
        return Mean(weighted.total, weighted.count + epsilon)

    return TokenLoss(mean(losses), mean(jax.lax.stop_gradient(nll)))


# ------------------------------------------------------------------------------------------------------------ blockwise


class _Layer(NamedTuple):
    """Static properties of the output layer. tied: the kernel is [v, d]. size: vocabulary entries per block."""

    tied: bool
    size: int

    def block(self, kernel: int8.Matrix, start: Array | int, size: int, dtype: Any) -> Array:
        def cut(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size, 0 if self.tied else 1)

        # An int8 kernel is two arrays, both cut: their channels are the ids of the vocabulary.
        return int8.dequantize(jax.tree.map(cut, kernel)).astype(dtype)

    def logits(self, states: Array, block: Array, bias: Array, start: Array | int) -> Array:
        """Float32 [t, size]."""
        offsets = jax.lax.dynamic_slice_in_dim(bias, start, block.shape[0 if self.tied else 1])
        return _product("td,vd->tv" if self.tied else "td,dv->tv", states, block) + offsets.astype(jnp.float32)

    def loop(self, run: Callable[[Any, Array | int, int], Any], carry: Any, v: int) -> Any:
        """carry = run(carry, first id, size) over the vocabulary: whole blocks in a loop, then the remainder."""
        whole, rest = divmod(v, self.size)
        carry = jax.lax.fori_loop(0, whole, lambda i, carry: run(carry, i * self.size, self.size), carry)
        return run(carry, whole * self.size, rest) if rest else carry


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _primal(layer: _Layer, states: Array, kernel: int8.Matrix, bias: Array, labels: Array) -> tuple[Array, Array]:
    """(log-sum-exp of each token's logits, the label's logit), each float32 [t]. labels: all within the vocabulary."""

    def run(carry: tuple[Array, Array, Array], start: Array | int, size: int) -> tuple[Array, Array, Array]:
        largest, total, label_logit = carry
        logits = layer.logits(states, layer.block(kernel, start, size, states.dtype), bias, start)
        new = jnp.maximum(largest, jnp.max(logits, axis=1))
        total = total * jnp.exp(largest - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=1)
        index = labels - start
        in_block = jnp.take_along_axis(logits, jnp.clip(index, 0, size - 1)[:, None], axis=1)[:, 0]
        return new, total, jnp.where((index >= 0) & (index < size), in_block, label_logit)

    zeros = jnp.zeros(states.shape[0], jnp.float32)
    least = jnp.full_like(zeros, jnp.finfo(jnp.float32).min)  # not -inf, which a whole block of logits may be
    largest, total, label_logit = layer.loop(run, (least, zeros, zeros), bias.shape[0])
    return largest + jnp.log(total), label_logit


def _forward(layer: _Layer, states: Array, kernel: int8.Matrix, bias: Array, labels: Array) -> Any:
    normaliser, label_logit = _primal(layer, states, kernel, bias, labels)
    return (normaliser, label_logit), (states, kernel, bias, labels, normaliser)


def _backward(layer: _Layer, residuals: Any, gradients: tuple[Array, Array]) -> Any:
    """d logits = gradient of the normaliser * softmax + gradient of the label's logit * onehot, block by block."""
    states, kernel, bias, labels, normaliser = residuals
    d_normaliser, d_label_logit = gradients

    def run(carry: Any, start: Array | int, size: int) -> Any:
        d_states, d_kernel, d_bias = carry
        block = layer.block(kernel, start, size, states.dtype)
        d_logits = jnp.exp(layer.logits(states, block, bias, start) - normaliser[:, None]) * d_normaliser[:, None]
        d_logits += jnp.where(jnp.arange(size) == (labels - start)[:, None], d_label_logit[:, None], 0.0)
        narrow = d_logits.astype(states.dtype)
        if layer.tied:
            d_states, d_block = d_states + _product("tv,vd->td", narrow, block), _product("tv,td->vd", narrow, states)
        else:
            d_states, d_block = d_states + _product("tv,dv->td", narrow, block), _product("td,tv->dv", states, narrow)
        axis = 0 if layer.tied else 1
        if d_kernel is not None:
            d_kernel = jax.lax.dynamic_update_slice_in_dim(d_kernel, d_block.astype(kernel.dtype), start, axis)
        d_bias = jax.lax.dynamic_update_slice_in_dim(d_bias, jnp.sum(d_logits, 0).astype(bias.dtype), start, 0)
        return d_states, d_kernel, d_bias

    d_kernel = None if int8.is_int8(kernel) else jnp.zeros_like(kernel)
    zeros = jnp.zeros(states.shape, jnp.float32), d_kernel, jnp.zeros_like(bias)
    d_states, d_kernel, d_bias = layer.loop(run, zeros, bias.shape[0])
    return d_states.astype(states.dtype), d_kernel, d_bias, None


_sums: Any = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_sums.defvjp(_forward, _backward)
