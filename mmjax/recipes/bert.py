"""The base of BERT's fine-tuning recipes: a loaded encoder under a new head, optimizer, epochs, held-out split."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

import jax
import numpy as np

from mmjax import tree
from mmjax.data.labels import write_labels
from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource
from mmjax.data.splits import is_held_out
from mmjax.errors import MmjaxError
from mmjax.interface.model import Model
from mmjax.models.bert.finetune import FineTuning
from mmjax.models.bert.network import BertConfig
from mmjax.models.bert.tasks import BertModel
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.training.experiment import ExperimentConfig, LoadWeights, save_tokenizer
from mmjax.training.optimizer import Optimizer, bert_adamw, warmup_linear

Example = TypeVar("Example")


@dataclasses.dataclass(frozen=True)
class FineTuningRecipe(ExperimentConfig, abc.ABC, Generic[Example]):
    """Base of the experiments; a subclass reads the examples and encodes them as arrays. init_from is required.

    The published values (BERT's appendix A.3; run_classifier.py, run_squad.py) are the defaults. For BERTs smaller
    than Base the published rates go up to 3e-4.

    Attributes:
        steps: the default is 3 epochs of the default data. With data or epochs but no steps, it follows from epochs.
        data: a file. None: examples from this Python's standard library (`mmjax.data.stdlib_tasks`).
        test: a file of the same form to evaluate on. None: a share of `data`, which is then not trained on.
        held_out: that share, by a hash of `drawn_with(example)`.
        epochs: passes over the examples.
        length: the maximum of tokens in a sequence.
        learning_rate: the peak, reached after the share `warmup` of the steps; it then falls linearly to 0.
        weight_decay: of matrices alone.
        dropout: of hidden states and of attention.
    """

    unit: ClassVar[str] = "texts"

    steps: int = 1000
    batch_size: int = 32
    data: str | None = None
    test: str | None = None
    held_out: float = 0.1
    epochs: float = 3.0
    length: int = 128
    learning_rate: float = 5e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    dropout: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Raises MmjaxError for fields out of range, and for data that cannot be read where steps are counted."""
        super().__post_init__()
        wrong = [f"{name}={getattr(self, name)}" for name in ("held_out", "warmup") if not 0 < getattr(self, name) < 1]
        if wrong or self.epochs <= 0:
            raise MmjaxError(f"{', '.join(wrong)}, epochs={self.epochs}: shares are from 0 to 1, epochs above 0")
        if self.test is not None and self.data is None:
            raise MmjaxError(f"test={self.test} without data")
        default = {field.name: field.default for field in dataclasses.fields(self)}
        changed = {name for name in ("steps", "data", "epochs") if getattr(self, name) != default[name]}
        if changed and "steps" not in changed:
            count = int(len(self.examples[0]) / self.batch_size * self.epochs)
            object.__setattr__(self, "steps", max(count, 2))

    # -------------------------------------------------------------------------------------------- defined by subclasses

    @staticmethod
    @abc.abstractmethod
    def load(source: str) -> Model:
        """`mmjax.load`, which stands above this floor."""

    @abc.abstractmethod
    def read(self, file: str) -> Sequence[Example]:
        """The examples of a file."""

    @abc.abstractmethod
    def default_examples(self) -> Sequence[Example]:
        """The examples from the standard library."""

    @abc.abstractmethod
    def drawn_with(self, example: Example) -> str:
        """The name of the example's group: all examples of a group are held out together."""

    @property
    @abc.abstractmethod
    def heads(self) -> dict[str, Any]:
        """Fields of the config: the new head, and the pooler that it may read."""

    @property
    @abc.abstractmethod
    def train_columns(self) -> Mapping[str, np.ndarray]:
        """The training examples as arrays [n, ...]."""

    @abc.abstractmethod
    def method(self) -> FineTuning: ...

    # ---------------------------------------------------------------------------------------------------------- shared

    @functools.cached_property
    def examples(self) -> tuple[list[Example], list[Example]]:
        """(training examples, held-out examples). Raises MmjaxError where either is empty."""
        every = self.default_examples() if self.data is None else self.read(self.data)
        if self.test is not None:
            return list(every), list(self.read(self.test))
        sides: tuple[list[Example], list[Example]] = ([], [])
        for example in every:
            sides[is_held_out(self.drawn_with(example), self.held_out)].append(example)
        if not all(sides):
            counts = " and ".join(f"{len(side)}" for side in sides)
            raise MmjaxError(
                f"{self.data}: {len(every)} examples: {counts} to train on and to judge; --test names a file"
            )
        return sides

    @functools.cached_property
    def start(self) -> BertModel:
        """The loaded BERT."""
        if self.init_from is None:
            raise MmjaxError("--init_from MODEL: a file, a folder, a hub id or a workdir to start from")
        model = self.load(self.init_from)
        if not isinstance(model, BertModel) or model.tokenizer is None:
            raise MmjaxError(f"{self.init_from}: not a BERT with a tokenizer")
        return model

    @property
    def tokenizer(self) -> WordPieceTokenizer:
        return self.start.tokenizer

    @functools.cached_property
    def network(self) -> BertConfig:
        bare = {"mlm": False, "nsp": False, "classes": 0, "token_classes": 0, "spans": False}
        drops = {"dropout": self.dropout, "attention_dropout": self.dropout, "dtype": self.dtype}
        return dataclasses.replace(self.start.config, **bare | drops | self.heads)

    def optimizer(self) -> Optimizer:
        rate = warmup_linear(self.learning_rate, self.steps, int(self.warmup * self.steps))
        return Optimizer(bert_adamw(rate, self.weight_decay), clip_norm=1.0)

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        """The weights of the loaded BERT that the network has: also a head of the same kind and number of outputs."""
        expected = tree.flatten(BertModel.shapes(self.network)["params"])
        loaded = tree.flatten(self.start.params)
        fit = {path: leaf for path, leaf in loaded.items() if path in expected and leaf.shape == expected[path].shape}
        return {"params": tree.unflatten(fit)}

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        return {
            name: jax.ShapeDtypeStruct((self.batch_size, *column.shape[1:]), column.dtype)
            for name, column in self.train_columns.items()
        }

    def train_data(self) -> Pipeline:
        return Pipeline(
            ArraySource(name=self.data or "the standard library", **self.train_columns),
            self.batch_size,
            seed=self.seed,
            workers=self.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def model(self) -> tuple[str, BertConfig]:
        return "bert", self.network

    @property
    def class_labels(self) -> tuple[str, ...]:
        """The names of the head's classes; () if it has none."""
        return ()

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """The tokenizer, and labels.json if classes have names."""
        if self.class_labels:
            write_labels(self.class_labels, workdir)
        return save_tokenizer(self.tokenizer, workdir)
