"""OpenFlamingo's training (arXiv 2308.01390; open_flamingo's README and train/train.py), on any decoder and CLIP.

    mmjax train experiments/flamingo_pretrain.py --documents mmc4.jsonl --document_images mmc4 \\
        --pairs laion.jsonl --pair_images laion --language anas-awadalla/mpt-7b --every 4
    mmjax evaluate workdirs/flamingo_pretrain --task captions --data coco_karpathy_val.json --images coco

Each step has `batch_size` documents of MMC4's form with up to six images, and twice as many pairs of an image and a
caption. Image encoder and language model are frozen. The published runs have 64 GPUs with 32 documents and 64 pairs
each: 60 million documents, 29,300 steps. Without --pairs or without --documents the other source is alone.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import mmjax
from mmjax.data.image_text import ImageTextList
from mmjax.data.interleaved import Documents, EncodeDocument, EncodePair
from mmjax.data.mixture import Mixture
from mmjax.data.pipeline import Pipeline, Transform
from mmjax.data.sources import Source
from mmjax.errors import MmjaxError
from mmjax.models.flamingo.network import FlamingoConfig, ResamplerConfig
from mmjax.models.flamingo.pretrain import FlamingoLM, optimizer
from mmjax.models.flamingo.tasks import FlamingoModel
from mmjax.training.experiment import Evaluation, ExperimentConfig, LoadWeights, save_tokenizer
from mmjax.training.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    """The published recipe.

    Attributes:
        language, vision: the frozen models: files, folders or hub ids.
        documents, document_images: a .jsonl of MMC4's form, and the folder of its images.
        pairs, pair_images: annotations of images with captions (`mmjax.data.image_text`), and their folder.
        every: a cross-attention layer comes before every n-th block: 1 on MPT-1B, 2 on RedPajama-3B, 4 on MPT-7B.
        heads, head_width, resampler: sizes; the published ones by default.
        length, caption_length: tokens of a document and of a pair. images: the maximum of a document.
        threshold: of the similarity of an image and its sentence.
        pairs_per_document: batch_size is that of the documents.
        document_weight, pair_weight: factors of the two losses.
        learning_rate: constant after `warmup` steps. weight_decay: of the cross attention.
        dtype, remat: of the computation; parameters are float32.
    """

    steps: int = 29_300
    batch_size: int = 2048
    lift: Literal["jit", "pmap", "mesh"] = "mesh"
    log_every: int = 50
    checkpoint_every: int = 1000
    workers: int = 16
    language: str = "anas-awadalla/mpt-7b"
    vision: str = "openai/clip-vit-large-patch14"
    documents: str | None = None
    document_images: str | None = None
    pairs: str | None = None
    pair_images: str | None = None
    every: int = 4
    heads: int = 8
    head_width: int = 64
    resampler: ResamplerConfig = dataclasses.field(default_factory=ResamplerConfig)
    length: int = 256
    caption_length: int = 32
    images: int = 6
    threshold: float = 0.24
    pairs_per_document: int = 2
    document_weight: float = 1.0
    pair_weight: float = 0.2
    learning_rate: float = 1e-4
    warmup: int = 1875
    weight_decay: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    @functools.cached_property
    def start(self) -> FlamingoModel:
        """The frozen models with what is trained between them."""
        sizes = {"every": self.every, "heads": self.heads, "head_width": self.head_width, "resampler": self.resampler}
        language, vision = mmjax.load(self.language), mmjax.load(self.vision)
        if language.tokenizer is None:
            raise MmjaxError(f"{self.language}: came without a tokenizer")
        return FlamingoModel.assemble(language, vision, seed=self.seed, **sizes)

    @property
    def network(self) -> FlamingoConfig:
        return dataclasses.replace(self.start.config, dtype=self.dtype, remat=self.remat)

    # ------------------------------------------------------------------------------------------------------------ data

    def sources(self) -> dict[str, tuple[Source, int, Transform]]:
        """name -> (source, examples of a step, transform). Raises MmjaxError for none."""
        tokenizer, preprocess = self.start.tokenizer, self.start.preprocess
        sources: dict[str, tuple[Source, int, Transform]] = {}
        if self.documents is not None:
            encode = EncodeDocument(tokenizer, self.length, self.images, preprocess)
            listed = Documents(self.documents, self.document_images, threshold=self.threshold)
            sources["documents"] = (listed, self.batch_size, encode)
        if self.pairs is not None:
            count = self.batch_size * (self.pairs_per_document if sources else 1)
            encode_pair = EncodePair(tokenizer, self.caption_length, preprocess)
            sources["pairs"] = (ImageTextList(self.pairs, self.pair_images), count, encode_pair)
        if not sources:
            raise MmjaxError("--documents FILE.jsonl, --pairs FILE.json or both: there is nothing to train on")
        return sources

    def train_data(self) -> Mixture:
        options: dict[str, Any] = {"workers": self.workers, "max_bad_fraction": self.max_bad_fraction}
        options |= {"process_index": jax.process_index(), "process_count": jax.process_count()}
        return Mixture(
            {
                name: Pipeline(source, count, seed=self.seed, transforms=(encode,), **options)
                for name, (source, count, encode) in self.sources().items()
            }
        )

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        height, width = self.start.config.image_size
        batch: dict[str, jax.ShapeDtypeStruct] = {}
        for name, (_, count, _) in self.sources().items():
            slots, length = (self.images, self.length) if name == "documents" else (1, self.caption_length)
            batch[f"{name}_image"] = jax.ShapeDtypeStruct((count, slots, height, width, 3), jnp.uint8)
            for column in ("input_ids", "attention_mask", "labels"):
                batch[f"{name}_{column}"] = jax.ShapeDtypeStruct((count, length), jnp.int32)
        return batch

    # ----------------------------------------------------------------------------------------------------------- recipe

    def method(self) -> FlamingoLM:
        weights = {"documents": self.document_weight, "pairs": self.pair_weight}
        present = {name: weights[name] for name in self.sources()}
        preprocess = self.start.preprocess
        return FlamingoLM(self.network, present, mean=preprocess.mean, std=preprocess.std)

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
