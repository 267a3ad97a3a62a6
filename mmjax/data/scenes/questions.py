"""Questions about one image, with one right answer each.

    presence    Is there a red cat?                                     yes, no
    counting    How many red cats are there?                            0 ... 5
    colour      What colour is the cat?                                 the eight colours
    position    Where is the cat?                                       nine regions
                Is the cat above or below the dog?                      left, right; above, below
    reading     What does the sign say?                                 the word
    comparing   two images: `mmjax.data.scenes.two_images`

The answer is chosen first and the scene is made to fit it, so that no constant answer scores well: presence is yes half
of the time for every sprite, counts are uniform from 0 to 5, colours, regions and words are uniform.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mmjax.data.scenes.language import name, with_article
from mmjax.data.scenes.splits import MAX_COUNT, Split, cast, counts_of, held_out_count, split_words
from mmjax.data.scenes.sprites import COLOUR_NAMES
from mmjax.data.scenes.world import COLOURS, Group, Scene, layout, populate, region, relation, second_colour

Kind: TypeAlias = Literal["presence", "counting", "colour", "position", "reading"]
SIGN_SHARE = 0.2
"""The share of scenes that have a sign, where no question needs one."""


@dataclass(frozen=True)
class Question:
    """scenes: one, or the left and the right one. kind: for scores by kind. answer: of a statement, true or false."""

    kind: str
    scenes: tuple[Scene, ...]
    text: str
    answer: str


# ---------------------------------------------------------------------------------------- questions about any scene


def presence(scene: Scene, sprite: int, colour: int | None = None) -> Question:
    text = f"Is there {with_article(name(sprite, colour))}?"
    return Question("presence", (scene,), text, "yes" if scene.count(sprite, colour) else "no")


def counting(scene: Scene, sprite: int, colour: int | None = None) -> Question:
    text = f"How many {name(sprite, colour, plural=True)} are there?"
    return Question("counting", (scene,), text, str(scene.count(sprite, colour)))


def colour_of(scene: Scene, sprite: int) -> Question:
    """The sprite occurs once."""
    (thing,) = scene.select(sprite)
    return Question("colour", (scene,), f"What colour is the {name(sprite)}?", COLOUR_NAMES[thing.colour])


def region_of(scene: Scene, sprite: int) -> Question:
    """The sprite occurs once."""
    (thing,) = scene.select(sprite)
    return Question("position", (scene,), f"Where is the {name(sprite)}?", region(thing))


def relation_of(scene: Scene, sprite: int, other: int) -> Question | None:
    """Both sprites occur once; None if their relation is not clear."""
    (thing,), (reference,) = scene.select(sprite), scene.select(other)
    between = relation(thing, reference)
    if between is None:
        return None
    beside = between in ("to the left of", "to the right of")
    choice = "to the left or to the right of" if beside else "above or below"
    text = f"Is the {name(sprite)} {choice} the {name(other)}?"
    return Question("position", (scene,), text, between.split(" ")[2] if beside else between)


def reading(scene: Scene) -> Question:
    """The scene has a sign."""
    assert scene.sign is not None
    return Question("reading", (scene,), "What does the sign say?", scene.sign.word)


# ------------------------------------------------------------------------------------- scenes made for a question


def sample_scene(rng: random.Random, split: Split) -> Scene:
    """A scene of a split for captions, masks and boxes."""
    sprites = cast(rng, split, 3)
    group = Group(sprites[0], rng.choice(COLOURS), rng.choice(counts_of(sprites[0], split, True)))
    groups = populate(rng, split, sprites, [group])
    if len(groups) == 1 and rng.random() < 0.5:
        more = second_colour(rng, split, group, True, MAX_COUNT - group.count)
        groups += [more] if more else []
    return layout(rng, groups, sample_word(rng, split))


def sample_word(rng: random.Random, split: Split, share: float = SIGN_SHARE) -> str | None:
    return rng.choice(split_words(split)) if rng.random() < share else None


def sample_question(rng: random.Random, split: Split, kind: Kind) -> Question:
    """A question of a kind, with a scene made for it."""
    return SAMPLERS[kind](rng, split)


def _subjects(rng: random.Random, split: Split) -> tuple[list[int], int, int]:
    """(sprites that may occur, the one of the question, one that does not occur).

    In "counts" the first of the cast occurs at its held-out count, and the question is about another.
    """
    sprites = cast(rng, split, 4)
    return sprites[:3], sprites[1] if split == "counts" else sprites[0], sprites[3]


def _group(rng: random.Random, sprite: int, split: Split, colour: int | None = None) -> Group:
    colour = rng.choice(COLOURS) if colour is None else colour
    return Group(sprite, colour, rng.choice(counts_of(sprite, split, False)[:3]))


def _presence(rng: random.Random, split: Split) -> Question:
    sprites, subject, absent = _subjects(rng, split)
    present, named, same_sprite = rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.5
    group = _group(rng, subject, split)
    scene = layout(rng, populate(rng, split, sprites, [group]), sample_word(rng, split))
    if present:
        return presence(scene, subject, group.colour if named else None)
    if named and same_sprite:
        return presence(scene, subject, rng.choice([colour for colour in COLOURS if colour != group.colour]))
    return presence(scene, absent, rng.choice(COLOURS) if named else None)


def _counting(rng: random.Random, split: Split) -> Question:
    number, sprites = rng.randint(0, MAX_COUNT), cast(rng, split, 4)
    while split != "counts" and held_out_count(sprites[0]) == number:
        sprites = cast(rng, split, 4)
    subject, word = sprites[0], sample_word(rng, split)
    if split == "counts":
        number = held_out_count(subject)
    named = rng.random() < 0.5 and split != "counts"
    if number == 0:
        group = _group(rng, subject, split)
        scene = layout(rng, populate(rng, split, sprites[:3], [group]), word)
        if named and rng.random() < 0.5:
            return counting(scene, subject, rng.choice([colour for colour in COLOURS if colour != group.colour]))
        return counting(scene, sprites[3], rng.choice(COLOURS) if named else None)
    group = Group(subject, rng.choice(COLOURS), number)
    groups = [group]
    if named:
        more = second_colour(rng, split, group, True, MAX_COUNT - number)
        groups += [more] if more else []
    elif number > 1 and rng.random() < 0.3:
        first, second = rng.sample(COLOURS, 2)
        part = rng.randint(1, number - 1)
        if held_out_count(subject) not in (part, number - part):
            groups = [Group(subject, first, part), Group(subject, second, number - part)]
    scene = layout(rng, populate(rng, split, sprites[:3], groups), word)
    return counting(scene, subject, group.colour if named else None)


def _colour(rng: random.Random, split: Split) -> Question:
    sprites, subject, _ = _subjects(rng, split)
    groups = populate(rng, split, sprites, [Group(subject, rng.choice(COLOURS), 1)])
    return colour_of(layout(rng, groups, sample_word(rng, split)), subject)


def _position(rng: random.Random, split: Split) -> Question:
    sprites = cast(rng, split, 3)
    first, second = (sprites[1], sprites[2]) if split == "counts" else (sprites[0], sprites[1])
    related = rng.random() < 0.5
    required = [Group(each, rng.choice(COLOURS), 1) for each in ((first, second) if related else (first,))]
    groups, word = populate(rng, split, sprites, required), sample_word(rng, split)
    while True:
        scene = layout(rng, groups, word)
        question = relation_of(scene, first, second) if related else region_of(scene, first)
        if question is not None:
            return question


def _reading(rng: random.Random, split: Split) -> Question:
    sprites, subject, _ = _subjects(rng, split)
    groups = populate(rng, split, sprites, [_group(rng, subject, split)])
    return reading(layout(rng, groups, sample_word(rng, split, 1.0)))


SAMPLERS: dict[Kind, Callable[[random.Random, Split], Question]] = {
    "presence": _presence,
    "counting": _counting,
    "colour": _colour,
    "position": _position,
    "reading": _reading,
}
KINDS = tuple(SAMPLERS)
