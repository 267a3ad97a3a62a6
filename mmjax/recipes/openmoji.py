"""The base of the small recipes of ALBEF and BLIP on OpenMoji's drawings and their names, which pip brings."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.caption_text import CleanText, EncodeCaption
from mmjax.data.openmoji import ATTRIBUTION, OpenMoji, load_openmoji
from mmjax.data.pipeline import Pipeline
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.transforms import RandomFlip, RandomResizedCrop
from mmjax.evaluation.rerank import RerankEvaluation
from mmjax.evaluation.retrieval import RetrievalEvaluation
from mmjax.evaluation.two_stage import TwoStages
from mmjax.models.vit.network import ViTConfig
from mmjax.recipes.image_text import EncoderStart
from mmjax.text.captions import caption_columns
from mmjax.text.training import train_wordpiece
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.training.experiment import Evaluation, save_tokenizer
from mmjax.training.image_text import Alignment
from mmjax.training.optimizer import Optimizer, adamw, warmup_cosine

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclasses.dataclass(frozen=True)
class OpenMojiPairs(EncoderStart, abc.ABC):
    """A run of minutes on two cores. Experiments add the network and the method.

    Attributes:
        hold_out: the rule of the split, see `mmjax.data.openmoji`.
        image_size, patch: sides in pixels, of the drawings and of a patch.
        vocab_size: pieces of the tokenizer, trained on the training names.
        length: tokens of a text, [CLS] included.
        width, vision_depth, text_depth: of both encoders.
        queue: keys of earlier batches, a multiple of the batch. With so few drawings a longer queue holds most of them,
            and one of a drawing's negatives is then itself, from the epoch before.
        momentum: of the momentum encoders, for a shorter run than the papers'.
        alpha: the momentum encoders' share of the targets; it rises over `alpha_steps` batches.
        k: drawings or names that the ITM head scores for each query.

    Of the class:
        clean: how a text is cleaned. sep: whether [SEP] ends it. add_similarity: see `Reranker`.
    """

    ramps: ClassVar[tuple[str, ...]] = ("warmup", "alpha_steps")
    clean: ClassVar[Callable[[str], str]]
    sep: ClassVar[bool]
    add_similarity: ClassVar[bool]

    steps: int = 400
    batch_size: int = 128
    eval_every: int = 100
    checkpoint_every: int = 100
    hold_out: Literal["name", "family"] = "name"
    image_size: int = 48
    patch: int = 8
    vocab_size: int = 1500
    length: int = 16
    width: int = 128
    vision_depth: int = 3
    text_depth: int = 4
    embed_dim: int = 128
    queue: int = 128
    momentum: float = 0.99
    alpha: float = 0.2
    alpha_steps: int = 200
    learning_rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.05
    crop: float = 0.5
    k: int = 32

    @abc.abstractmethod
    def method(self) -> Alignment: ...

    @functools.cached_property
    def pairs(self) -> OpenMoji:
        return load_openmoji(self.image_size, hold_out=self.hold_out)

    @functools.cached_property
    def tokenizer(self) -> WordPieceTokenizer:
        names = (self.clean(text) for texts in self.pairs.train.columns["texts"] for text in texts)
        return train_wordpiece(names, self.vocab_size)

    @property
    def vision(self) -> ViTConfig:
        """With a wider initial spread than the published sizes, whose 0.02 is for 768 channels; texts likewise."""
        side = (self.image_size, self.image_size)
        return ViTConfig(self.width, self.vision_depth, self.width // 64, 4 * self.width, self.patch, side, init="vit")

    @property
    def text_sizes(self) -> dict[str, Any]:
        """Fields of a BertConfig: sizes and spread."""
        sizes = {"width": self.width, "depth": self.text_depth, "heads": self.width // 64, "hidden": 4 * self.width}
        return sizes | {"positions": self.length, "pooler": False, "init_std": self.width**-0.5}

    @property
    def contrast(self) -> dict[str, Any]:
        """Fields of the network's config."""
        return {"embed_dim": self.embed_dim, "queue": self.queue, "momentum": self.momentum, "alpha": self.alpha}

    def optimizer(self) -> Optimizer:
        return Optimizer(adamw(warmup_cosine(self.learning_rate, self.steps, self.warmup), self.weight_decay))

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        tokens = jax.ShapeDtypeStruct((self.batch_size, self.length), jnp.int32)
        image = jax.ShapeDtypeStruct((self.batch_size, self.image_size, self.image_size, 3), jnp.uint8)
        return {"image": image, "input_ids": tokens, "attention_mask": tokens}

    def train_data(self) -> Pipeline:
        crop = RandomResizedCrop(self.image_size, scale=(self.crop, 1.0))
        encode = EncodeCaption(self.tokenizer, self.length, sep=self.sep)
        return Pipeline(
            self.pairs.train,
            self.batch_size,
            seed=self.seed,
            transforms=(crop, RandomFlip(), CleanText(self.clean), encode),
            workers=self.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def evaluations(self) -> tuple[Evaluation, ...]:
        """Retrieval on the held-out drawings: by the features, and with the ITM head on the nearest."""
        method, held_out = self.method(), self.pairs.held_out.columns
        images, names = np.asarray(held_out["image"]), list(held_out["text"])
        cleaned = [self.clean(name) for name in names]
        texts = caption_columns(self.tokenizer, cleaned, self.length, sep=self.sep)
        features = RetrievalEvaluation(
            name="features",
            encode_image=method.encode_image,
            encode_text=method.encode_text,
            images=images,
            texts=texts,
            final_step=self.steps,
        )
        stages = TwoStages(method.head, method.pixels)
        reranking = RerankEvaluation(
            reranker=stages.reranker(self.k, add_similarity=self.add_similarity),
            first=functools.partial(stages.first, images, texts),
            captions=names,
            thumbnails=images,
            attribution=ATTRIBUTION,
            final_step=self.steps,
        )
        return features, reranking

    @property
    def preprocess(self) -> ImagePreprocessing:
        size = (self.image_size, self.image_size)
        return ImagePreprocessing(size, None, resample="bilinear", mean=MEAN, std=STD)

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """The tokenizer, and the image preprocessing."""
        return save_tokenizer(self.tokenizer, workdir) | {"preprocess": dataclasses.asdict(self.preprocess)}
