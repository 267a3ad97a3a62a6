"""What is in a scene and where: things of some sprites in some colours, laid out so that each of them shows.

Coordinates are pixels of a canvas of CANVAS x CANVAS, the origin in the upper left corner; a picture of another size
shows the same scene.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from mmjax.data.scenes.splits import Split, counts_of, held_out_count
from mmjax.data.scenes.sprites import CANVAS, COLOUR_NAMES, SIGN, Patch, sprite_library

Relation: TypeAlias = Literal["to the left of", "to the right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("to the left of", "to the right of", "above", "below")
OPPOSITE: dict[Relation, Relation] = dict(zip(RELATIONS, (RELATIONS[1], RELATIONS[0], RELATIONS[3], RELATIONS[2])))
REGIONS = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
"""Nine parts of the canvas, row by row."""

MIN_VISIBLE = 0.7
"""The share of its pixels that nothing covers, at least, of each thing; a sign shows whole."""
MAX_THINGS = 8
CLEAR_DISTANCE, CLEAR_RATIO = 12, 1.25
"""Two centres that are nearer, or as far apart in one direction as in the other, have no relation."""
COLOURS = range(len(COLOUR_NAMES))
TEXTURES = 8
"""The number of background textures."""
TRIES = 30
"""The number of positions that are tried for a thing."""
SIGN_OWNER = 255
"""The sign's pixels in a map of owners, in which the things count from 1."""


@dataclass(frozen=True)
class Thing:
    """sprite, colour: indices in SPRITES and COLOURS. (x, y): the centre on the canvas. flipped: mirrored."""

    sprite: int
    colour: int
    large: bool
    flipped: bool
    x: int
    y: int


@dataclass(frozen=True)
class Group:
    """`count` things of one sprite and colour."""

    sprite: int
    colour: int
    count: int


@dataclass(frozen=True)
class Sign:
    """A word on a board, centred at (x, y)."""

    word: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """things: from back to front. background: RGB. texture: which one, and the offset of its part."""

    things: tuple[Thing, ...]
    sign: Sign | None
    background: tuple[int, int, int]
    texture: tuple[int, float, float]

    def select(self, sprite: int | None = None, colour: int | None = None) -> list[Thing]:
        """The things of a sprite, of a colour, or of both."""
        return [t for t in self.things if sprite in (None, t.sprite) and colour in (None, t.colour)]

    def count(self, sprite: int | None = None, colour: int | None = None) -> int:
        return len(self.select(sprite, colour))

    def groups(self) -> list[Group]:
        """Sorted by the largest count; equal ones by sprite and colour."""
        kinds = sorted({(t.sprite, t.colour) for t in self.things})
        return sorted((Group(*kind, self.count(*kind)) for kind in kinds), key=lambda group: -group.count)


def relation(a: Thing, b: Thing) -> Relation | None:
    """The position of `a` relative to `b`; None where it is not clear."""
    dx, dy = a.x - b.x, a.y - b.y
    long, short = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if long < CLEAR_DISTANCE or long < CLEAR_RATIO * short:
        return None
    return RELATIONS[int(dx > 0)] if abs(dx) > abs(dy) else RELATIONS[2 + int(dy > 0)]


def region(thing: Thing) -> str:
    """ "top left", "left", "middle", ...: the ninth of the canvas that the centre is in."""
    third = CANVAS // 3
    return REGIONS[min(thing.y // third, 2) * 3 + min(thing.x // third, 2)]


def populate(
    rng: random.Random, split: Split, sprites: Sequence[int], required: Sequence[Group], extra: int = 2
) -> list[Group]:
    """The groups of a scene: the required ones, what the split demands, and up to `extra` more of the cast.

    sprites: those that may occur, in the order of `cast`: "counts" shows the first at its held-out count.
    """
    groups = list(required)
    present = {group.sprite for group in groups}
    demanded = {"pairs": sprites[:2], "counts": sprites[:1]}.get(split, ())
    more = rng.randint(0 if groups or demanded else 1, extra)
    for position, sprite in enumerate(sprites):
        space = MAX_THINGS - sum(group.count for group in groups)
        forced = sprite in demanded
        if sprite in present or not (forced or more) or space < 1:
            continue
        counts = [count for count in counts_of(sprite, split, position == 0) if count <= space]
        if counts:
            # A pair's first half must leave space for the second.
            count = rng.choice(counts if not forced or split == "counts" else counts[:2])
            groups.append(Group(sprite, rng.choice(COLOURS), count))
            more -= not forced
    return groups


def second_colour(rng: random.Random, split: Split, group: Group, first: bool, space: int) -> Group | None:
    """More things of a group's sprite in another colour; None if the counts allow none."""
    allowed, apart = counts_of(group.sprite, split, first), held_out_count(group.sprite)
    counts = [count for count in range(1, space + 1) if count + group.count in allowed and count != apart]
    if not counts:
        return None
    colour = rng.choice([colour for colour in COLOURS if colour != group.colour])
    return Group(group.sprite, colour, rng.choice(counts))


def layout(rng: random.Random, groups: Sequence[Group], word: str | None = None) -> Scene:
    """A scene of exactly these groups, and of a sign if there is a word."""
    sign = None
    if word is not None:
        width, height = SIGN
        x = rng.randint(width // 2, CANVAS - (width + 1) // 2)
        sign = Sign(word, x, rng.randint(height // 2, CANVAS - (height + 1) // 2))
    kinds = [(group.sprite, group.colour) for group in groups for _ in range(group.count)]
    things, attempt = None, 0
    while things is None:
        # Crowded scenes may not fit with large things; eight small ones do.
        things = _place(rng, kinds, sign, 0.5 if attempt < 3 else 0.0)
        attempt += 1
    grey = rng.randint(170, 245)
    red, green, blue = (min(max(grey + rng.randint(-14, 14), 0), 255) for _ in range(3))
    return Scene(tuple(things), sign, (red, green, blue), (rng.randrange(TEXTURES), rng.random(), rng.random()))


def _place(
    rng: random.Random, kinds: Sequence[tuple[int, int]], sign: Sign | None, large_share: float
) -> list[Thing] | None:
    """Positions one by one, each where everything before it remains visible; None if one has no such position."""
    library = sprite_library(CANVAS)
    owner = np.zeros((CANVAS, CANVAS), np.uint8)
    if sign is not None:
        board = library.sign(sign.word)
        owner[window(sign.x, sign.y, board, CANVAS)] = SIGN_OWNER
    things: list[Thing] = []
    areas, visible = [0], [0]
    for sprite, colour in rng.sample(kinds, len(kinds)):
        large, flipped = rng.random() < large_share, rng.random() < 0.5
        patch = library.patch(sprite, colour, large, flipped)
        number = len(things) + 1
        for _ in range(TRIES):
            x, y = _position(rng, patch)
            part = owner[window(x, y, patch, CANVAS)]
            covered = np.bincount(part[patch.mask], minlength=number)
            if len(covered) <= SIGN_OWNER and all(
                visible[k] - covered[k] >= MIN_VISIBLE * areas[k] for k in range(1, number)
            ):
                break
        else:
            return None
        part[patch.mask] = number
        visible = [total - lost for total, lost in zip(visible, covered.tolist())] + [patch.area]
        areas.append(patch.area)
        things.append(Thing(sprite, colour, large, flipped, x, y))
    return things


def _position(rng: random.Random, patch: Patch) -> tuple[int, int]:
    """A centre in each ninth of the canvas with equal probability, the whole patch on the canvas."""
    height, width = patch.mask.shape
    centre = []
    for length in (width, height):
        third = CANVAS // 3
        start = rng.randrange(3) * third
        low, high = max(start, (length + 1) // 2), min(start + third - 1, CANVAS - (length + 1) // 2)
        centre.append(rng.randint(low, high))
    return centre[0], centre[1]


def window(x: float, y: float, patch: Patch, size: int) -> tuple[slice, slice]:
    """The rows and columns of a patch centred at (x, y) of the canvas, in a picture of `size`, moved inside it."""
    height, width = patch.mask.shape
    left = min(max(int(x * size / CANVAS - width / 2 + 0.5), 0), size - width)
    top = min(max(int(y * size / CANVAS - height / 2 + 0.5), 0), size - height)
    return slice(top, top + height), slice(left, left + width)
