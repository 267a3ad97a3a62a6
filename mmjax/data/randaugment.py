"""RandAugment and TrivialAugmentWide on the host, by PIL: random operations whose strength is one number.

Both take `image`: uint8 [height, width, 3], after the crop, and leave its shape. In a pipeline they sit between
`RandomResizedCrop` and `RandomFlip`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from grain import transforms
from PIL import Image, ImageEnhance, ImageOps

from mmjax.data.sources import Record
from mmjax.errors import MmjaxError

Operation: TypeAlias = Callable[[Image.Image, np.random.Generator], Image.Image]
Colour: TypeAlias = tuple[int, int, int]

GREY: Colour = (128, 128, 128)
"""RandAugment fills pixels from outside the image with it; TrivialAugmentWide with black."""
BLACK: Colour = (0, 0, 0)


# ------------------------------------------------------------------------------------------------------- operations


def shear(image: Image.Image, x: float, y: float, fill: Colour) -> Image.Image:
    """The pixel at (column, row) comes from (column + x row, row + y column), counted from the upper left corner."""
    matrix = (1, x, 0, y, 1, 0)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill)


def translate(image: Image.Image, x: float, y: float, fill: Colour) -> Image.Image:
    """The pixel at (column, row) comes from (column + x, row + y)."""
    matrix = (1, 0, x, 0, 1, y)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill)


def rotate(image: Image.Image, degrees: float, fill: Colour) -> Image.Image:
    """Counter-clockwise about the centre."""
    return image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=fill)


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keeps the upper `bits` of each value; 0 gives black."""
    mask = 0 if bits <= 0 else ~(2 ** (8 - min(bits, 8)) - 1) & 255
    return image.point([value & mask for value in range(256)] * 3)


def solarize(image: Image.Image, threshold: float) -> Image.Image:
    """Inverts values of `threshold` and above."""
    return image.point([value if value < threshold else 255 - value for value in range(256)] * 3)


def solarize_add(image: Image.Image, addition: int) -> Image.Image:
    """Adds to values below 128, up to 255."""
    return image.point([min(value + addition, 255) if value < 128 else value for value in range(256)] * 3)


def cutout(image: Image.Image, half: int, centre: tuple[int, int], fill: Colour) -> Image.Image:
    """Fills the square of side 2 `half` about (column, row), cut off at the border."""
    column, row = centre
    image = image.copy()
    if half > 0:
        image.paste(fill, (max(column - half, 0), max(row - half, 0), column + half, row + half))
    return image


def enhance(kind: Callable[[Image.Image], Any], image: Image.Image, factor: float) -> Image.Image:
    """Blends between the degenerate image (0) and the image (1), or past it."""
    return kind(image).enhance(factor)


# ---------------------------------------------------------------------------------------------------- RandAugment


def randaugment_space(level: float) -> dict[str, Operation]:
    """The sixteen operations at a magnitude, 10 being AutoAugment's strongest; big_vision `pp/autoaugment.py`.

    Level 0 is not the identity: brightness and its kin then blend by 0.1, posterize leaves no bit, solarize inverts.
    """
    share = level / 10
    factor = 1.8 * share + 0.1

    def signed(rng: np.random.Generator) -> float:
        return share if rng.random() < 0.5 else -share

    def square(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        centre = int(rng.integers(image.size[0])), int(rng.integers(image.size[1]))
        return cutout(image, int(40 * share), centre, GREY)

    return {
        "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
        "Equalize": lambda image, _: ImageOps.equalize(image),
        "Invert": lambda image, _: ImageOps.invert(image),
        "Rotate": lambda image, rng: rotate(image, 30 * signed(rng), GREY),
        "Posterize": lambda image, _: posterize(image, int(4 * share)),
        "Solarize": lambda image, _: solarize(image, int(256 * share)),
        "Color": lambda image, _: enhance(ImageEnhance.Color, image, factor),
        "Contrast": lambda image, _: enhance(ImageEnhance.Contrast, image, factor),
        "Brightness": lambda image, _: enhance(ImageEnhance.Brightness, image, factor),
        "Sharpness": lambda image, _: enhance(ImageEnhance.Sharpness, image, factor),
        "ShearX": lambda image, rng: shear(image, 0.3 * signed(rng), 0, GREY),
        "ShearY": lambda image, rng: shear(image, 0, 0.3 * signed(rng), GREY),
        "TranslateX": lambda image, rng: translate(image, 100 * signed(rng), 0, GREY),
        "TranslateY": lambda image, rng: translate(image, 0, 100 * signed(rng), GREY),
        "Cutout": square,
        "SolarizeAdd": lambda image, _: solarize_add(image, int(110 * share)),
    }


@dataclass(frozen=True)
class RandAugment(transforms.RandomMap):
    """`layers` operations in a row, each one of sixteen, always applied, at one magnitude (arXiv 1909.13719).

    AugReg's levels are (2, 0), (2, 10), (2, 15) and (2, 20): above 10 the scale continues past AutoAugment's strongest.
    Contrast is PIL's, whose grey is the image's mean; big_vision's first version took a constant by mistake.
    """

    layers: int = 2
    magnitude: float = 10

    def __post_init__(self) -> None:
        if self.layers < 1 or not 0 <= self.magnitude <= 30:
            raise MmjaxError(
                f"RandAugment({self.layers}, {self.magnitude}): at least one layer, magnitude from 0 to 30"
            )

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        space = list(randaugment_space(self.magnitude).values())
        image = Image.fromarray(element["image"])
        for _ in range(self.layers):
            image = space[rng.integers(len(space))](image, rng)
        return element | {"image": np.asarray(image)}


# ---------------------------------------------------------------------------------------------- TrivialAugmentWide

BINS = 31


def trivial_augment_space(share: float, sign: float) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """The fourteen operations of TrivialAugmentWide at a strength in [0, 1] (torchvision `autoaugment.py`).

    sign: 1 or -1, for those that go both ways.
    """
    signed = share * sign
    factor = 1 + 0.99 * signed
    bits = 8 - round(6 * share)
    shift = int(32 * signed)
    return {
        "Identity": lambda image: image,
        "ShearX": lambda image: shear(image, 0.99 * signed, 0, BLACK),
        "ShearY": lambda image: shear(image, 0, 0.99 * signed, BLACK),
        "TranslateX": lambda image: translate(image, -shift, 0, BLACK),
        "TranslateY": lambda image: translate(image, 0, -shift, BLACK),
        "Rotate": lambda image: rotate(image, 135 * signed, BLACK),
        "Brightness": lambda image: enhance(ImageEnhance.Brightness, image, factor),
        "Color": lambda image: enhance(ImageEnhance.Color, image, factor),
        "Contrast": lambda image: enhance(ImageEnhance.Contrast, image, factor),
        "Sharpness": lambda image: enhance(ImageEnhance.Sharpness, image, factor),
        "Posterize": lambda image: posterize(image, bits),
        "Solarize": lambda image: solarize(image, 255 * (1 - share)),
        "AutoContrast": lambda image: ImageOps.autocontrast(image),
        "Equalize": lambda image: ImageOps.equalize(image),
    }


@dataclass(frozen=True)
class TrivialAugmentWide(transforms.RandomMap):
    """One operation of fourteen at a strength sampled from 31 (arXiv 2103.10158)."""

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        share = int(rng.integers(BINS)) / (BINS - 1)
        space = list(trivial_augment_space(share, 1.0 if rng.random() < 0.5 else -1.0).values())
        image = space[rng.integers(len(space))](Image.fromarray(element["image"]))
        return element | {"image": np.asarray(image)}
