"""Bases of the experiments of ALBEF and BLIP."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mmjax.data.caption_text import CleanText, EncodeAnswers, EncodeCaption
from mmjax.data.image_pairs import OnEach
from mmjax.data.image_text import ImageTextList
from mmjax.data.pipeline import Pipeline, Transform
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.sources import Source
from mmjax.data.task_lists import ImagePairList, QuestionList
from mmjax.data.transforms import Keep, RandomFlip, RandomResizedCrop
from mmjax.data.vision_language_augment import VisionLanguageRandAugment
from mmjax.errors import MmjaxError
from mmjax.models import SYSTEMS
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.training.experiment import Evaluation, ExperimentConfig, LoadWeights, save_tokenizer
from mmjax.training.initial_parts import initial_parts
from mmjax.training.method import Method


@dataclasses.dataclass(frozen=True)
class EncoderStart(ExperimentConfig):
    """A recipe whose encoders start from models that were pre-trained apart: one source for images, one for texts.

    Attributes:
        init_vision: a ViT of the network's size, such as DeiT-B: a file, a folder, a run or a hub id.
        init_text: a BERT of the network's size, such as bert-base-uncased; for BLIP's decoder and BLIP-2's queries too.
            `init_from` is a model of the whole network instead of these.
    """

    init_vision: str | None = None
    init_text: str | None = None

    def __post_init__(self) -> None:
        """Raises MmjaxError for a whole network beside parts of it."""
        super().__post_init__()
        if self.init_from and (self.init_vision or self.init_text):
            raise MmjaxError("init_from is a whole network, init_vision and init_text are its parts: not both")

    def init_sources(self) -> tuple[str, ...]:
        return tuple(source for source in (self.init_from, self.init_vision, self.init_text) if source is not None)

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        """`whole_weights` of `init_from`, or the parts' weights. Raises MmjaxError for parts that do not fit."""
        if self.init_from is not None:
            return self.whole_weights(load(self.init_from))
        recipe: Any = self
        system, network = recipe.model()
        model = next(each.model for each in SYSTEMS if each.name == system)
        expected = model.shapes(network)["params"]
        parts = tuple(part for part in ("text", "decoder", "qformer") if part in expected)
        return initial_parts(load, expected, network.vision, self.init_vision, self.init_text, parts)

    def whole_weights(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the network takes from the weights of a whole network; by default all."""
        return weights


@dataclasses.dataclass(frozen=True)
class EpochRecipe(ExperimentConfig, abc.ABC):
    """Base of the published recipes: annotation files, augmentation, an epoch's length.

    Experiments add the texts, `source`, network, method and optimizer. `mmjax evaluate WORKDIR --task ... --data ...`
    scores any checkpoint.

    Attributes:
        data: the folder of the annotation files.
        files: the training files in it, as the original's archive names them.
        images: the folder below which the entries' images are.
        examples: entries of the training files. They make an epoch of examples // batch_size steps; the rest is left
            to later epochs.
        size: side of the images, pixels.
        length: tokens of a text, special ones included.
        learning_rate: the highest.
        dtype: of the computation; parameters, moments and losses are float32.
        remat: blocks are computed again in the backward pass.

    Of the class:
        crop_min: least share of the image's area in a crop. magnitude: of RandAugment.
    """

    ramps: ClassVar[tuple[str, ...]] = ()
    crop_min: ClassVar[float] = 0.5
    magnitude: ClassVar[float]

    lift: Literal["jit", "pmap", "mesh"] = "mesh"
    log_every: int = 50
    checkpoint_every: int = 2_000
    workers: int = 16
    data: str = "data"
    files: tuple[str, ...] = ()
    images: str = "images"
    examples: int = 1
    size: int = 384
    length: int = 64
    learning_rate: float = 1e-5
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    @property
    def epoch(self) -> int:
        """Steps of an epoch."""
        return max(self.examples // self.batch_size, 1)

    @property
    def epochs(self) -> int:
        """Epochs of the run, a started one included: the length of schedules."""
        return -(-self.steps // self.epoch)

    # ------------------------------------------------------------------------------------------------------------ data

    def source(self) -> Source:
        """The training entries; by default pairs of images and texts."""
        return ImageTextList(self.paths, self.images)

    @property
    def paths(self) -> list[pathlib.Path]:
        """Of the training files."""
        return [pathlib.Path(self.data) / file for file in self.files]

    def image_transforms(self) -> tuple[Transform, ...]:
        """Of one image: a crop, a flip, RandAugment (dataset/__init__.py of ALBEF, data/__init__.py of BLIP)."""
        crop = RandomResizedCrop(self.size, (self.crop_min, 1.0), resample="bicubic")
        return crop, RandomFlip(), VisionLanguageRandAugment(self.magnitude)

    @abc.abstractmethod
    def text_transforms(self) -> tuple[Transform, ...]:
        """Of the texts of an entry."""

    @abc.abstractmethod
    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""

    def train_data(self) -> Pipeline:
        """Raises MmjaxError for other numbers of entries than `examples`."""
        source = self.source()
        if len(source) != self.examples:
            raise MmjaxError(
                f"{source.name}: {len(source)} entries, schedules count epochs of {self.examples}: "
                f"--examples {len(source)} --steps {self.epochs * (len(source) // self.batch_size)}"
            )
        return Pipeline(
            source,
            self.batch_size,
            seed=self.seed,
            transforms=(*self.image_transforms(), *self.text_transforms(), Keep(tuple(self.example_batch()))),
            workers=self.workers,
            max_bad_fraction=self.max_bad_fraction,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    # ----------------------------------------------------------------------------------------------------------- recipe

    @abc.abstractmethod
    def method(self) -> Method: ...

    def evaluations(self) -> tuple[Evaluation, ...]:
        """None during training."""
        return ()


@dataclasses.dataclass(frozen=True)
class PublishedRecipe(EncoderStart, EpochRecipe, abc.ABC):
    """Base of the published recipes whose texts are BERT's.

    Attributes:
        vocab: bert-base-uncased's vocab.txt, in the folder `data`.
        groups: parts of the batch that are one process of the original.

    Of the class:
        clean: how a text is cleaned. sep: whether [SEP] ends it.
    """

    clean: ClassVar[Callable[[str], str]]
    sep: ClassVar[bool]

    vocab: str = "vocab.txt"
    groups: int = 8

    @functools.cached_property
    def tokenizer(self) -> WordPieceTokenizer:
        """Raises MmjaxError, naming the file, if `vocab` is missing."""
        return WordPieceTokenizer.from_vocab(pathlib.Path(self.data) / self.vocab)

    def text_transforms(self) -> tuple[Transform, ...]:
        return CleanText(self.clean), EncodeCaption(self.tokenizer, self.length, sep=self.sep)

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        image = jax.ShapeDtypeStruct((self.batch_size, self.size, self.size, 3), jnp.uint8)
        return {"image": image} | self.token_columns()

    def token_columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        tokens = jax.ShapeDtypeStruct((self.batch_size, self.length), jnp.int32)
        return {"input_ids": tokens, "attention_mask": tokens}

    def label_column(self, name: str) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct((self.batch_size,), jnp.int32)}

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """The tokenizer, and the preprocessing of images."""
        preprocess = ImagePreprocessing.albef(self.size)
        return save_tokenizer(self.tokenizer, workdir) | {"preprocess": dataclasses.asdict(preprocess)}


@dataclasses.dataclass(frozen=True)
class RetrievalData(PublishedRecipe):
    """Entries {image, caption, image_id}, one for each caption (coco_train.json, flickr30k_train.json)."""

    def source(self) -> Source:
        return ImageTextList(self.paths, self.images, numbered=True)

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        return super().example_batch() | self.label_column("image_id")


@dataclasses.dataclass(frozen=True)
class QuestionData(PublishedRecipe):
    """Entries {image, dataset, question, answer}: VQA v2 and Visual Genome.

    Attributes:
        images: the folder of COCO's images. genome: that of Visual Genome's.
        slots: the maximum of different answers of a question; ten people answered each.
        answer_length: tokens of an answer, [CLS] and [SEP] included.

    Of the class:
        alone: the weight of Visual Genome's single answers.
    """

    alone: ClassVar[float]

    files: tuple[str, ...] = ("vqa_train.json", "vqa_val.json", "vg_qa.json")
    genome: str = "visual_genome"
    slots: int = 10
    answer_length: int = 16

    def source(self) -> Source:
        return QuestionList(self.paths, {"vqa": self.images, "vg": self.genome}, alone=self.alone)

    def text_transforms(self) -> tuple[Transform, ...]:
        return *super().text_transforms(), EncodeAnswers(self.tokenizer, self.slots, self.answer_length)

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        slots = (self.batch_size, self.slots)
        answers = jax.ShapeDtypeStruct((*slots, self.answer_length), jnp.int32)
        columns = {"answer_ids": answers, "answer_mask": answers}
        return super().example_batch() | columns | {"answer_weights": jax.ShapeDtypeStruct(slots, jnp.float32)}


@dataclasses.dataclass(frozen=True)
class ImagePairData(PublishedRecipe):
    """Entries {images: [left, right], sentence, label}: NLVR2."""

    files: tuple[str, ...] = ("nlvr_train.json",)

    def source(self) -> Source:
        return ImagePairList(self.paths, self.images)

    def image_transforms(self) -> tuple[Transform, ...]:
        return tuple(OnEach(transform) for transform in super().image_transforms())

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        image = jax.ShapeDtypeStruct((self.batch_size, self.size, self.size, 3), jnp.uint8)
        return {"image_0": image, "image_1": image} | self.token_columns() | self.label_column("label")
