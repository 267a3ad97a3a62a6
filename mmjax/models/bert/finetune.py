"""Fine-tuning BERT (arXiv 1810.04805, section 4): classes of texts, tags of words, answers that are spans of a text.

Everything trains, from the weights of a pretraining run or a public file as `init_from`; its other heads are
dropped. The recipe (appendix A.3): `bert_adamw` at 2e-5 to 5e-5, a tenth of the steps warm-up, 3 epochs of batches
of 32. Batches, int32: "input_ids", "attention_mask", "token_type_ids" [b, l], and the labels of each method.
"""

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.objectives.classification import hits, softmax_cross_entropy
from mmjax.objectives.language import token_accuracy, token_cross_entropy
from mmjax.training.method import Loss, Method
from mmjax.training.rng import named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Means, Params, PRNGKeyArray

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclasses.dataclass(frozen=True)
class FineTuning(Method, abc.ABC):
    """Base of the three methods."""

    config: BertConfig

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Uses only the shapes of `batch`."""
        inputs = (jnp.zeros((1, *batch[name].shape[1:]), jnp.int32) for name in INPUTS)
        variables: Any = Bert(self.config).init(rng, *inputs)
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
        """The mean loss; metrics: those of `judge`."""
        inputs, rngs = (batch[name] for name in INPUTS), {"dropout": named(rng, "dropout")}
        out: Any = Bert(self.config, axis_name).apply({"params": params}, *inputs, train=True, rngs=rngs)
        value, metrics = self.judge(self.logits(out), batch)
        return value, (carry, metrics)

    def predict(self, params: Params, state: Any, batch: Batch) -> Array:
        """`logits` without dropout, for evaluations."""
        out: Any = Bert(self.config).apply({"params": params}, *(batch[name] for name in INPUTS))
        return self.logits(out)

    @abc.abstractmethod
    def logits(self, out: Any) -> Array:
        """The head's logits, from the network's outputs."""

    @abc.abstractmethod
    def judge(self, logits: Array, batch: Batch) -> tuple[Loss, Means]:
        """(the mean loss, metrics)."""


@dataclasses.dataclass(frozen=True)
class TextClassification(FineTuning):
    """ "label" [b]: a class, or where the config has one class a float, which is then to be met in the square (STS-B).

    From google-research/bert run_classifier.py. Metric: accuracy in [0, 1], of classes.
    """

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without classes."""
        if not self.config.classes:
            raise MmjaxError("bert: classification wants classes of 1 or more")

    def logits(self, out: Any) -> Float[Array, "b c"]:
        return out["logits"]

    def judge(self, logits: Float[Array, "b c"], batch: Batch) -> tuple[Loss, Means]:
        labels = batch["label"]
        if self.config.classes == 1:
            return jnp.mean(jnp.square(logits[:, 0] - labels)), {}
        return jnp.mean(softmax_cross_entropy(logits, labels)), {"accuracy": jnp.mean(hits(logits, labels))}


@dataclasses.dataclass(frozen=True)
class TokenClassification(FineTuning):
    """ "labels" [b, l]: a class of each token, -100 for tokens without one: padding, and pieces that continue a word.

    The mean is over labelled tokens of the global batch (BERT paper, section 5.3). Texts without labels do not count.
    Metric: accuracy over them, in [0, 1].
    """

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without classes of tokens."""
        if not self.config.token_classes:
            raise MmjaxError("bert: classification of tokens wants token_classes of 1 or more")

    def logits(self, out: Any) -> Float[Array, "b l c"]:
        return out["token_logits"]

    def judge(self, logits: Float[Array, "b l c"], batch: Batch) -> tuple[Loss, Means]:
        labels = batch["labels"]
        return token_cross_entropy(logits, labels).loss, {"accuracy": token_accuracy(logits, labels)}


@dataclasses.dataclass(frozen=True)
class SpanExtraction(FineTuning):
    """ "start", "end" [b]: an answer's first and last token; 0, [CLS], where there is no answer.

    The mean of both cross-entropies over all l positions, padding included (google-research/bert run_squad.py). Metric:
    accuracy in [0, 1]: examples with both ends right.
    """

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without the head of spans."""
        if not self.config.spans:
            raise MmjaxError("bert: marking answers wants spans=True")

    def logits(self, out: Any) -> Float[Array, "b l 2"]:
        return out["span_logits"]

    def judge(self, logits: Float[Array, "b l 2"], batch: Batch) -> tuple[Loss, Means]:
        ends = [(logits[..., index], batch[name]) for index, name in enumerate(("start", "end"))]
        losses = [jnp.mean(softmax_cross_entropy(scores, labels)) for scores, labels in ends]
        right = [hits(scores, labels) for scores, labels in ends]
        return (losses[0] + losses[1]) / 2, {"accuracy": jnp.mean(right[0] * right[1])}
