"""OpenFlamingo's training (arXiv 2308.01390; open_flamingo's README and train/train.py), on any decoder and CLIP.

    mmjax train experiments/flamingo_pretrain.py --documents mmc4.jsonl --document_images mmc4 \\
        --pairs laion.jsonl --pair_images laion --language anas-awadalla/mpt-7b --every 4
    mmjax evaluate workdirs/flamingo_pretrain --task captions --data coco_karpathy_val.json --images coco \\
        --shots 0,4,8,16,32 --support coco_karpathy_train.json
    mmjax ablate experiments/flamingo_pretrain.py --sequential --over initial_gate=0,1 --over latents=8,16,64 ...

Each step has `batch_size` documents of MMC4's form with up to six images, and twice as many pairs of an image and a
caption. Image encoder and language model are frozen. The published runs have 64 GPUs with 32 documents and 64 pairs
each: 60 million documents, 29,300 steps. Without --pairs or without --documents the other source is alone.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

from mmjax.data.image_text import ImageTextList
from mmjax.data.interleaved import Documents, EncodeDocument, EncodePair
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.models.flamingo.config import FlamingoConfig
from mmjax.models.flamingo.tasks import FlamingoModel
from mmjax.recipes.flamingo import FlamingoRecipe, SourceShape, TrainingSource


@dataclasses.dataclass(frozen=True)
class Config(FlamingoRecipe):
    """The published recipe. `every` is 1 on MPT-1B, 2 on RedPajama-3B, 4 on MPT-7B.

    Attributes:
        size: the published network instead of `language` and `vision`, for `mmjax plan` without files.
        documents, document_images: a .jsonl of MMC4's form, and the folder of its images.
        pairs, pair_images: annotations of images with captions (`mmjax.data.image_text`), and their folder.
        length, caption_length: tokens of a document and of a pair. images: the maximum of a document.
        threshold: of the similarity of an image and its sentence.
        pairs_per_document: batch_size is that of the documents.
        document_weight, pair_weight: factors of the two losses.
    """

    steps: int = 29_300
    batch_size: int = 2048
    lift: Literal["jit", "pmap", "mesh"] = "mesh"
    log_every: int = 50
    checkpoint_every: int = 1000
    workers: int = 16
    language: str = "anas-awadalla/mpt-7b"
    vision: str = "openai/clip-vit-large-patch14"
    size: Literal["3b", "4b", "9b"] | None = None
    documents: str | None = None
    document_images: str | None = None
    pairs: str | None = None
    pair_images: str | None = None
    length: int = 256
    caption_length: int = 32
    images: int = 6
    threshold: float = 0.24
    pairs_per_document: int = 2
    document_weight: float = 1.0
    pair_weight: float = 0.2

    @functools.cached_property
    def start(self) -> FlamingoModel:
        if self.size is not None:
            raise MmjaxError(f"size={self.size} is for plans without files; training starts from language and vision")
        return super().start

    @property
    def network(self) -> FlamingoConfig:
        if self.size is None:
            return super().network
        sizes = {"3b": FlamingoConfig.open_flamingo_3b, "4b": FlamingoConfig.open_flamingo_4b}
        sizes |= {"9b": FlamingoConfig.open_flamingo_9b}
        return sizes[self.size](dtype=self.dtype, remat=self.remat)

    @property
    def preprocess(self) -> ImagePreprocessing:
        return super().preprocess if self.size is None else ImagePreprocessing.clip(224)

    def shapes(self) -> Mapping[str, TrainingSource | SourceShape]:
        """Of both sources where `size` replaces the files."""
        if self.size is None:
            return super().shapes()
        pairs = self.batch_size * self.pairs_per_document
        return {
            "documents": SourceShape(self.batch_size, self.images, self.length, self.document_weight),
            "pairs": SourceShape(pairs, 1, self.caption_length, self.pair_weight),
        }

    def sources(self) -> dict[str, TrainingSource]:
        tokenizer, preprocess = self.start.tokenizer, self.start.preprocess
        sources: dict[str, TrainingSource] = {}
        if self.documents is not None:
            encode = EncodeDocument(tokenizer, self.length, self.images, preprocess)
            listed = Documents(self.documents, self.document_images, threshold=self.threshold)
            sizes = (self.images, self.length, self.document_weight)
            sources["documents"] = TrainingSource(listed, self.batch_size, encode, *sizes)
        if self.pairs is not None:
            count = self.batch_size * (self.pairs_per_document if sources else 1)
            encode_pair = EncodePair(tokenizer, self.caption_length, preprocess)
            pairs = ImageTextList(self.pairs, self.pair_images)
            sources["pairs"] = TrainingSource(pairs, count, encode_pair, 1, self.caption_length, self.pair_weight)
        if not sources:
            raise MmjaxError("--documents FILE.jsonl, --pairs FILE.json or both: there is nothing to train on")
        return sources
