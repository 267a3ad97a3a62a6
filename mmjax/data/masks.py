"""Images with a mask of classes: a folder of both, and the transforms that treat the two alike.

    photos/classes.txt               a line a class: line 0 names value 0, and so on
    photos/images/a.jpg, ...         photos/masks/a.png, ...: one channel or a palette, the values of the classes
Or photos/train and photos/val of that form. Pixels of value 255 have no class. `mmjax.data.scenes.files` writes such
a folder; ADE20K's, whose value 0 has no class, becomes one by subtracting 1 in eight bits.
"""

import copy
import hashlib
import math
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from grain import transforms
from jaxtyping import UInt8
from PIL import Image

from mmjax.data.decoding import BadRecord, open_image
from mmjax.data.image_folder import SUFFIXES, image_paths
from mmjax.data.preprocess import RESAMPLING, Resample
from mmjax.data.sources import Record, read_bytes
from mmjax.data.transforms import random_box, rgb_image
from mmjax.errors import MmjaxError

IGNORED = 255
"""The value of pixels without a class."""
CLASSES = "classes.txt"


class MaskFolder:
    """Records {"image": bytes, "mask": bytes}; `classes` are the names of the values.

    Raises MmjaxError: no folder, no classes.txt, an image without a mask.
    """

    def __init__(self, root: str | os.PathLike[str], name: str | None = None):
        self.root = pathlib.Path(root)
        missing = [part for part in ("images", "masks", CLASSES) if not (self.root / part).exists()]
        if missing:
            raise MmjaxError(f"{self.root}: no {', no '.join(missing)}; expected images/, masks/ and {CLASSES}")
        self.name = name or self.root.name
        lines = (self.root / CLASSES).read_text().splitlines()
        self.classes = tuple(line.strip() for line in lines if line.strip())
        if not 2 <= len(set(self.classes)) == len(self.classes) <= IGNORED:
            raise MmjaxError(f"{self.root / CLASSES}: expected 2 to {IGNORED} different names, one a line")
        images, masks = (_files(self.root / part) for part in ("images", "masks"))
        without = [f"images/{path}" for stem, path in images.items() if stem not in masks]
        if without:
            raise MmjaxError(
                f"{self.root}: {len(without)} of {len(images)} images have no mask: {', '.join(without[:3])}"
            )
        if not images:
            raise MmjaxError(f"{self.root / 'images'}: no image ({', '.join(sorted(SUFFIXES))}) in it")
        self.pairs = [(f"images/{path}", f"masks/{masks[stem]}") for stem, path in sorted(images.items())]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Record:
        image, mask = (read_bytes(self.root / path) for path in self.pairs[index])
        return {"image": image, "mask": mask}

    def record_name(self, index: int) -> str:
        return str(self.root / self.pairs[index][0])

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.classes, self.pairs)).encode(errors="surrogateescape")).hexdigest()

    def select(self, indices: Sequence[int]) -> Self:
        """The records at `indices`, in that order."""
        chosen = copy.copy(self)
        chosen.pairs = [self.pairs[i] for i in indices]
        return chosen

    def split(self, share: float) -> tuple[Self, Self]:
        """(the rest, about `share` of the images, at least one of each): by the hashes of their paths alone."""
        order = sorted(range(len(self)), key=lambda i: hashlib.sha256(os.fsencode(self.pairs[i][0])).digest())
        count = min(max(math.floor(share * len(self) + 0.5), 1), len(self) - 1)
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))


def _files(folder: pathlib.Path) -> dict[str, str]:
    """Path without suffix -> path, of all images below a folder."""
    return {os.path.splitext(path)[0]: path for path in image_paths(folder)}


def mask_split(root: str | os.PathLike[str], held_out: float) -> tuple[MaskFolder, MaskFolder | None]:
    """(training, held-out images): of root/train and root/val, validation or test; else a share of all, or with 0 None.

    Raises MmjaxError, also where the two folders have different classes.
    """
    root = pathlib.Path(root)
    if not 0 <= held_out < 1:
        raise MmjaxError(f"held_out={held_out}: a share from 0 to below 1")
    if not root.is_dir():
        raise MmjaxError(f"{root}: no such folder")
    tests = [root / name for name in ("val", "validation", "test") if (root / name).is_dir()]
    if (root / "train").is_dir() and tests:
        train, test = MaskFolder(root / "train", root.name), MaskFolder(tests[0], root.name)
        if train.classes != test.classes:
            raise MmjaxError(f"{test.root / CLASSES}: other classes than {train.root / CLASSES}")
        return train, test
    folder = MaskFolder(root)
    if held_out and len(folder) < 2:
        raise MmjaxError(f"{root}: one image: nothing can be held out; held_out=0 trains on all")
    return folder.split(held_out) if held_out else (folder, None)


def decode_mask(value: bytes | np.ndarray, classes: int) -> UInt8[np.ndarray, "height width"]:
    """The class of each pixel, uint8, or IGNORED.

    Raises BadRecord: "mask: not one channel", "mask: unknown class", and as `open_image`.
    """
    if isinstance(value, np.ndarray):
        mask = value
    else:
        image = open_image(value)
        if image.mode not in ("P", "L", "1", "I;16"):
            raise BadRecord("mask: not one channel", detail=f"it has the mode {image.mode}")
        try:
            mask = np.asarray(image)
        except Exception as error:  # Pillow's decoders raise a dozen types
            raise BadRecord("image: damaged", detail=str(error)) from error
    unknown = (mask >= classes) & (mask != IGNORED)
    if unknown.any():
        raise BadRecord("mask: unknown class", detail=f"value {int(mask[unknown][0])}, of {classes} classes")
    return mask.astype(np.uint8)


def _pair(element: Record, classes: int) -> tuple[Image.Image, Image.Image]:
    image, mask = rgb_image(element["image"]), Image.fromarray(decode_mask(element["mask"], classes))
    if image.size != mask.size:
        raise BadRecord("mask: another size", detail=f"{mask.size}, the image has {image.size}")
    return image, mask


@dataclass(frozen=True)
class ResizeWithMask(transforms.Map):
    """`image`, `mask` -> uint8 [size, size, 3] and [size, size]: the whole image, whatever its shape; masks by nearest.

    classes: the number of classes; a mask with another value is a BadRecord.
    """

    size: int
    classes: int
    resample: Resample = "bilinear"

    def map(self, element: Record) -> Record:
        image, mask = _pair(element, self.classes)
        size, rule = (self.size, self.size), Image.Resampling(RESAMPLING[self.resample])
        resized = (image.resize(size, rule), mask.resize(size, Image.Resampling.NEAREST))
        return element | {"image": np.asarray(resized[0]), "mask": np.asarray(resized[1])}


@dataclass(frozen=True)
class RandomCropWithMask(transforms.RandomMap):
    """`image`, `mask` -> uint8 [size, size, 3] and [size, size]: a random part of both, mirrored half of the time.

    scale: the part's share of the area; its ratio is between 3/4 and 4/3 (`random_box`).
    """

    size: int
    classes: int
    scale: tuple[float, float] = (0.25, 1.0)
    flip: bool = True
    resample: Resample = "bilinear"

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        image, mask = _pair(element, self.classes)
        left, top, width, height = random_box(image.size, self.scale, (3 / 4, 4 / 3), rng)
        box, size = (left, top, left + width, top + height), (self.size, self.size)
        resized = image.resize(size, Image.Resampling(RESAMPLING[self.resample]), box)
        pair = np.asarray(resized), np.asarray(mask.resize(size, Image.Resampling.NEAREST, box))
        if self.flip and rng.random() < 0.5:
            pair = pair[0][:, ::-1], pair[1][:, ::-1]
        return element | {"image": np.ascontiguousarray(pair[0]), "mask": np.ascontiguousarray(pair[1])}


def palette(classes: int) -> np.ndarray:
    """PASCAL VOC's colours: uint8 [classes, 3], black first. The bits of the index, spread over the channels."""
    index, colours = np.arange(classes), np.zeros((classes, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours
