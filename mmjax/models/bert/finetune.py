"""Fine-tuning BERT to tell the class of a text or a pair of texts (google-research/bert run_classifier.py)."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.objectives.classification import hits, softmax_cross_entropy
from mmjax.training.method import Method
from mmjax.training.rng import named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Metrics, Params, PRNGKeyArray

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclasses.dataclass(frozen=True)
class TextClassification(Method):
    """Batches, int32: "input_ids", "attention_mask", "token_type_ids" [b, l] and "label" [b]: a class, or where the
    config has one class a float, which is then to be met in the square (STS-B).

    Everything trains, from the weights of a pretraining run or a public file as `init_from`; its other heads are left
    behind. The recipe: `bert_adamw` at 2e-5 to 5e-5, a tenth of the steps warm-up, 3 epochs of batches of 32.
    """

    config: BertConfig

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without classes."""
        if not self.config.classes:
            raise MmjaxError("bert: classification wants classes of 1 or more")

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Reads the shapes alone of `batch`."""
        inputs = (jnp.zeros((1, *batch[name].shape[1:]), jnp.int32) for name in INPUTS)
        variables: Any = Bert(self.config).init(rng, *inputs)
        return variables["params"], Carry({}, {}, {}, {})

    def loss(
        self, params: Params, carry: Carry, batch: Batch, rng: PRNGKeyArray, axis_name: str | None = None
    ) -> tuple[Float[Array, ""], tuple[Carry, Metrics]]:
        """The mean loss; metrics: accuracy in [0, 1], of classes."""
        inputs, rngs = (batch[name] for name in INPUTS), {"dropout": named(rng, "dropout")}
        out: Any = Bert(self.config).apply({"params": params}, *inputs, train=True, axis_name=axis_name, rngs=rngs)
        logits, labels = out["logits"], batch["label"]
        if self.config.classes == 1:
            return jnp.mean(jnp.square(logits[:, 0] - labels)), (carry, {})
        return jnp.mean(softmax_cross_entropy(logits, labels)), (carry, {"accuracy": jnp.mean(hits(logits, labels))})

    def predict(self, params: Params, state: Any, batch: Batch) -> Float[Array, "b c"]:
        """Logits without dropout, for evaluations."""
        out: Any = Bert(self.config).apply({"params": params}, *(batch[name] for name in INPUTS))
        return out["logits"]
