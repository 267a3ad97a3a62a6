"""Base of LLaVA's two stages: their data, and the network's start."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import hub
from mmjax.data.decoding import BadRecord
from mmjax.data.instructions import InstructionList
from mmjax.data.pipeline import Pipeline
from mmjax.data.preprocess import LLAVA_GRIDS, ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.interface.model import Model
from mmjax.models.language.tasks import LanguageModel
from mmjax.models.llava.tasks import LlavaModel
from mmjax.models.llava.templates import TrainingTemplate, training_template
from mmjax.models.vision_language.network import MlpConnector, VisionLanguageConfig
from mmjax.models.vision_language.pretrain import PrefixLM
from mmjax.recipes.conversations import EncodeConversation, EncodeTiles, bucket_widths, most_pictures
from mmjax.text.tokenizer import Tokenizer
from mmjax.training.experiment import Evaluation, ExperimentConfig, LoadWeights, save_tokenizer
from mmjax.tree import flatten


@dataclasses.dataclass(frozen=True)
class LlavaStage(ExperimentConfig, abc.ABC):
    """What both stages share. The rates are constant but for a warmup of 3 % and half a cosine, without decay.

    Attributes:
        data: a file of conversations, see `mmjax.data.instructions`; required.
        images: the folder of its images; None: the file's.
        length: ids of a row after images became features; the original's is 2048.
        pictures: the greatest number of images of a row, each of which may become several pictures.
        grouped: batches are of rows of nearly one length, with images or without. Less than a tenth of a batch is then
            padding, and a program is compiled for each of the lengths, which differ by a fifth.
        learning_rate: the highest.
        dtype, remat: of the computation.
    """

    unit: ClassVar[str] = "conversations"

    data: str | None = None
    images: str | None = None
    length: int = 2048
    pictures: int = 1
    grouped: bool = False
    learning_rate: float = 1e-3
    dtype: str = "float32"
    remat: bool = False

    @property
    def warmup_steps(self) -> int:
        """Steps: 3 %, rounded up; a run of one step has none."""
        return min(-(-3 * self.steps // 100), self.steps - 1)

    @property
    @abc.abstractmethod
    def template(self) -> TrainingTemplate:
        """Of the training texts."""

    @property
    @abc.abstractmethod
    def network(self) -> VisionLanguageConfig:
        """The config that is trained and saved."""

    @property
    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The language model's."""

    @property
    @abc.abstractmethod
    def preprocess(self) -> ImagePreprocessing:
        """Of the images, to pictures of the tower's size."""

    @functools.cached_property
    def source(self) -> InstructionList:
        if self.data is None:
            raise MmjaxError("--data FILE.json: conversations in LLaVA's format to train on")
        return InstructionList(self.data, self.images)

    @property
    def plain(self) -> PrefixLM:
        """The method without adapters."""
        config = dataclasses.replace(self.network, dtype=self.dtype, remat=self.remat)
        return PrefixLM(config, self.preprocess.mean, self.preprocess.std)

    @property
    def row_pictures(self) -> int:
        """The greatest number of pictures of a row, tiles included."""
        return self.pictures * most_pictures(self.network)

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        row = jax.ShapeDtypeStruct((self.batch_size, self.length), jnp.int32)
        shape = (self.batch_size, self.row_pictures, *self.network.vision.image_size, 3)
        names = ("input_ids", "attention_mask", "labels", "feature_index")
        return {**dict.fromkeys(names, row), "image": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    @functools.cached_property
    def encode(self) -> EncodeConversation:
        network, widths = self.network, bucket_widths(self.length) if self.grouped else ()
        sizes = network.tile_tokens, self.length, self.row_pictures, widths
        common = self.template, self.tokenizer, self.preprocess, *sizes
        return EncodeTiles(*common, config=network) if network.grids else EncodeConversation(*common)

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """int32 [n]: conversations with one number have one width, and all have images or none; 0: unreadable ones."""
        groups = np.zeros(len(self.source), np.int32)
        for index in range(len(groups)):
            try:
                lengths = self.encode.lengths(self.source.image_paths(index))
                size = self.encode.size(self.source.turns(index), lengths)
                groups[index] = 2 * self.encode.width(size) + bool(lengths)
            except BadRecord:
                continue
        return groups

    def train_data(self) -> Pipeline:
        return Pipeline(
            self.source,
            self.batch_size,
            seed=self.seed,
            transforms=(self.encode,),
            groups=self.groups if self.grouped else None,
            workers=self.workers,
            max_bad_fraction=self.max_bad_fraction,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def evaluations(self) -> tuple[Evaluation, ...]:
        return ()

    def model(self) -> tuple[str, VisionLanguageConfig]:
        return "llava", self.network

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        return save_tokenizer(self.tokenizer, workdir) | {"preprocess": dataclasses.asdict(self.preprocess)}


@dataclasses.dataclass(frozen=True)
class Parts(LlavaStage, abc.ABC):
    """A stage that starts from a vision tower and a language model, and a fresh connector between them.

    Attributes:
        init_vision: a CLIP, or a ViT: a file, a folder, a run or a hub id; required.
        init_language: a language model with its tokenizer; required.
        layers: of the connector; 1: a matrix (LLaVA v1).
        chat_template: of the conversations of the second stage and of chats, by its name in
            `mmjax.models.llava.templates`; "": the tokenizer's own.
    """

    init_vision: str | None = None
    init_language: str | None = None
    layers: int = 2
    chat_template: str = "vicuna_v1"

    def init_sources(self) -> tuple[str, ...]:
        return tuple(source for source in (self.init_vision, self.init_language) if source is not None)

    @functools.cached_property
    def parts(self) -> tuple[Model, LanguageModel]:
        """The loaded vision model and language model."""
        if self.init_vision is None or self.init_language is None:
            raise MmjaxError("--init_vision MODEL --init_language MODEL: what stage 1 connects")
        vision, language = hub.load(self.init_vision), hub.load(self.init_language)
        if not isinstance(language, LanguageModel) or language.tokenizer is None:
            raise MmjaxError(f"{self.init_language}: not a language model with a tokenizer")
        if vision.system not in ("clip", "vit"):
            raise MmjaxError(f"{self.init_vision}: a {vision.system}; the tower is a ViT's or CLIP's")
        return vision, language

    @property
    def network(self) -> VisionLanguageConfig:
        vision, language = self.parts
        tower = dataclasses.replace(getattr(vision.config, "tower", vision.config), num_classes=0)
        connector = MlpConnector(self.layers)
        return VisionLanguageConfig(tower, language.config, connector, template=self.chat_template, pad_images=True)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.parts[1].tokenizer

    @property
    def preprocess(self) -> ImagePreprocessing:
        return self.parts[0].preprocess

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        vision, language = self.parts
        tower = vision.params.get("vision", vision.params)
        tower = {name: leaf for name, leaf in tower.items() if name not in ("head", "head_distilled")}
        params = {"vision": tower, "language": language.params}
        origins = {
            path: {"vision": self.init_vision, "language": self.init_language}[path.split("/")[0]]
            for path in flatten(params)
        }
        return {"params": params, "origins": origins}


@dataclasses.dataclass(frozen=True)
class Whole(LlavaStage, abc.ABC):
    """A stage that starts from a whole LLaVA: `init_from`, such as the workdir of stage 1.

    Attributes:
        any_resolution: images are cut in tiles (LLaVA 1.6), as those of a model with grids always are. A model that had
            none gets LLaVA 1.6's, and a new feature that ends the rows of patches.
        size: the network of LLaVA 1.5 instead of init_from's, for `mmjax plan` without files.
    """

    any_resolution: bool = False
    size: Literal["7b", "13b"] | None = None

    def __post_init__(self) -> None:
        """Raises MmjaxError for a size beside a model that has one."""
        super().__post_init__()
        if self.size is not None and self.init_from is not None:
            raise MmjaxError(f"size={self.size} is for plans without files; init_from has its own")

    @functools.cached_property
    def start(self) -> LlavaModel:
        """The loaded model. Raises MmjaxError for another system."""
        if self.init_from is None:
            raise MmjaxError("--init_from MODEL: a LLaVA, such as the workdir of stage 1")
        model = hub.load(self.init_from)
        if not isinstance(model, LlavaModel) or model.tokenizer is None:
            raise MmjaxError(f"{self.init_from}: not a LLaVA with a tokenizer")
        return model

    @property
    def network(self) -> VisionLanguageConfig:
        sizes = {"7b": VisionLanguageConfig.llava_1_5_7b, "13b": VisionLanguageConfig.llava_1_5_13b}
        config = self.start.config if self.size is None else sizes[self.size]()
        if config.grids or not self.any_resolution:
            return config
        return dataclasses.replace(config, grids=LLAVA_GRIDS, merge="spatial_unpad", pad_images=False)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.start.tokenizer

    @property
    def template(self) -> TrainingTemplate:
        return training_template(self.network.template, self.tokenizer)

    @property
    def preprocess(self) -> ImagePreprocessing:
        """In tiles, or padded to squares, as the original's second stage does."""
        grids = self.network.grids
        usual = ImagePreprocessing.llava() if self.size is not None else self.start.preprocess
        return dataclasses.replace(usual, pad=not grids, grids=grids)

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        return {"params": self.start.params}
