"""Transforms of one record on the host, for Grain: decoding, cropping to one size, text to ids.

A pipeline calls `random_map(record, rng)` with a generator for the record, so that the result depends neither on
workers nor on what was read before. Heavier augmentation (colour, blur) runs on the device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from grain import transforms
from PIL import Image

from mmjax.data.decoding import MAX_PIXELS, BadRecord, clean_caption, open_image, to_rgb, upright_size
from mmjax.data.preprocess import RESAMPLING, ImagePreprocessing, Resample
from mmjax.data.sources import Record
from mmjax.errors import MmjaxError

BLANK = 128
"""The grey of images that show nothing."""


def rgb_image(value: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image of encoded bytes or of a uint8 array [height, width, 3] or [height, width]."""
    if isinstance(value, np.ndarray):
        return Image.fromarray(value).convert("RGB")
    return to_rgb(open_image(value, max_pixels=max_pixels))


@dataclass(frozen=True)
class Decode(transforms.Map):
    """`image`: bytes -> uint8 [height, width, 3], each image in its original size."""

    max_pixels: int = MAX_PIXELS

    def map(self, element: Record) -> Record:
        return element | {"image": np.asarray(rgb_image(element["image"], self.max_pixels))}


@dataclass(frozen=True)
class Keep(transforms.Map):
    """Only these fields remain. A list of several files has more fields in some records, which a batch cannot hold."""

    fields: tuple[str, ...]

    def map(self, element: Record) -> Record:
        return {key: value for key, value in element.items() if key in self.fields}


@dataclass(frozen=True)
class BlankImages(transforms.Map):
    """The uint8 arrays `keys` become grey: what is learned from them is learned from the text alone."""

    keys: tuple[str, ...] = ("image",)

    def map(self, element: Record) -> Record:
        return element | {key: np.full_like(element[key], BLANK) for key in self.keys}


@dataclass(frozen=True)
class Resize(transforms.Map):
    """`image`: bytes or uint8 -> uint8 in the one size of an evaluation transform, for normalising on the device."""

    preprocessing: ImagePreprocessing

    def map(self, element: Record) -> Record:
        return element | {"image": self.preprocessing.to_uint8(rgb_image(element["image"]))}


@dataclass(frozen=True)
class RandomResizedCrop(transforms.RandomMap):
    """`image`: bytes or uint8 -> uint8 [size, size, 3]: a random part, resized (torchvision's rule).

    scale: the part's share of the area, uniform; ratio: its width / height, log-uniform.
    shrink: JPEGs are decoded at a half, a quarter or an eighth where the part still has twice `size` on each side:
        a fifth faster at 1600 x 1200 pixels, nothing below twice `size`; pixels differ a little from a full decode's.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resample: Resample = "bilinear"
    shrink: bool = False

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        value = element["image"]
        if isinstance(value, np.ndarray):
            picture = rgb_image(value)
            size = picture.size
            left, top, width, height = random_box(size, self.scale, self.ratio, rng)
        else:
            image = open_image(value)
            size = upright_size(image)
            left, top, width, height = random_box(size, self.scale, self.ratio, rng)
            if self.shrink and min(width, height) > 4 * self.size:
                factor = min(width, height) / (2 * self.size)
                # libjpeg takes its largest step (2, 4, 8) that leaves no less than this; other formats do nothing.
                image.draft(None, (int(image.size[0] / factor), int(image.size[1] / factor)))
            picture = to_rgb(image)
        target, resample = (self.size, self.size), Image.Resampling(RESAMPLING[self.resample])
        if picture.size == size:
            part = picture.crop((left, top, left + width, top + height)).resize(target, resample)
        else:
            x, y = picture.size[0] / size[0], picture.size[1] / size[1]
            box = (
                left * x,
                top * y,
                min((left + width) * x, picture.size[0]),
                min((top + height) * y, picture.size[1]),
            )
            part = picture.resize(target, resample, box)
        return element | {"image": np.asarray(part)}


def random_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random part of a (width, height) image.

    torchvision's `RandomResizedCrop.get_params`: ten tries, then the largest central part within the ratios.
    """
    total_width, total_height = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = total_width * total_height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= total_width and 0 < height <= total_height:
            left, top = rng.integers(total_width - width + 1), rng.integers(total_height - height + 1)
            return int(left), int(top), width, height
    width, height = total_width, total_height
    if total_width / total_height < ratio[0]:
        height = round(total_width / ratio[0])
    elif total_width / total_height > ratio[1]:
        width = round(total_height * ratio[1])
    return (total_width - width) // 2, (total_height - height) // 2, width, height


@dataclass(frozen=True)
class RandomFlip(transforms.RandomMap):
    """`image`: uint8 [height, width, 3], mirrored left to right with probability `p`."""

    p: float = 0.5

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        if rng.random() >= self.p:
            return element
        image = np.ascontiguousarray(element["image"])
        # Whole pixels are moved, which takes half the time of moving their channels one by one.
        pixels = image.view(f"V{image.shape[2] * image.itemsize}")
        return element | {"image": np.ascontiguousarray(pixels[:, ::-1]).view(image.dtype)}


def drawn_text(element: Record, several: bool, rng: np.random.Generator) -> str:
    """`text`, or with `several` one of `texts` sampled where a record has them. Raises BadRecord."""
    texts = element.get("texts") if several else None
    text = texts[rng.integers(len(texts))] if texts else element.get("text")
    if text is None:
        raise BadRecord("caption: missing")
    return clean_caption(text)


@dataclass(frozen=True)
class EncodeText(transforms.RandomMap):
    """`text` (or one of `texts`, sampled, where a record has several) -> int32 [l].

    encode: strings -> ids [b, l] of a constant l, as the tokenizers of `mmjax.text` do.
    several: samples from `texts`; False: always takes `text`.
    template: with "{}" for the caption, "a drawing of a {}".
    word_dropout: the probability that a word of the caption is dropped; one word always stays. Raises MmjaxError
        where it is no probability.
    """

    encode: Callable[[Sequence[str]], Any]
    several: bool = True
    template: str = "{}"
    word_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.word_dropout <= 1:
            raise MmjaxError(f"word_dropout={self.word_dropout} (from 0 to 1)")

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        caption = drawn_text(element, self.several, rng)
        if self.word_dropout:
            words = caption.split()
            stays = rng.random(len(words)) >= self.word_dropout
            stays[rng.integers(len(words))] |= not stays.any()
            caption = " ".join(word for word, stay in zip(words, stays) if stay)
        ids = np.asarray(self.encode([self.template.replace("{}", caption)]), np.int32)
        return element | {"text": ids[0]}
