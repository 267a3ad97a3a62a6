"""Conversations about images as ids, labels, pictures and an index of features: what `PrefixLM` takes."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Int

from mmjax.data.decoding import BadRecord, decode_image, open_image, upright_size
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.sources import Record, read_bytes
from mmjax.data.tiles import Size
from mmjax.models.llava.templates import PLACEHOLDER, Example, TrainingTemplate
from mmjax.models.vision_language.any_resolution import feature_rows, picture_counts
from mmjax.models.vision_language.network import VisionLanguageConfig
from mmjax.text.image_prompts import IMAGE
from mmjax.text.packing import IGNORED
from mmjax.text.tokenizer import Tokenizer

SHORTEST = 32
"""The smallest width of a row, nearly."""


@dataclasses.dataclass(frozen=True)
class EncodeConversation(grain.transforms.Map):
    """A record of `InstructionList` -> what `PrefixLM` takes.

    image: uint8 [pictures, h, w, 3]; input_ids, attention_mask, labels, feature_index: int32 [width].
    Raises BadRecord, with the beginning of the text: more images than `pictures` or than `<image>` in the text, an
    image beyond `length`, no label that is not ignored.

    Attributes:
        tokens: features of a picture. length: the greatest number of ids; longer texts are truncated.
        widths: rising, the last one `length`: rows are padded to the smallest that holds them. (): all to `length`.
    """

    template: TrainingTemplate
    tokenizer: Tokenizer
    preprocess: ImagePreprocessing
    tokens: int
    length: int
    pictures: int = 1
    widths: tuple[int, ...] = ()

    def width(self, size: int) -> int:
        """Of the row of a text of `size` ids."""
        return next((width for width in self.widths if width >= size), self.length)

    def size(self, turns: Sequence[str], lengths: Sequence[int]) -> int:
        """The number of ids of a conversation, those of its images included. lengths: of the features of each image."""
        ids = self.template.example(self.tokenizer, turns, bool(lengths), self.length).ids
        return len(ids) + sum(lengths) - int((ids == PLACEHOLDER).sum())

    def lengths(self, paths: Sequence[pathlib.Path]) -> list[int]:
        """The number of features of each image. Raises BadRecord."""
        return [self.tokens] * len(paths)

    def map(self, element: Record) -> Record:
        images = element["images"]
        return {**self.columns(element["turns"], len(images)), "image": self._pixels(images)}

    def columns(self, turns: Sequence[str], images: int) -> dict[str, np.ndarray]:
        """All columns but the pixels. images: the number of the conversation's."""
        if images > self.pictures:
            raise BadRecord("conversation: images", detail=f"{images} images, pictures={self.pictures}")
        return self.row(turns, list(np.arange(images * self.tokens).reshape(images, self.tokens)))

    def row(self, turns: Sequence[str], rows: Sequence[Int[np.ndarray, "m"]]) -> dict[str, np.ndarray]:
        """The same. rows: of each image its features, as `feature_index` has them."""
        example = self.template.example(self.tokenizer, turns, bool(rows), self.length)
        count = int((example.ids == PLACEHOLDER).sum())
        if count != len(rows):
            raise BadRecord("conversation: images", detail=f"{count} times {IMAGE} in its text for {len(rows)} images")
        ids, labels, index = expanded(example, rows)
        if index[self.length :].max(initial=-1) >= 0:
            raise BadRecord("conversation: too long", detail=f"an image is beyond length={self.length}")
        if (labels[1 : self.length] == IGNORED).all():
            text = self.template.text(self.tokenizer, turns)
            raise BadRecord("conversation: no label", detail=f"every label is ignored, length={self.length}: {text!r}")
        columns = {
            "input_ids": (ids, self.tokenizer.pad or 0),
            "labels": (labels, IGNORED),
            "feature_index": (index, -1),
        }
        columns["attention_mask"] = (np.ones_like(ids), 0)
        return {name: self._padded(column, fill) for name, (column, fill) in columns.items()}

    def _padded(self, column: np.ndarray, fill: int) -> np.ndarray:
        row = np.full(self.width(len(column)), fill, np.int32)
        row[: len(column)] = column[: self.length]
        return row

    def _pixels(self, images: tuple[bytes, ...]) -> np.ndarray:
        height, width = self.preprocess.size or (0, 0)
        pixels = np.zeros((self.pictures, height, width, 3), np.uint8)
        for i, image in enumerate(images):
            pixels[i] = self.preprocess.to_uint8(decode_image(image))
        return pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeTiles(EncodeConversation):
    """An `EncodeConversation` of images that are cut in tiles, whose features are those of generation.

    image: the pictures of all images of the conversation, one image after the other, and zeros behind them.

    Attributes:
        config: of the network, with grids. pictures: their greatest number, of which an image has several.
    """

    config: VisionLanguageConfig

    def map(self, element: Record) -> Record:
        images = [decode_image(image) for image in element["images"]]
        sizes: list[Size] = [(image.shape[0], image.shape[1]) for image in images]
        columns = self.row(element["turns"], self.rows(sizes))
        tiles = [self.preprocess.to_uint8(image) for image in images]
        pixels = np.zeros((self.pictures, *self.config.vision.image_size, 3), np.uint8)
        if tiles:
            pixels[: sum(map(len, tiles))] = np.concatenate(tiles)
        return {**columns, "image": pixels, **self.arranged(sizes)}

    def rows(self, sizes: Sequence[Size]) -> list[np.ndarray]:
        """The features of each image of (height, width), as `feature_index` has them; the newline is the last of all.

        Raises BadRecord for more pictures than there may be.
        """
        count = sum(picture_counts(self.config, sizes))
        if count > self.pictures:
            detail = f"{len(sizes)} images are {count} pictures, at most {self.pictures}"
            raise BadRecord("conversation: images", detail=detail)
        return feature_rows(self.config, sizes, self.pictures * self.tokens)

    def arranged(self, sizes: Sequence[Size]) -> dict[str, np.ndarray]:
        """Further columns that the connector takes for the pictures of these images."""
        return {}

    def lengths(self, paths: Sequence[pathlib.Path]) -> list[int]:
        """From the images' headers."""
        images = [open_image(read_bytes(path), str(path)) for path in paths]
        sizes = [(height, width) for width, height in map(upright_size, images)]
        return [len(rows) for rows in self.rows(sizes)]


def most_pictures(config: VisionLanguageConfig) -> int:
    """The greatest number of pictures of one image."""
    return 1 + max((rows * columns for rows, columns in config.grids), default=0)


def expanded(example: Example, rows: Sequence[Int[np.ndarray, "m"]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, labels, index) with each image as its features, through its rows; a placeholder's id becomes 0."""
    repeats = np.ones(len(example.ids), np.int32)
    repeats[example.ids == PLACEHOLDER] = [len(each) for each in rows]
    ids, labels = np.repeat(example.ids, repeats), np.repeat(example.labels, repeats)
    visual = ids == PLACEHOLDER
    index = np.full(len(ids), -1, np.int32)
    index[visual] = np.concatenate(rows) if rows else 0
    return np.where(visual, 0, ids).astype(np.int32), np.where(visual, IGNORED, labels).astype(np.int32), index


def bucket_widths(length: int) -> tuple[int, ...]:
    """Rising widths up to `length`, each at most a fifth more than the one before.

    >>> bucket_widths(64)
    (32, 38, 45, 54, 64)
    """
    widths = [length]
    while widths[-1] > SHORTEST:
        widths.append(math.ceil(widths[-1] / 1.2))
    return tuple(reversed(widths))
