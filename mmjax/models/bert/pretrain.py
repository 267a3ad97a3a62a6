"""BERT's pretraining (arXiv 1810.04805, section 3.1; google-research/bert run_pretraining.py)."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.models.bert.network import Bert as Network
from mmjax.models.bert.network import BertConfig
from mmjax.objectives.classification import hits, softmax_cross_entropy
from mmjax.training.method import Loss, Method
from mmjax.training.rng import named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "masked_positions")


@dataclasses.dataclass(frozen=True)
class BERT(Method):
    """Masked language modelling, and next sentence prediction where the config has its head.

    Batches, int32: "input_ids", "attention_mask", "token_type_ids" [b, l]; "masked_positions", "masked_ids" [b, m] and
    float "masked_weights" [b, m], 0 for padding; "next_label" [b], 1 if the second sentence is a random one. They
    come from `mmjax.text.masking` and `mmjax.text.sentence_pairs`. Other arrays are ignored.
    """

    config: BertConfig

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without an MLM head."""
        if not self.config.mlm:
            raise MmjaxError("bert: pretraining wants mlm=True")

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Uses only the shapes of `batch`."""
        inputs = (jnp.zeros((1, *batch[name].shape[1:]), jnp.int32) for name in INPUTS)
        variables: Any = Network(self.config).init(rng, *inputs)
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
        """The sum of mlm_loss, over masked words, and nsp_loss; metrics: mlm_accuracy and nsp_accuracy in [0, 1]."""
        scores = self._metrics(params, batch, True, axis_name, {"dropout": named(rng, "dropout")})
        weights = batch["masked_weights"].astype(jnp.float32)
        words = jnp.sum(weights) + 1e-5  # as the original, whose loss of no masked word is 0
        terms: Means = {"mlm_loss": Mean(jnp.sum(weights * scores["mlm_loss"]), words)}
        metrics: Means = {"mlm_accuracy": Mean(jnp.sum(weights * scores["mlm_accuracy"]), words)}
        if self.config.nsp:
            terms["nsp_loss"] = jnp.mean(scores["nsp_loss"])
            metrics["nsp_accuracy"] = jnp.mean(scores["nsp_accuracy"])
        return terms, (carry, metrics)

    def judge(self, params: Params, state: Any, batch: Batch) -> dict[str, Float[Array, "b *m"]]:
        """The metrics without dropout, for evaluations.

        They are mlm_loss and mlm_accuracy of each masked position [b, m], padding too; nsp_loss and nsp_accuracy [b].
        """
        return self._metrics(params, batch, False, None, {})

    def _metrics(
        self, params: Params, batch: Batch, train: bool, axis_name: str | None, rngs: dict[str, PRNGKeyArray]
    ) -> dict[str, Array]:
        inputs = (batch[name] for name in INPUTS)
        outputs: Any = Network(self.config, axis_name).apply({"params": params}, *inputs, train, rngs=rngs)
        logits, labels = outputs["mlm_logits"].reshape(-1, self.config.vocab_size), batch["masked_ids"].reshape(-1)
        shape = batch["masked_ids"].shape
        metrics = {
            "mlm_loss": softmax_cross_entropy(logits, labels).reshape(shape),
            "mlm_accuracy": hits(logits, labels).reshape(shape),
        }
        if self.config.nsp:
            metrics["nsp_loss"] = softmax_cross_entropy(outputs["nsp_logits"], batch["next_label"])
            metrics["nsp_accuracy"] = hits(outputs["nsp_logits"], batch["next_label"])
        return metrics
