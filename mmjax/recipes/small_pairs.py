"""The base of small recipes on pairs in memory: contrast, matching, and retrieval of held-out pairs as they train."""

import abc
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import numpy as np

from mmjax.data.openmoji import ATTRIBUTION
from mmjax.data.pipeline import Transform
from mmjax.data.sources import ArraySource, Source
from mmjax.data.transforms import RandomFlip
from mmjax.evaluation.rerank import RerankEvaluation
from mmjax.evaluation.retrieval import RetrievalEvaluation
from mmjax.evaluation.two_stage import TwoStages
from mmjax.recipes.small_image_text import SmallImageText
from mmjax.text.captions import caption_columns
from mmjax.training.experiment import Evaluation
from mmjax.training.image_text import Alignment


class SplitPairs(Protocol):
    """Records of both: image uint8 [size, size, 3], text, texts (all texts of the image)."""

    @property
    def train(self) -> ArraySource: ...
    @property
    def held_out(self) -> ArraySource: ...


@dataclasses.dataclass(frozen=True)
class SmallPairs(SmallImageText, abc.ABC):
    """A run of minutes on two cores. Experiments add the pairs, the network and the method.

    Attributes:
        queue: keys of earlier batches, a multiple of the batch. With so few images a longer queue holds most of them,
            and one of an image's negatives is then itself, from the epoch before.
        momentum: of the momentum encoders, for a shorter run than the papers'.
        alpha: the momentum encoders' share of the targets; it rises over `alpha_steps` batches.
        k: images or texts that the ITM head scores for each query.

    Of the class:
        add_similarity: see `Reranker`.
    """

    ramps: ClassVar[tuple[str, ...]] = ("warmup", "alpha_steps")
    add_similarity: ClassVar[bool]

    steps: int = 400
    batch_size: int = 128
    eval_every: int = 100
    checkpoint_every: int = 100
    image_size: int = 48
    embed_dim: int = 128
    queue: int = 128
    momentum: float = 0.99
    alpha: float = 0.2
    alpha_steps: int = 200
    k: int = 32

    @abc.abstractmethod
    def method(self) -> Alignment: ...

    @property
    @abc.abstractmethod
    def pairs(self) -> SplitPairs:
        """Images of one size with their texts."""

    def tokenizer_texts(self) -> Iterable[str]:
        """All training texts."""
        return (text for texts in self.pairs.train.columns["texts"] for text in texts)

    def source(self) -> Source:
        return self.pairs.train

    @property
    def contrast(self) -> dict[str, Any]:
        """Fields of the network's config."""
        return {"embed_dim": self.embed_dim, "queue": self.queue, "momentum": self.momentum, "alpha": self.alpha}

    def image_transforms(self) -> tuple[Transform, ...]:
        return (RandomFlip(),)

    def evaluations(self) -> tuple[Evaluation, ...]:
        """Retrieval on the held-out pairs: by the features, and with the ITM head on the nearest."""
        method, held_out = self.method(), self.pairs.held_out.columns
        images, captions = np.asarray(held_out["image"]), list(held_out["text"])
        cleaned = [self.clean(caption) for caption in captions]
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
            captions=captions,
            thumbnails=images,
            attribution=ATTRIBUTION,
            final_step=self.steps,
        )
        return features, reranking
