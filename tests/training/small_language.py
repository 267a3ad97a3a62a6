"""An experiment that runs in a second, with a model that `mmjax.load` reads and every kind of evaluation result."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from models.tiny_text import LINES, chat_tokenizer

from mmjax import hub
from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource
from mmjax.errors import MmjaxError
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.pretrain import CausalLM
from mmjax.training.experiment import ExperimentConfig, LoadWeights, save_tokenizer
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer, adamw
from mmjax.training.partition import FROZEN, TRAINABLE, Partition

LENGTH = 12


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The mean logit on one row, a text and a picture: everything that an evaluation may return."""

    network: DecoderConfig
    name: str = "held_out"
    every: int = 0

    def run(self, params: Any, state: Any) -> Mapping[str, Any]:
        ids = np.arange(LENGTH, dtype=np.int32)[None]
        mean = CausalLM(self.network).logits(params, ids, np.ones_like(ids)).mean()
        return {"logit": float(mean), "text": LINES[0], "picture": np.full((4, 5, 3), 7, np.uint8)}


@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    steps: int = 4
    batch_size: int = 4
    log_every: int = 1
    checkpoint_every: int = 2
    tensorboard: bool = False
    width: int = 12
    learning_rate: float = 1e-2
    frozen: Literal["float32", "bfloat16", "int8"] | None = None

    @property
    def network(self) -> DecoderConfig:
        tokenizer = chat_tokenizer()
        sizes = {"vocab_size": tokenizer.vocab_size + 16, "kv_heads": 1, "head_width": 6}
        return DecoderConfig.llama(self.width, 1, 2, 20, **sizes, eos=tokenizer.eos, pad=tokenizer.pad)

    def method(self) -> Method:
        if self.batch_size % 4:
            raise MmjaxError(f"batch_size={self.batch_size} is not a multiple of 4")
        return CausalLM(self.network)

    def optimizer(self) -> Optimizer:
        """All is trained; or where `frozen` says in what form the rest is, the head."""
        partition = Partition() if self.frozen is None else Partition({"head/**": TRAINABLE, "**": FROZEN})
        return Optimizer(adamw(self.learning_rate), partition)

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        if self.frozen is None:
            return load(str(self.init_from))
        options: Any = {"weights": "int8"} if self.frozen == "int8" else {"dtype": self.frozen}
        return hub.load(str(self.init_from), **options).weights()

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        rows = jax.ShapeDtypeStruct((self.batch_size, LENGTH), np.int32)
        return {"input_ids": rows, "labels": rows}

    def train_data(self) -> Pipeline:
        ids = np.random.default_rng(0).integers(0, self.network.vocab_size, (32, LENGTH)).astype(np.int32)
        return Pipeline(ArraySource(name="rows", input_ids=ids, labels=ids), self.batch_size, seed=self.seed)

    def evaluations(self) -> tuple[HeldOut, ...]:
        return (HeldOut(self.network),)

    def model(self) -> tuple[str, DecoderConfig]:
        return "language", self.network

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        (workdir / "labels.json").write_text(f'["{self.width}"]')
        return save_tokenizer(chat_tokenizer(), workdir)
