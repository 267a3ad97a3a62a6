"""Base of BLIP-2's recipes after its first stage: texts behind the places of the queries, and the network's start."""

import abc
import dataclasses
import pathlib
from typing import Any, ClassVar, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.caption_text import CleanText
from mmjax.data.decoding import BadRecord
from mmjax.data.pipeline import Transform
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.sources import Record
from mmjax.data.transforms import RandomFlip, RandomResizedCrop, drawn_text
from mmjax.models.vision_language.network import VisionLanguageConfig
from mmjax.models.vision_language.pretrain import PrefixLM
from mmjax.recipes.image_text import EpochRecipe
from mmjax.text.captions import BLIP2_RULES
from mmjax.text.packing import IGNORED
from mmjax.text.tokenizer import Tokenizer
from mmjax.training.experiment import save_tokenizer
from mmjax.training.optimizer import Schedule, warmup_epoch_cosine


@dataclasses.dataclass(frozen=True)
class EncodeAfterQueries(grain.transforms.RandomMap):
    """A record with `image` uint8 [h, w, 3] and a text -> what `PrefixLM` takes, with the queries before the text.

    Of a decoder the text is "</s> prompt text\\n", truncated at its end; all of it but the prompt is learned, with an
    empty prompt also </s>, from the last query (blip2_opt.py:107-162). Of an encoder-decoder the encoder gets the
    queries and the prompt, the decoder the text (blip2_t5.py:102-156).

    Attributes:
        length: ids of a text, special ones included; of an encoder-decoder of each of its two.
        prompt: before every text.
        encodes: whether it is an encoder-decoder.
        split: of one: the text is cut at a random word, and its first part goes to the encoder (the paper's section
            3.2; LAVIS has no code for it).
    Raises BadRecord for a text of which no label is left.
    """

    tokenizer: Tokenizer
    queries: int
    length: int
    prompt: str = ""
    encodes: bool = False
    split: bool = False

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        text = drawn_text(element, True, rng)
        if self.encodes:
            first, text = self._parts(text, rng)
            ids, labels = self._truncated(first), self._truncated(text)
            labels = self._column(labels, IGNORED)
        else:
            ids = self.tokenizer.encode([self._joined(text) + "\n"])[0][: self.length]
            masked = min(len(self.tokenizer.encode([self.prompt])[0]), len(ids)) if self.prompt else 0
            labels = self._column([IGNORED] * (self.queries + masked) + ids[masked:], IGNORED, self.queries)
        if (labels == IGNORED).all():
            raise BadRecord("caption: no label", detail=f"length={self.length} ends before {text[:80]!r}")
        size = self.queries + len(ids)
        columns = {
            "input_ids": self._column([0] * self.queries + ids, self.tokenizer.pad or 0, self.queries),
            "attention_mask": self._column([1] * size, 0, self.queries),
            "feature_index": self._column(list(range(self.queries)), -1, self.queries),
            "labels": labels,
        }
        return {**element, **columns, "image": element["image"][None]}

    def _joined(self, text: str) -> str:
        return f"{self.prompt} {text}" if self.prompt else text

    def _parts(self, text: str, rng: np.random.Generator) -> tuple[str, str]:
        """(the encoder's text, the decoder's)."""
        words = text.split(" ")
        if not self.split or len(words) < 2:
            return self.prompt, text
        cut = int(rng.integers(0, len(words)))
        return self._joined(" ".join(words[:cut])).strip(), " ".join(words[cut:])

    def _truncated(self, text: str) -> list[int]:
        ids = self.tokenizer.encode([text])[0]
        return ids if len(ids) <= self.length else self.tokenizer.encode_truncated(text, self.length, True)

    def _column(self, ids: list[int], fill: int, queries: int = 0) -> np.ndarray:
        row = np.full(queries + self.length, fill, np.int32)
        row[: len(ids)] = ids
        return row


@dataclasses.dataclass(frozen=True)
class QueriesBeforeLanguage(EpochRecipe, abc.ABC):
    """Captions of images, behind queries, in batches of one width.

    Attributes:
        start_rate, end_rate, warmup: see `warmup_epoch_cosine`.
        weight_decay: of the queries and matrices, not of norms and biases. b2: AdamW's.
        split: see `EncodeAfterQueries`.

    Of the class:
        prompt: before every caption.
    """

    prompt: ClassVar[str] = ""

    length: int = 32
    start_rate: float = 1e-6
    end_rate: float = 1e-5
    warmup: int = 2_000
    weight_decay: float = 0.05
    b2: float = 0.999
    split: bool = False
    vision_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    language_dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @property
    @abc.abstractmethod
    def network(self) -> VisionLanguageConfig:
        """The config that is trained and saved."""

    @property
    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The language model's."""

    @property
    def preprocess(self) -> ImagePreprocessing:
        return ImagePreprocessing.albef(self.size)

    def image_transforms(self) -> tuple[Transform, ...]:
        """A crop and a flip, no RandAugment (blip_processors.py, blip2_image_train)."""
        return RandomResizedCrop(self.size, (self.crop_min, 1.0), resample="bicubic"), RandomFlip()

    def text_transforms(self) -> tuple[Transform, ...]:
        network = self.network
        sizes = network.tile_tokens, self.length, self.prompt, network.encodes, self.split
        return CleanText(BLIP2_RULES.caption), EncodeAfterQueries(self.tokenizer, *sizes)

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        network, b = self.network, self.batch_size
        row = jax.ShapeDtypeStruct((b, network.tile_tokens + self.length), jnp.int32)
        label = jax.ShapeDtypeStruct((b, self.length), jnp.int32) if network.encodes else row
        columns = dict.fromkeys(("input_ids", "attention_mask", "feature_index"), row) | {"labels": label}
        return {"image": jax.ShapeDtypeStruct((b, 1, self.size, self.size, 3), jnp.uint8), **columns}

    def schedule(self) -> Schedule:
        rates = {"start": self.start_rate, "end": self.end_rate}
        return warmup_epoch_cosine(self.learning_rate, self.epochs, self.epoch, self.warmup, **rates)

    def method(self) -> PrefixLM:
        return PrefixLM(self.network, self.preprocess.mean, self.preprocess.std)

    def model(self) -> tuple[str, VisionLanguageConfig]:
        return "blip2_language", self.network

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """The tokenizer, whose texts end with a line break, and the preprocessing of images."""
        return save_tokenizer(self.tokenizer, workdir) | {"preprocess": dataclasses.asdict(self.preprocess)}
