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
    """Masked words, and where the config has its head next sentences.

    Batches, int32: "input_ids", "attention_mask", "token_type_ids" [b, l]; "masked_positions", "masked_ids" [b, m] and
    float "masked_weights" [b, m], 0 for padding; "next_label" [b], 1 if the second sentence is a random one. As
    `mmjax.text.masking` and `mmjax.text.sentence_pairs` make them; other entries are not looked at.
    """

    config: BertConfig

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network that names no words."""
        if not self.config.mlm:
            raise MmjaxError("bert: pretraining wants mlm=True")

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Reads the shapes alone of `batch`."""
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
        judged = self._judge(params, batch, True, axis_name, {"dropout": named(rng, "dropout")})
        weights = batch["masked_weights"].astype(jnp.float32)
        words = jnp.sum(weights) + 1e-5  # as the original, whose loss of no masked word is 0
        terms: Means = {"mlm_loss": Mean(jnp.sum(weights * judged["mlm_loss"]), words)}
        metrics: Means = {"mlm_accuracy": Mean(jnp.sum(weights * judged["mlm_accuracy"]), words)}
        if self.config.nsp:
            terms["nsp_loss"] = jnp.mean(judged["nsp_loss"])
            metrics["nsp_accuracy"] = jnp.mean(judged["nsp_accuracy"])
        return terms, (carry, metrics)

    def judge(self, params: Params, state: Any, batch: Batch) -> dict[str, Float[Array, "b *m"]]:
        """Without dropout, for evaluations: mlm_loss and mlm_accuracy of each masked place [b, m], padding too, and
        nsp_loss and nsp_accuracy [b]."""
        return self._judge(params, batch, False, None, {})

    def _judge(
        self, params: Params, batch: Batch, train: bool, axis_name: str | None, rngs: dict[str, PRNGKeyArray]
    ) -> dict[str, Array]:
        inputs = (batch[name] for name in INPUTS)
        out: Any = Network(self.config, axis_name).apply({"params": params}, *inputs, train, rngs=rngs)
        logits, labels = out["mlm_logits"].reshape(-1, self.config.vocab_size), batch["masked_ids"].reshape(-1)
        shape = batch["masked_ids"].shape
        told = {
            "mlm_loss": softmax_cross_entropy(logits, labels).reshape(shape),
            "mlm_accuracy": hits(logits, labels).reshape(shape),
        }
        if self.config.nsp:
            told["nsp_loss"] = softmax_cross_entropy(out["nsp_logits"], batch["next_label"])
            told["nsp_accuracy"] = hits(out["nsp_logits"], batch["next_label"])
        return told
