"""RandAugment as ALBEF and BLIP have it: ten operations on uint8 pixels, each sampled one applied half the time.

Facts: ALBEF `dataset/randaugment.py`, BLIP `transform/randaugment.py`, which call OpenCV. Pixels are OpenCV 4's to the
bit (5 rounds coordinates less), with two faults of theirs put right, on purpose:
    AutoContrast computes -low in eight bits there, where it is 256 - low: every channel without a black pixel comes out
        all but white. Here contrast is stretched.
    Sharpness casts to eight bits without clipping there: what is sharpened past white comes out dark, and past black
        bright (on x86; the cast is undefined). Here it is clipped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from grain import transforms
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from mmjax.data.sources import Record
from mmjax.errors import MmjaxError

Pixels: TypeAlias = UInt8[np.ndarray, "h w 3"]

GREY = 128
"""The grey level of pixels from outside the image."""
LEVELS = 10
"""The strongest magnitude."""


# ------------------------------------------------------------------------------------------------------- operations


def autocontrast(image: Pixels) -> Pixels:
    """Stretches each channel to 0 .. 255, truncating; PIL's formula, which the originals mean."""
    return np.asarray(ImageOps.autocontrast(Image.fromarray(image)))


def equalize(image: Pixels) -> Pixels:
    """Flattens each channel's histogram by PIL's formula, which is not OpenCV's `equalizeHist`."""
    return np.asarray(ImageOps.equalize(Image.fromarray(image)))


def brightness(image: Pixels, factor: float) -> Pixels:
    """Values times `factor`, truncated."""
    return np.clip(np.arange(256, dtype=np.float32) * np.float32(factor), 0, 255).astype(np.uint8)[image]


def sharpness(image: Pixels, factor: float) -> Pixels:
    """Blends with the mean of the 3 x 3 neighbours, the middle five times (factor 0) or past the image (above 1); the
    outermost pixels stay."""
    wide = image.astype(np.int16)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * wide[1:-1, 1:-1]
    smooth = ((total + 6) // 13).astype(np.float32)
    inner = smooth + np.float32(factor) * (image[1:-1, 1:-1] - smooth)
    sharp = image.copy()
    sharp[1:-1, 1:-1] = np.clip(inner, 0, 255)
    return sharp


def shear(image: Pixels, x: float, y: float) -> Pixels:
    """The pixel at (column, row) goes to (column + x row, row + y column), both counted from the upper left corner."""
    return warp(image, _single([[1, x, 0], [y, 1, 0]]))


def translate(image: Pixels, x: float, y: float) -> Pixels:
    """The pixel at (column, row) goes to (column + x, row + y); parts of a pixel are blended."""
    return warp(image, _single([[1, 0, x], [0, 1, y]]))


def rotate(image: Pixels, degrees: float) -> Pixels:
    """Counter-clockwise about (width / 2, height / 2), which is half a pixel off the centre: OpenCV counts from the
    middle of the first pixel."""
    x, y = image.shape[1] / 2, image.shape[0] / 2
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return warp(
        image, np.array([[cosine, sine, (1 - cosine) * x - sine * y], [-sine, cosine, sine * x + (1 - cosine) * y]])
    )


def _single(matrix: list[list[float]]) -> Float[np.ndarray, "2 3"]:
    """The originals write these matrices in single precision."""
    return np.array(matrix, np.float32).astype(np.float64)


def warp(image: Pixels, matrix: Float[np.ndarray, "2 3"]) -> Pixels:
    """The pixel at (x, y) goes to `matrix` (x, y, 1); grey from outside. OpenCV 4's `warpAffine`, bilinear, to the bit.

    Coordinates are rounded to 1/1024 and then to 1/32 of a pixel, so that weights are whole numbers of 1/1024.
    """
    height, width = image.shape[:2]
    (a, b, left), (c, d, top) = matrix.tolist()
    scale = 1 / (a * d - b * c)
    a, b, c, d = d * scale, -b * scale, -c * scale, a * scale  # from where each pixel comes
    columns, rows = np.arange(width), np.arange(height)[:, None]
    x = _fixed_point(a * columns, b * rows - (a * left + b * top))
    y = _fixed_point(c * columns, d * rows - (c * left + d * top))
    # One frame of grey, and every position outside is clipped to it. The three channels are one 64-bit number, 21 bits
    # apart, so that one product weighs them all: at most 255 * 1024 each.
    values = np.full((height + 2, width + 2, 3), GREY, np.uint64)
    values[1:-1, 1:-1] = image
    packed = (values[..., 0] | values[..., 1] << 21 | values[..., 2] << 42).ravel()
    above, below = (np.clip((y >> 5) + step, 0, height + 1) * (width + 2) for step in (1, 2))
    west, east = (np.clip((x >> 5) + step, 0, width + 1) for step in (1, 2))
    right, down = (x & 31).astype(np.uint64), (y & 31).astype(np.uint64)
    upper = packed[above + west] * (32 - right) + packed[above + east] * right
    lower = packed[below + west] * (32 - right) + packed[below + east] * right
    half = np.uint64(512 | 512 << 21 | 512 << 42)
    total = upper * (32 - down) + lower * down + half
    warped = np.empty_like(image)
    for channel in range(3):
        warped[..., channel] = total >> np.uint64(21 * channel + 10) & np.uint64(255)
    return warped


def _fixed_point(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Whole numbers of 1/32 of a pixel, int64 [height, width]."""
    return (np.rint(across * 1024).astype(np.int64) + 16 + np.rint(along * 1024).astype(np.int64)) >> 5


# ---------------------------------------------------------------------------------------------------- RandAugment


def vision_language_space(magnitude: float) -> dict[str, Callable[[Pixels, float], Pixels]]:
    """The ten operations at a magnitude, 10 the strongest; the second argument is 1 or -1, for those with two ways.

    Brightness and Sharpness only go up, and not at all at BLIP's 5; translations are pixels whatever the image's size.
    """
    share = magnitude / LEVELS
    factor = share * 1.8 + 0.1
    return {
        "Identity": lambda image, _: image,
        "AutoContrast": lambda image, _: autocontrast(image),
        "Equalize": lambda image, _: equalize(image),
        "Brightness": lambda image, _: brightness(image, factor),
        "Sharpness": lambda image, _: sharpness(image, factor),
        "ShearX": lambda image, sign: shear(image, sign * 0.3 * share, 0),
        "ShearY": lambda image, sign: shear(image, 0, sign * 0.3 * share),
        "TranslateX": lambda image, sign: translate(image, sign * 10 * share, 0),
        "TranslateY": lambda image, sign: translate(image, 0, sign * 10 * share),
        "Rotate": lambda image, sign: rotate(image, sign * 30 * share),
    }


@dataclass(frozen=True)
class VisionLanguageRandAugment(transforms.RandomMap):
    """`image`: uint8 [height, width, 3]: `layers` operations in a row, each one of ten, applied with probability 1/2.

    magnitude: 7 in ALBEF, 5 in BLIP. Both have it behind crop and flip, in fine-tuning too.
    """

    magnitude: float
    layers: int = 2

    def __post_init__(self) -> None:
        """Raises MmjaxError for no layer, or a magnitude off the scale."""
        if self.layers < 1 or not 0 <= self.magnitude <= LEVELS:
            raise MmjaxError(
                f"VisionLanguageRandAugment({self.magnitude}, {self.layers}): magnitude from 0 to {LEVELS}, at least "
                "one layer"
            )

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        space = list(vision_language_space(self.magnitude).values())
        image = element["image"]
        for _ in range(self.layers):
            operation, applied, positive = space[rng.integers(len(space))], rng.random() < 0.5, rng.random() < 0.5
            if applied:
                image = operation(image, 1.0 if positive else -1.0)
        return element | {"image": image}
