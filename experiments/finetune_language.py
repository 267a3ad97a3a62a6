"""Tunes any language model that `mmjax.load` reads on your text or conversations, by adapters (LoRA) or as a whole.

    mmjax train experiments/finetune_language.py --init_from SmolLM2-135M-Instruct.Q4_1.gguf --data talks.jsonl
    mmjax chat workdirs/finetune_language

talks.jsonl: a conversation a line, {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}; only
the texts of the assistant are learned. A folder of .txt files: all of it is learned. Without --data: the documentation
strings of Python's own standard library. A tenth is held out, and its perplexity reported during training: of
SmolLM2-135M on those strings (Python 3.11, 32 sequences of 128 tokens) 19.7 before and 15.1 after the default 60 steps.

`mmjax.load` gives the workdir with its adapters merged; `export_lora` of `mmjax.adapters` writes PEFT's
files.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import hub
from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource
from mmjax.data.stdlib_docs import stdlib_documents
from mmjax.errors import MmjaxError
from mmjax.evaluation.perplexity import PerplexityEvaluation
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.pretrain import CausalLM
from mmjax.models.language.tasks import LanguageModel
from mmjax.text.documents import read_documents
from mmjax.text.packing import conversation_columns, pack_texts, read_conversations
from mmjax.training.experiment import Evaluation, ExperimentConfig, LoadWeights, save_tokenizer
from mmjax.training.lora import LoRA, LoRAConfig, adapted
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer, adamw, warmup_cosine
from mmjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    """Sized for SmolLM2-135M on a laptop's CPU. init_from is required.

    Attributes:
        data: a .jsonl file of conversations, a folder of .txt files, or None: Python's documentation strings.
        length: tokens of a row.
        held_out: share of the sequences that is evaluated and not trained on.
        judged: the maximum of held-out sequences that are evaluated.
        tune: "lora": adapters on the layers that `lora` names; "all": every parameter.
        learning_rate: peak; warmup over a tenth of the steps and half a cosine. None: 1e-3 for adapters, else 2e-5.
        remat: blocks are computed again in the backward pass.
    """

    unit: ClassVar[str] = "texts"

    steps: int = 60
    batch_size: int = 4
    log_every: int = 5
    eval_every: int = 30
    data: str | None = None
    length: int = 128
    held_out: float = 0.1
    judged: int = 64
    tune: Literal["lora", "all"] = "lora"
    lora: LoRAConfig = dataclasses.field(default_factory=lambda: LoRAConfig(("block_*/attention/*",), 8, 16.0))
    learning_rate: float | None = None
    weight_decay: float = 0.0
    remat: bool = False

    @functools.cached_property
    def start(self) -> LanguageModel:
        """The loaded model."""
        if self.init_from is None:
            raise MmjaxError("--init_from MODEL: a file (GGUF too), a folder, a hub id or a workdir to start from")
        model = hub.load(self.init_from)
        if not isinstance(model, LanguageModel) or model.tokenizer is None:
            raise MmjaxError(f"{self.init_from}: not a language model with a tokenizer")
        return model

    @property
    def network(self) -> DecoderConfig:
        return dataclasses.replace(self.start.config, remat=self.remat)

    @functools.cached_property
    def sequences(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(to train on, held out)."""
        tokenizer = self.start.tokenizer
        if self.data is not None and pathlib.Path(self.data).is_file():
            table = conversation_columns(tokenizer, read_conversations(self.data), self.length)
        else:
            named = stdlib_documents() if self.data is None else read_documents(self.data, prose=True)
            table = pack_texts(tokenizer, (" ".join(sentences) for sentences in named.values()), self.length)
        n = len(table["input_ids"])
        every = max(round(1 / self.held_out), 2) if 0 < self.held_out < 1 else 0
        if not every or n < every:
            raise MmjaxError(f"held_out={self.held_out} of {n} sequences leaves none to train on or to evaluate")
        held_out_mask = np.arange(n) % every == every - 1
        return (
            {k: v[~held_out_mask] for k, v in table.items()},
            {k: v[held_out_mask][: self.judged] for k, v in table.items()},
        )

    @functools.cached_property
    def plain(self) -> CausalLM:
        return CausalLM(self.network)

    def method(self) -> Method:
        return LoRA(self.plain, self.lora) if self.tune == "lora" else self.plain

    def optimizer(self) -> Optimizer:
        peak = self.learning_rate or (1e-3 if self.tune == "lora" else 2e-5)
        rate = adamw(warmup_cosine(peak, self.steps, self.steps // 10), self.weight_decay)
        if self.tune == "lora":
            return Optimizer(rate, self.lora.partition(), clip_norm=1.0)
        return Optimizer(rate, clip_norm=1.0)

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        """The loaded model's; adapters begin without effect."""
        return {"params": self.start.params}

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        row = jax.ShapeDtypeStruct((self.batch_size, self.length), jnp.int32)
        return {"input_ids": row, "labels": row}

    def train_data(self) -> Pipeline:
        return Pipeline(
            ArraySource(name="sequences", **self.sequences[0]),
            self.batch_size,
            seed=self.seed,
            workers=self.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def evaluations(self) -> tuple[Evaluation, ...]:
        return (PerplexityEvaluation(logits=self._logits, columns=self.sequences[1], final_step=self.steps),)

    @functools.cached_property
    def _logits(self) -> Any:
        def logits(params: Params, ids: Array, mask: Array) -> Array:
            return self.plain.logits(params, ids, mask)

        return adapted(logits)

    def model(self) -> tuple[str, DecoderConfig]:
        return "language", self.start.config

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """The tokenizer with its chat template."""
        return save_tokenizer(self.start.tokenizer, workdir)
