"""An experiment with what `mmjax check` reports: a bad record, a row without labels, a parameter without a gradient."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

from mmjax.data.decoding import BadRecord
from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource
from mmjax.objectives.language import IGNORED
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.training.experiment import ExperimentConfig
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer
from mmjax.training.partition import Partition
from mmjax.training.state import Carry
from mmjax.types import Mean

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "red", "[MASK]")
ROWS = np.array([[2, 4, 5, 6, 3, 0]] * 7)
LABELS = np.array([[IGNORED] * 3 + [6, 3, IGNORED]] * 7)
LABELS[3] = IGNORED
BROKEN = 2


def check_record(record: dict[str, Any]) -> dict[str, Any]:
    if record["number"] == BROKEN:
        raise BadRecord("texts: broken")
    return record


@dataclasses.dataclass(frozen=True)
class NextWord(Method):
    scale: float

    def init(self, rng: Any, batch: Any) -> Any:
        table = jax.random.normal(rng, (len(WORDS), len(WORDS)))
        return {"table": {"seen": table, "unused": jnp.ones(3)}, "tower": jnp.ones(5)}, Carry()

    def loss(self, params: Any, carry: Any, batch: Any, rng: Any, step: Any, axis_name: str | None = None) -> Any:
        logits = self.scale * params["table"]["seen"][batch["input_ids"]] + params["tower"].sum()
        known = batch["labels"] != IGNORED
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(known, batch["labels"], 0))
        return Mean((losses * known).sum(), known.sum().astype(jnp.float32)), (carry, {})


@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    steps: int = 4
    batch_size: int = 2
    scale: float = 1.0

    @property
    def tokenizer(self) -> WordPieceTokenizer:
        pieces = tokenizers.models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
        tokenizer = tokenizers.Tokenizer(pieces)
        tokenizer.add_special_tokens([word for word in WORDS if word[0] == "["])
        return WordPieceTokenizer(tokenizer)

    def method(self) -> Method:
        return NextWord(self.scale)

    def optimizer(self) -> Optimizer:
        return Optimizer(optax.sgd(1.0), Partition({"tower": "frozen"}))

    def train_data(self) -> Pipeline:
        columns = {"number": np.arange(len(ROWS)), "attention_mask": (ROWS > 0).astype(np.int32)}
        source = ArraySource(input_ids=ROWS, labels=LABELS, name="texts", **columns)
        fields = {"transforms": (check_record,), "max_bad_fraction": self.max_bad_fraction}
        return Pipeline(source, self.batch_size, shuffle=False, **fields)

    def evaluations(self) -> tuple[()]:
        return ()

    def model(self) -> tuple[str, Any]:
        return "toy", None
