"""Documents with images among their sentences, and pairs in the same form, for Flamingo.

documents = Documents("mmc4.jsonl", "mmc4/images", threshold=0.24)
pairs = ImageTextList("laion.jsonl", "laion/images")
Pipeline(documents, 32, transforms=(EncodeDocument(tokenizer, 256, 6, preprocess),))
"""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from grain import transforms

from mmjax.data.annotation_list import AnnotationList, File
from mmjax.data.decoding import BadRecord, clean_caption, decode_image
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.sources import Record, read_bytes
from mmjax.data.transforms import drawn_text
from mmjax.text.interleaved import (
    END_OF_CHUNK,
    IGNORED,
    IMAGE,
    document_labels,
    document_text,
    pair_labels,
    pair_text,
)
from mmjax.text.tokenizer import Tokenizer


class Documents(AnnotationList):
    """MMC4's entries: {"text_list": [sentence, ...], "image_info": [{"image_name", "matched_text_index",
    "matched_sim"}, ...]}, of which each image belongs to one sentence and each sentence has at most one image.

    Records {"sentences": (str, ...), "illustrated": (int, ...), "images": (bytes, ...)}: images in the order of their
    sentences, so that the i-th image is the i-th `<image>`. (OpenFlamingo has them in the order of `image_info`, which
    permutes the pairs of a document where the two orders differ.)

    threshold: images whose "matched_sim" is lower are left out; their sentences stay.
    """

    def __init__(
        self,
        files: File | Sequence[File],
        images: File | None = None,
        name: str | None = None,
        threshold: float = 0.24,
    ):
        super().__init__(files, images, name)
        self.threshold = threshold

    def __getitem__(self, index: int) -> Record:
        sentences, matched = self._matched(index)
        images = tuple(read_bytes(self.image_path(index, name)) for _, name in matched)
        return {"sentences": sentences, "illustrated": tuple(i for i, _ in matched), "images": images}

    def image_paths(self, index: int) -> tuple[pathlib.Path, ...]:
        return tuple(self.image_path(index, name) for _, name in self._matched(index)[1])

    def _matched(self, index: int) -> tuple[tuple[str, ...], list[tuple[int, str]]]:
        """(sentences; index of a sentence and name of its image, in the order of the sentences)."""
        entry, name = self.record(index), self.record_name(index)
        texts = self.field(index, entry, "text_list", list)
        infos = self.field(index, entry, "image_info", list)
        sentences = tuple(clean_caption(text, name) for text in texts)
        matched: dict[int, str] = {}
        for info in infos:
            number, image = info.get("matched_text_index"), info.get("image_name")
            if not isinstance(number, int) or not isinstance(image, str) or not 0 <= number < len(sentences):
                raise BadRecord("list: no matched image", name, f"{info!r:.80}")
            if info.get("matched_sim", 1.0) < self.threshold:
                continue
            if number in matched:
                raise BadRecord("list: two images of a sentence", name, f"{matched[number]} and {image}")
            matched[number] = image
        if not matched:
            raise BadRecord("document: no image", name, f"{len(infos)} below {self.threshold}")
        return sentences, sorted(matched.items())


@dataclass(frozen=True)
class EncodeDocument(transforms.RandomMap):
    """A record of `Documents` -> `image` uint8 [images, height, width, 3], with zeros behind; `input_ids`,
    `attention_mask` and `labels` int32 [length], padded on the right.

    tokenizer: with `<image>` and `<|endofchunk|>`. images: the maximum; further ones are left out with `<image>`.
    preprocess: without its normalisation, which is the step's.
    flip: the probability that all images of a document are mirrored.
    single: the probability that a document with one image is skipped, as in the original.
    Raises BadRecord "document: no image" where truncation leaves none or nothing behind it, and "document: one image"
    where it is skipped.
    """

    tokenizer: Tokenizer
    length: int
    images: int
    preprocess: ImagePreprocessing
    flip: float = 0.5
    single: float = 0.5

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        shown = element["illustrated"][: self.images]
        text = document_text(element["sentences"], shown)
        columns = encoded(self.tokenizer, text, self.length)
        ids, mask = columns["input_ids"], columns["attention_mask"]
        image, end = (special_id(self.tokenizer, token) for token in (IMAGE, END_OF_CHUNK))
        labels = document_labels(ids, mask, image, end)
        count = int((ids == image).sum())
        if (labels == IGNORED).all():
            raise BadRecord("document: no image", detail=f"{self.length} ids have no text behind an image")
        if count == 1 and rng.random() < self.single:
            raise BadRecord("document: one image")
        pixels = _pixels(element["images"][: len(shown)][:count], self.images, self.preprocess, rng, self.flip)
        return {"image": pixels, **columns, "labels": labels}


@dataclass(frozen=True)
class EncodePair(transforms.RandomMap):
    """An image with `text` (or one of `texts`) -> the same with one image; the caption is learned, and the end."""

    tokenizer: Tokenizer
    length: int
    preprocess: ImagePreprocessing
    flip: float = 0.5

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        columns = encoded(self.tokenizer, pair_text(drawn_text(element, True, rng)), self.length)
        image = special_id(self.tokenizer, IMAGE)
        labels = pair_labels(columns["input_ids"], columns["attention_mask"], image)
        return {
            "image": _pixels([element["image"]], 1, self.preprocess, rng, self.flip),
            **columns,
            "labels": labels,
        }


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of an added token. Raises BadRecord where the tokenizer has none."""
    number = tokenizer.tokenizer.token_to_id(token)
    if number is None:
        raise BadRecord("tokenizer: no added tokens", detail=f"{token} is not in the vocabulary")
    return number


def encoded(tokenizer: Tokenizer, text: str, length: int) -> dict[str, Any]:
    """`input_ids`, `attention_mask` int32 [length]: the text and the end of a sequence, cut off or padded."""
    ids = tokenizer.encode([text])[0]
    ids = [*ids, *tokenizer.eos[:1]][:length]
    row = np.full(length, tokenizer.pad or 0, np.int32)
    row[: len(ids)] = ids
    return {"input_ids": row, "attention_mask": (np.arange(length) < len(ids)).astype(np.int32)}


def _pixels(
    images: Sequence[bytes | np.ndarray], slots: int, preprocess: ImagePreprocessing, rng: Any, flip: float
) -> np.ndarray:
    """uint8 [slots, height, width, 3]; one coin mirrors all."""
    decoded = [image if isinstance(image, np.ndarray) else decode_image(image) for image in images]
    pixels = np.stack([preprocess.to_uint8(image) for image in decoded])
    if rng.random() < flip:
        pixels = pixels[:, :, ::-1]
    return np.concatenate([pixels, np.zeros((slots - len(pixels), *pixels.shape[1:]), np.uint8)])
