"""Scenes for networks that learn in a minute: one or two large things of twelve kinds, in pictures of a few pixels."""

import random
from dataclasses import replace

from mmjax.data.scenes.language import short_caption
from mmjax.data.scenes.rendering import Picture, render
from mmjax.data.scenes.sources import SceneSource
from mmjax.data.scenes.splits import Split
from mmjax.data.scenes.sprites import CANVAS, LARGE, SPRITES, sprite_library
from mmjax.data.scenes.world import COLOURS, TEXTURES, Scene, Thing
from mmjax.data.sources import Record
from mmjax.errors import MmjaxError

NAMES = ["cat", "elephant", "fish", "butterfly", "apple", "banana", "bus", "bicycle", "rocket", "hat", "guitar", "key"]
KINDS = tuple(next(sprite.index for sprite in SPRITES if sprite.name == name) for name in NAMES)
"""The sprites of close-ups: names of one word, and outlines that differ."""
WINDOW = 2 * LARGE
"""The side of the part of the canvas that shows, in its pixels: four cells, each for one large thing."""
EDGE = (CANVAS - WINDOW) // 2
JITTER = 1
"""The most pixels of the canvas by which a thing is off the middle of its cell, in each direction."""


class CloseUps(SceneSource):
    """{"image": uint8 [size, size, 3], "text": "a red cat and a blue bus", "image_id": int}

    Each thing is near the middle of one of four cells, in one of the eight colours; half the pictures show one alone.
    There are 96 captions of one thing and 4,224 of two of different kinds.
    """

    def __init__(self, length: int, split: Split = "train", *, seed: int = 0, size: int = WINDOW):
        """Raises MmjaxError for splits other than train and validation, and as `SceneSource`."""
        if split not in ("train", "validation"):
            raise MmjaxError(f"split={split!r}: close-ups have the splits train and validation")
        if size < 16:
            raise MmjaxError(f"size={size}: close-ups of less than 16 pixels show nothing")
        self.whole = round(size * CANVAS / WINDOW)
        super().__init__(length, split, seed=seed, size=size)
        sprite_library(self.whole)

    def __getitem__(self, index: int) -> Record:
        scene = self.scene(index)
        record = {"image": self.picture(scene).image, "text": short_caption(scene)}
        return record | {"image_id": range(self.length)[index]}

    def scene(self, index: int) -> Scene:
        rng = self.rng(index, "close-up")
        kinds = rng.sample(KINDS, rng.randint(1, 2))
        cells = rng.sample(range(4), len(kinds))
        things = tuple(
            Thing(kind, rng.choice(COLOURS), True, rng.random() < 0.5, *_centre(rng, cell))
            for kind, cell in zip(kinds, cells)
        )
        grey = rng.randint(170, 245)
        red, green, blue = (min(grey + rng.randint(-14, 14), 255) for _ in range(3))
        return Scene(things, None, (red, green, blue), (rng.randrange(TEXTURES), rng.random(), rng.random()))

    def picture(self, scene: Scene) -> Picture:
        """The visible part; masks and boxes are its too."""
        picture = render(scene, self.whole)
        start = round(EDGE * self.whole / CANVAS)
        part = slice(start, start + self.size)
        windows = tuple(
            tuple(slice(max(each.start - start, 0), each.stop - start) for each in window) for window in picture.windows
        )
        return replace(picture, image=picture.image[part, part], owner=picture.owner[part, part], windows=windows)


def _centre(rng: random.Random, cell: int) -> tuple[int, int]:
    """(x, y) of a thing in a cell: these are numbered row by row."""
    row, column = divmod(cell, 2)
    x, y = (EDGE + LARGE // 2 + LARGE * each + rng.randint(-JITTER, JITTER) for each in (column, row))
    return x, y
