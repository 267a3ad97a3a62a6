"""Fine-tuning T5 on pairs of texts (arXiv 1910.10683, section 2.4), as transformers does it."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mmjax.models.t5.network import T5, T5Config
from mmjax.objectives.classification import hits
from mmjax.objectives.language import IGNORED, shift_right, token_cross_entropy
from mmjax.training.method import Loss, Method
from mmjax.training.rng import named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Int, Mean, Means, Params, PRNGKeyArray


@dataclass(frozen=True)
class T5Seq2Seq(Method):
    """Batches {"input_ids" [b, s], "labels" [b, l]}, both int32, and "attention_mask" [b, s] where inputs are padded.

    The loss is the mean over the labels of the whole batch that are not -100 (`token_cross_entropy`).
    """

    config: T5Config

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Uses only the shapes of `batch`."""
        ids, labels = (jnp.zeros((1, batch[name].shape[1]), jnp.int32) for name in ("input_ids", "labels"))
        variables: Any = T5(self.config).init(rng, ids, labels)
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
        """The loss; metrics: accuracy of the next token, in [0, 1]."""
        c, labels = self.config, batch["labels"]
        outputs: Any = T5(c, axis_name).apply(
            {"params": params},
            batch["input_ids"],
            shift_right(labels, c.start, c.pad),
            batch.get("attention_mask"),
            train=True,
            rngs={"dropout": named(rng, "dropout")},
        )
        counted = labels != IGNORED
        correct = hits(outputs["logits"].reshape(-1, c.vocab_size), jnp.where(counted, labels, 0).reshape(-1))
        accuracy = Mean.of(correct, counted.reshape(-1))
        return token_cross_entropy(outputs["logits"], labels).loss, (carry, {"accuracy": accuracy})
