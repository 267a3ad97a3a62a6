"""Base of Flamingo's recipes: two frozen models, fresh layers between them, and a mixture of sources."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from mmjax import hub
from mmjax.data.mixture import Mixture
from mmjax.data.pipeline import Pipeline, Transform
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.sources import Source
from mmjax.errors import MmjaxError
from mmjax.models.flamingo.config import FlamingoConfig, ResamplerConfig
from mmjax.models.flamingo.pretrain import FlamingoLM, optimizer
from mmjax.models.flamingo.tasks import FlamingoModel
from mmjax.training.experiment import Evaluation, ExperimentConfig, LoadWeights, save_tokenizer
from mmjax.training.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class TrainingSource:
    """A source with the number of its examples in a step, what encodes them, and the shape of the result.

    images: slots of an example. length: its ids. weight: the factor of its loss.
    """

    source: Source
    count: int
    encode: Transform
    images: int
    length: int
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class SourceShape:
    """What a plan has to know of a `TrainingSource`."""

    count: int
    images: int
    length: int
    weight: float


@dataclasses.dataclass(frozen=True)
class FlamingoRecipe(ExperimentConfig, abc.ABC):
    """Image encoder and language model are frozen.

    Attributes:
        language, vision: the frozen models: files, folders or hub ids.
        every, first: a cross-attention layer comes before every n-th block, the first one before block `first` (None:
            every - 1). heads, head_width: of these layers.
        initial_gate: of the gates before their tanh. 0: the language model begins as it was.
        resampler: its sizes; `resampler.latents` are the tokens of an image in the cross attention.
        learning_rate: constant after `warmup` steps. weight_decay: of the cross attention.
        dtype, remat: of the computation; parameters are float32.
    """

    language: str = ""
    vision: str = ""
    every: int = 4
    first: int | None = None
    heads: int = 8
    head_width: int = 64
    initial_gate: float = 0.0
    resampler: ResamplerConfig = dataclasses.field(default_factory=ResamplerConfig)
    learning_rate: float = 1e-4
    warmup: int = 1875
    weight_decay: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    @functools.cached_property
    def start(self) -> FlamingoModel:
        """The frozen models with what is trained between them."""
        sizes = {"every": self.every, "first": self.first, "heads": self.heads, "head_width": self.head_width}
        language, vision = hub.load(self.language), hub.load(self.vision)
        if language.tokenizer is None:
            raise MmjaxError(f"{self.language}: came without a tokenizer")
        fields: dict[str, Any] = {**sizes, "resampler": self.resampler, "initial_gate": self.initial_gate}
        return FlamingoModel.assemble(language, vision, seed=self.seed, **fields)

    @property
    def network(self) -> FlamingoConfig:
        return dataclasses.replace(self.start.config, dtype=self.dtype, remat=self.remat)

    @abc.abstractmethod
    def sources(self) -> dict[str, TrainingSource]:
        """By name. Raises MmjaxError for none."""

    def shapes(self) -> Mapping[str, TrainingSource | SourceShape]:
        """Of each source; those of `sources`."""
        return self.sources()

    @property
    def preprocess(self) -> ImagePreprocessing:
        """The image encoder's."""
        return self.start.preprocess

    def train_data(self) -> Mixture:
        options: dict[str, Any] = {"workers": self.workers, "max_bad_fraction": self.max_bad_fraction}
        options |= {"process_index": jax.process_index(), "process_count": jax.process_count()}
        return Mixture(
            {
                name: Pipeline(one.source, one.count, seed=self.seed, transforms=(one.encode,), **options)
                for name, one in self.sources().items()
            }
        )

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        height, width = self.network.image_size
        batch: dict[str, jax.ShapeDtypeStruct] = {}
        for name, one in self.shapes().items():
            batch[f"{name}_image"] = jax.ShapeDtypeStruct((one.count, one.images, height, width, 3), jnp.uint8)
            for column in ("input_ids", "attention_mask", "labels"):
                batch[f"{name}_{column}"] = jax.ShapeDtypeStruct((one.count, one.length), jnp.int32)
        return batch

    def method(self) -> FlamingoLM:
        weights = {name: one.weight for name, one in self.shapes().items()}
        return FlamingoLM(self.network, weights, mean=self.preprocess.mean, std=self.preprocess.std)

    def optimizer(self) -> Optimizer:
        rate = optax.linear_schedule(0.0, self.learning_rate, max(self.warmup, 1))
        return optimizer(self.network, rate, self.weight_decay)

    def init_sources(self) -> tuple[str, ...]:
        return super().init_sources() or (self.language, self.vision)

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        """Those of `init_from`, or the frozen models' beside fresh ones."""
        if self.init_from is not None:
            return load(self.init_from)
        return {"params": self.start.params, "stats": self.start.stats}

    def evaluations(self) -> tuple[Evaluation, ...]:
        """None during training."""
        return ()

    def model(self) -> tuple[str, FlamingoConfig]:
        return "flamingo", self.start.config

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """The tokenizer with its added ids, and the preprocessing of images."""
        return save_tokenizer(self.start.tokenizer, workdir) | {"preprocess": dataclasses.asdict(self.start.preprocess)}
