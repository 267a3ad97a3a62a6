"""The Transformer's training (arXiv 1706.03762, section 5): teacher forcing, smoothed labels, Adam with Noam's rate."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from mmjax.errors import MmjaxError
from mmjax.models.transformer.network import Transformer, TransformerConfig
from mmjax.objectives.classification import hits, softmax_cross_entropy
from mmjax.objectives.language import IGNORED
from mmjax.training.method import Loss, Method
from mmjax.training.optimizer import Schedule
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray


def shifted_right(labels: Int[Array, "b l"], config: TransformerConfig) -> Int[Array, "b l"]:
    """The decoder's inputs for these labels: its start token, then each label but the last; -100 becomes pad."""
    start = jnp.full((labels.shape[0], 1), config.start, labels.dtype)
    shifted = jnp.concatenate([start, labels[:, :-1]], 1)
    return jnp.where(shifted == IGNORED, config.pad, shifted)


def translation_loss(
    logits: Float[Array, "b l v"],
    labels: Int[Array, "b l"],
    smoothing: float = 0.0,
) -> tuple[Mean, Means]:
    """The mean over all counted labels of a batch, with torch's label smoothing (over all classes, the label's too).

    Metrics: nll (without smoothing) and accuracy of the next token.
    """
    counted = (labels != IGNORED).reshape(-1)
    flat, targets = logits.reshape(-1, logits.shape[-1]), jnp.maximum(labels, 0).reshape(-1)
    nll = Mean.of(softmax_cross_entropy(flat, targets), counted)
    loss = Mean.of(softmax_cross_entropy(flat, targets, smoothing), counted) if smoothing else nll
    return loss, {"nll": nll, "accuracy": Mean.of(hits(flat, targets), counted)}


@dataclasses.dataclass(frozen=True)
class Translation(Method):
    """Batches {"input_ids": int32 [b, s], padded with the config's pad, "labels": int32 [b, l], padded with -100}.

    Labels end with the end of sentence; the decoder takes them shifted right, after its start token.
    """

    config: TransformerConfig
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Raises MmjaxError for smoothing out of range."""
        if not 0 <= self.label_smoothing < 1:
            raise MmjaxError(f"transformer: label_smoothing={self.label_smoothing} (from 0 to below 1)")

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Uses only the shapes of `batch`."""
        ids, labels = (jnp.zeros((1, *batch[name].shape[1:]), jnp.int32) for name in ("input_ids", "labels"))
        variables: Any = Transformer(self.config).init(rng, ids, labels)
        return variables["params"], Carry()

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        """The smoothed loss; metrics as of `translation_loss`."""
        config, labels = self.config, batch["labels"]
        out: Any = Transformer(config, axis_name).apply(
            {"params": params},
            batch["input_ids"],
            shifted_right(labels, config),
            batch["input_ids"] != config.pad,
            train=True,
            rngs={"dropout": rng},
        )
        value, metrics = translation_loss(out["logits"], labels, self.label_smoothing)
        return value, (carry, metrics)


def noam(width: int, warmup: int = 4000, factor: float = 1.0) -> Schedule:
    """factor * width^-0.5 * min(t^-0.5, t * warmup^-1.5) at t = step + 1: the first update has t = 1 (equation 3)."""

    def schedule(step: Any) -> Any:
        t = jnp.asarray(step, jnp.float32) + 1
        return factor * width**-0.5 * jnp.minimum(t**-0.5, t * warmup**-1.5)

    return schedule


def adam(learning_rate: float | Schedule) -> optax.GradientTransformation:
    """Adam with the paper's constants (section 5.3)."""
    return optax.adam(learning_rate, b1=0.9, b2=0.98, eps=1e-9)
