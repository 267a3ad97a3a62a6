"""The base of recipes that train small image-text networks from random weights in minutes on a laptop's CPU."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mmjax.data.caption_text import CleanText, EncodeCaption
from mmjax.data.pipeline import Pipeline, Transform
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.sources import Source
from mmjax.data.transforms import Keep
from mmjax.models.vit.network import ViTConfig
from mmjax.recipes.image_text import EncoderStart
from mmjax.text.training import train_wordpiece
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.training.experiment import save_tokenizer
from mmjax.training.optimizer import Optimizer, adamw, warmup_cosine

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclasses.dataclass(frozen=True)
class SmallImageText(EncoderStart, abc.ABC):
    """Experiments add texts, source, network and method.

    Attributes:
        image_size, patch: sides in pixels, of the images and of a patch.
        vocab_size: pieces of the tokenizer, trained on the training texts.
        length: tokens of a text, [CLS] included.
        width, vision_depth, text_depth: of both encoders. head_width: of their attention.
        dropout: of the texts' layers and attention.
        positions: of the image encoder, see `ViTConfig`. "learned" ones begin at a fiftieth of the patches' spread, so
            that shapes and places, which depend on the arrangement of patches, are learned late.

    Of the class:
        clean: how a text is cleaned. sep: whether [SEP] ends it.
    """

    clean: ClassVar[Callable[[str], str]]
    sep: ClassVar[bool]

    image_size: int = 64
    patch: int = 8
    vocab_size: int = 1500
    length: int = 16
    width: int = 128
    vision_depth: int = 3
    text_depth: int = 4
    head_width: int = 64
    dropout: float = 0.1
    positions: Literal["learned", "moco_v3"] = "learned"
    learning_rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.05

    @abc.abstractmethod
    def tokenizer_texts(self) -> Iterable[str]:
        """The texts that the tokenizer is trained on, not yet cleaned."""

    @abc.abstractmethod
    def source(self) -> Source:
        """The training records."""

    @functools.cached_property
    def tokenizer(self) -> WordPieceTokenizer:
        return train_wordpiece((self.clean(text) for text in self.tokenizer_texts()), self.vocab_size)

    @property
    def vision(self) -> ViTConfig:
        """With a wider initial spread than the published sizes, whose 0.02 is for 768 channels; texts likewise."""
        side = (self.image_size, self.image_size)
        heads, hidden = self.width // self.head_width, 4 * self.width
        positions: Any = {"positions": self.positions, "init": "vit"}
        return ViTConfig(self.width, self.vision_depth, heads, hidden, self.patch, side, **positions)

    @property
    def text_sizes(self) -> dict[str, Any]:
        """Fields of a BertConfig: sizes and spread."""
        sizes: dict[str, Any] = {
            "width": self.width,
            "depth": self.text_depth,
            "hidden": 4 * self.width,
            "positions": self.length,
        }
        sizes |= {"heads": self.width // self.head_width, "pooler": False, "init_std": self.width**-0.5}
        return sizes | {"dropout": self.dropout, "attention_dropout": self.dropout}

    def optimizer(self) -> Optimizer:
        return Optimizer(adamw(warmup_cosine(self.learning_rate, self.steps, self.warmup), self.weight_decay))

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        tokens = jax.ShapeDtypeStruct((self.batch_size, self.length), jnp.int32)
        return {"image": self.image_column, "input_ids": tokens, "attention_mask": tokens}

    @property
    def image_column(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch_size, self.image_size, self.image_size, 3), jnp.uint8)

    def image_transforms(self) -> tuple[Transform, ...]:
        """Of a training record; by default none."""
        return ()

    def text_transforms(self) -> tuple[Transform, ...]:
        return CleanText(self.clean), EncodeCaption(self.tokenizer, self.length, sep=self.sep)

    def train_data(self) -> Pipeline:
        return Pipeline(
            self.source(),
            self.batch_size,
            seed=self.seed,
            transforms=(*self.image_transforms(), *self.text_transforms(), Keep(tuple(self.example_batch()))),
            workers=self.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    @property
    def preprocess(self) -> ImagePreprocessing:
        size = (self.image_size, self.image_size)
        return ImagePreprocessing(size, None, resample="bilinear", mean=MEAN, std=STD)

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """The tokenizer, and the image preprocessing."""
        return save_tokenizer(self.tokenizer, workdir) | {"preprocess": dataclasses.asdict(self.preprocess)}
