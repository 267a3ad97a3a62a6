"""What a split of the scenes may show: held-out sprites, pairs of sprites and counts, each by a hash.

    train        sprites, pairs and counts that are not held out
    validation   the same, from other random numbers: what was learned, without any generalisation
    sprites      only the fifth of the sprites that no other split shows; signs with held-out words
    pairs        each record has two sprites that occur together in no record of another split, in one image
    counts       each record has a sprite as often as no record of another split shows it, in one image: "four cats",
                 where four dogs and two cats are known. Each sprite has one such count, from 2 to 5.
A rule holds for a whole record: all its images, its texts, and the absent sprites that questions name.
"""

import functools
import random
from collections.abc import Collection
from typing import Literal, TypeAlias

from mmjax.data.scenes.sprites import SPRITES, WORDS
from mmjax.data.splits import is_held_out
from mmjax.errors import MmjaxError

Split: TypeAlias = Literal["train", "validation", "sprites", "pairs", "counts"]
SPLITS: tuple[Split, ...] = ("train", "validation", "sprites", "pairs", "counts")

HELD_OUT_SHARE = 0.2
HELD_OUT_PAIRS = 0.15
MAX_COUNT = 5
"""The maximum of things of one sprite in an image."""


@functools.cache
def held_out_sprites() -> frozenset[int]:
    return frozenset(sprite.index for sprite in SPRITES if is_held_out(f"scene {sprite.name}", HELD_OUT_SHARE))


@functools.cache
def held_out_pairs() -> frozenset[tuple[int, int]]:
    """Pairs (a, b), a < b, of sprites that are not held out themselves."""
    known = sorted({sprite.index for sprite in SPRITES} - held_out_sprites())
    pairs = ((a, b) for a in known for b in known if a < b)
    return frozenset(
        (a, b) for a, b in pairs if is_held_out(f"scene {SPRITES[a].name}+{SPRITES[b].name}", HELD_OUT_PAIRS)
    )


@functools.cache
def held_out_count(sprite: int) -> int:
    """The count, from 2 to MAX_COUNT, at which only the split "counts" shows this sprite."""
    name = f"scene count of {SPRITES[sprite].name}"
    for count in range(2, MAX_COUNT):
        if is_held_out(f"{name} {count}", 1 / (MAX_COUNT + 1 - count)):
            return count
    return MAX_COUNT


@functools.cache
def split_words(split: Split) -> tuple[str, ...]:
    """The words of a split's signs."""
    return tuple(word for word in WORDS if is_held_out(f"scene sign {word}", HELD_OUT_SHARE) == (split == "sprites"))


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise MmjaxError(f"split={split!r}: the splits are {', '.join(SPLITS)}")


@functools.cache
def _pool(split: Split) -> tuple[int, ...]:
    return tuple(s.index for s in SPRITES if (s.index in held_out_sprites()) == (split == "sprites"))


@functools.cache
def _pairs() -> tuple[tuple[int, int], ...]:
    return tuple(sorted(held_out_pairs()))


def cast(rng: random.Random, split: Split, n: int) -> list[int]:
    """n different sprites that may be in one record; in the split "pairs" the first two are a held-out pair."""
    sprites: list[int] = []
    if split == "pairs":
        sprites = list(rng.choice(_pairs()))
        rng.shuffle(sprites)
    while len(sprites) < n:
        sprites.append(another(rng, split, sprites))
    return sprites


def another(rng: random.Random, split: Split, sprites: Collection[int]) -> int:
    """One more sprite for a record that has these."""
    pool, held_out = _pool(split), held_out_pairs()
    while True:
        new = rng.choice(pool)
        if new not in sprites and not any((min(new, old), max(new, old)) in held_out for old in sprites):
            return new


def counts_of(sprite: int, split: Split, first: bool) -> tuple[int, ...]:
    """The counts that a record may show of a sprite. first: of its cast, which in "counts" has its held-out count."""
    if split == "counts" and first:
        return (held_out_count(sprite),)
    return tuple(count for count in range(1, MAX_COUNT + 1) if count != held_out_count(sprite))
