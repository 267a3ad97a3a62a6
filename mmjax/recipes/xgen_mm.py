"""Base of training xGen-MM on conversations: LLaVA's data and steps, Phi-3's labels, tiles through the resampler."""

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import hub
from mmjax.data.instructions import InstructionList
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.tiles import Size
from mmjax.errors import MmjaxError
from mmjax.models.vision_language.network import VisionLanguageConfig
from mmjax.models.xgen_mm.index import picture_tokens
from mmjax.models.xgen_mm.tasks import XGenMMModel
from mmjax.models.xgen_mm.template import Phi3Template
from mmjax.recipes.conversations import EncodeTiles, bucket_widths
from mmjax.recipes.llava import LlavaStage
from mmjax.text.tokenizer import Tokenizer
from mmjax.training.experiment import LoadWeights


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeXGenMM(EncodeTiles):
    """An `EncodeTiles` with the tokens of each picture: token_index int32, token_mask bool [pictures, p]."""

    def arranged(self, sizes: Sequence[Size]) -> dict[str, np.ndarray]:
        rows, columns = self.config.vision.grid
        index = np.arange(self.pictures * rows * columns, dtype=np.int32).reshape(self.pictures, rows * columns)
        mask = np.ones(index.shape, bool)
        used, shown = picture_tokens(self.config, sizes)
        index[: len(used)], mask[: len(used)] = used, shown
        return {"token_index": index, "token_mask": mask}


@dataclasses.dataclass(frozen=True)
class XGenMMStage(LlavaStage, abc.ABC):
    """A stage that starts from a whole xGen-MM: `init_from`.

    Attributes:
        warmup: steps to the highest rate, after which half a cosine goes to 0.
        pictures: as of every stage, the greatest number of images of a row, each of which may become five pictures.
    """

    length: int = 2688
    grouped: bool = True
    learning_rate: float = 2e-5
    warmup: int = 2000

    @property
    def warmup_steps(self) -> int:
        """At most half of the run."""
        return min(self.warmup, self.steps // 2)

    @functools.cached_property
    def start(self) -> XGenMMModel:
        """The loaded model. Raises MmjaxError for another system."""
        if self.init_from is None:
            raise MmjaxError("--init_from MODEL: an xGen-MM, such as Salesforce's base model")
        model = hub.load(self.init_from)
        if not isinstance(model, XGenMMModel) or model.tokenizer is None:
            raise MmjaxError(f"{self.init_from}: not an xGen-MM with a tokenizer")
        return model

    @functools.cached_property
    def source(self) -> InstructionList:
        """A single image of a conversation without `<image>` comes before its first question."""
        if self.data is None:
            raise MmjaxError("--data FILE.json: conversations in LLaVA's format to train on")
        return InstructionList(self.data, self.images, image_first=True)

    @property
    def network(self) -> VisionLanguageConfig:
        return self.start.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.start.tokenizer

    @property
    def template(self) -> Phi3Template:  # type: ignore[override]
        return self.start.template

    @property
    def preprocess(self) -> ImagePreprocessing:
        return self.start.preprocess

    @functools.cached_property
    def encode(self) -> EncodeXGenMM:
        return EncodeXGenMM(
            self.template,  # type: ignore[arg-type]
            self.tokenizer,
            self.preprocess,
            self.network.tile_tokens,
            self.length,
            self.row_pictures,
            bucket_widths(self.length) if self.grouped else (),
            config=self.network,
        )

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        rows, columns = self.network.vision.grid
        shape = (self.batch_size, self.row_pictures, rows * columns)
        tokens = {"token_index": jax.ShapeDtypeStruct(shape, jnp.int32)}
        tokens["token_mask"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
        return super().example_batch() | tokens

    def model(self) -> tuple[str, VisionLanguageConfig]:
        return "xgen_mm", self.network

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        return {"params": self.start.params}
