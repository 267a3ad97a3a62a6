"""A scene as pixels, with the map of which pixel shows which thing."""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from mmjax.data.scenes.sprites import CANVAS, Patch, sprite_library
from mmjax.data.scenes.world import SIGN_OWNER, TEXTURES, Scene, window

TEXTURE_RANGE = 14


@dataclass(frozen=True)
class Picture:
    """A rendered scene of n things.

    image: uint8 [size, size, 3]. owner: uint8 [size, size]: 0 background, k + 1 thing k, SIGN_OWNER the sign. A pixel
        is of the foremost thing that covers at least half of it.
    """

    image: UInt8[np.ndarray, "size size 3"]
    owner: UInt8[np.ndarray, "size size"]
    windows: tuple[tuple[slice, slice], ...]
    areas: tuple[int, ...]

    def mask(self, thing: int) -> Bool[np.ndarray, "size size"]:
        """The visible pixels of a thing."""
        return self.owner == thing + 1

    def boxes(self) -> Float[np.ndarray, "n 4"]:
        """The smallest boxes around the visible pixels: x, y, width, height in pixels, float32; 0 for hidden things."""
        boxes = np.zeros((len(self.windows), 4), np.float32)
        for k, (rows, columns) in enumerate(self.windows):
            inside = self.owner[rows, columns] == k + 1
            y, x = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            if len(y):
                boxes[k] = columns.start + x[0], rows.start + y[0], x[-1] - x[0] + 1, y[-1] - y[0] + 1
        return boxes

    def visible(self) -> Float[np.ndarray, " n"]:
        """The share of each thing's pixels that nothing covers, float32."""
        counts = np.bincount(self.owner.ravel(), minlength=SIGN_OWNER + 1)[1 : len(self.areas) + 1]
        return (counts / np.array(self.areas)).astype(np.float32)


def render(scene: Scene, size: int = CANVAS) -> Picture:
    """The picture of a scene, size x size pixels: a few dozen NumPy operations on small windows."""
    library = sprite_library(size)
    image = _background(scene, size)
    owner = np.zeros((size, size), np.uint8)
    windows, areas = [], []
    for number, thing in enumerate(scene.things, 1):
        patch = library.patch(thing.sprite, thing.colour, thing.large, thing.flipped)
        windows.append(_compose(image, owner, patch, thing.x, thing.y, number))
        areas.append(patch.area)
    if scene.sign is not None:
        _compose(image, owner, library.sign(scene.sign.word), scene.sign.x, scene.sign.y, SIGN_OWNER)
    return Picture(image, owner, tuple(windows), tuple(areas))


def _compose(
    image: np.ndarray, owner: np.ndarray, patch: Patch, x: float, y: float, number: int
) -> tuple[slice, slice]:
    at = window(x, y, patch, image.shape[0])
    image[at] = (image[at] * patch.transparency + patch.premultiplied) >> 8
    owner[at][patch.mask] = number
    return at


def _background(scene: Scene, size: int) -> UInt8[np.ndarray, "size size 3"]:
    kind, right, down = scene.texture
    texture = _textures(size)[kind]
    space = texture.shape[0] - size
    top, left = int(down * space), int(right * space)
    tinted = texture[top : top + size, left : left + size, None] + np.array(scene.background, np.int16)
    return np.clip(tinted, 0, 255).astype(np.uint8)


@functools.cache
def _textures(size: int) -> Int[np.ndarray, "n side side"]:
    """Smooth random surfaces, twice as wide as a picture, within +-TEXTURE_RANGE."""
    points = np.random.default_rng(0).integers(-TEXTURE_RANGE, TEXTURE_RANGE + 1, (TEXTURES, 9, 9))
    position = np.linspace(0, 8, 2 * size)
    weights = np.maximum(1 - np.abs(position[:, None] - np.arange(9)), 0)
    return np.rint(weights @ points @ weights.T).astype(np.int16)
