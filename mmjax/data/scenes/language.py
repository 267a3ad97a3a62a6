"""Scenes in words: noun phrases, a short and a long caption, and expressions that name exactly one thing."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from mmjax.data.scenes.sprites import COLOUR_NAMES, SPRITES
from mmjax.data.scenes.world import RELATIONS, Group, Relation, Scene, Thing, region, relation

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
SUPERLATIVES = ("leftmost", "rightmost", "topmost", "bottommost")
CLEAR_STEP = 6
"""The distance, in pixels of the canvas, by which the leftmost thing is farther left than every other."""


def name(sprite: int, colour: int | None = None, plural: bool = False) -> str:
    """ "red cats" """
    noun = SPRITES[sprite].plural if plural else SPRITES[sprite].name
    return noun if colour is None else f"{COLOUR_NAMES[colour]} {noun}"


def with_article(phrase: str) -> str:
    """With its article: "an orange cat"."""
    vowel = phrase[0] in "aeiou" and not phrase.startswith("uni")
    return f"{'an' if vowel else 'a'} {phrase}"


def group_phrase(group: Group) -> str:
    """ "a red cat", "two red cats"."""
    if group.count == 1:
        return with_article(name(group.sprite, group.colour))
    return f"{NUMBERS[group.count]} {name(group.sprite, group.colour, plural=True)}"


def enumeration(phrases: Sequence[str]) -> str:
    """ "x, y and z"."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def region_phrase(thing: Thing) -> str:
    """ "at the top left", "in the middle"."""
    where = region(thing)
    return f"{'in' if where == 'middle' else 'on' if where in ('left', 'right') else 'at'} the {where}"


def short_caption(scene: Scene) -> str:
    """Every group, the largest first, and the sign: "two red cats, a blue dog and a sign that says bus"."""
    sign = [f"a sign that says {scene.sign.word}"] if scene.sign else []
    return enumeration([*map(group_phrase, scene.groups()), *sign])


def long_caption(scene: Scene) -> str:
    """The short caption, where each single thing is, and how the first single things lie to each other."""
    sentences = [short_caption(scene)]
    single = [scene.select(g.sprite, g.colour)[0] for g in scene.groups() if g.count == 1]
    sentences += [f"the {name(t.sprite, t.colour)} is {region_phrase(t)}" for t in single]
    for x, y in itertools.pairwise(single):
        between = relation(x, y)
        if between is not None:
            sentences.append(f"the {name(x.sprite, x.colour)} is {between} the {name(y.sprite, y.colour)}")
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


@dataclass(frozen=True)
class Expression:
    """A description of things: all its conditions hold at once.

    large: of two sizes. superlative: an index in SUPERLATIVES, among the things that meet the other conditions.
    beside: (relation, sprite, colour) to a thing that is the only one of its kind.
    """

    sprite: int
    colour: int | None = None
    large: bool | None = None
    superlative: int | None = None
    beside: tuple[Relation, int, int] | None = None

    def __str__(self) -> str:
        size = () if self.large is None else ("large" if self.large else "small",)
        extreme = () if self.superlative is None else (SUPERLATIVES[self.superlative],)
        phrase = " ".join(("the", *extreme, *size, name(self.sprite, self.colour)))
        return phrase if self.beside is None else f"{phrase} {self.beside[0]} the {name(*self.beside[1:])}"


def matches(scene: Scene, expression: Expression) -> list[int]:
    """The indices of the things that an expression describes; empty where a condition is not clear for some thing."""
    e = expression
    indices = [
        k
        for k, t in enumerate(scene.things)
        if t.sprite == e.sprite and e.colour in (None, t.colour) and e.large in (None, t.large)
    ]
    if e.beside is not None:
        references = scene.select(*e.beside[1:])
        if len(references) != 1:
            return []
        relations = {k: relation(scene.things[k], references[0]) for k in indices if scene.things[k] != references[0]}
        if None in relations.values():
            return []
        indices = [k for k, between in relations.items() if between == e.beside[0]]
    if e.superlative is not None and len(indices) > 1:
        sign = 1 if e.superlative % 2 == 0 else -1
        along = [sign * (scene.things[k].x if e.superlative < 2 else scene.things[k].y) for k in indices]
        order = sorted(range(len(indices)), key=along.__getitem__)
        clear = along[order[1]] - along[order[0]] >= CLEAR_STEP
        indices = [indices[order[0]]] if clear else []
    return indices


def refer(rng: random.Random, scene: Scene, target: int) -> Expression | None:
    """An expression that describes only the thing `target`: its name, with its colour, or with more; or None."""
    thing = scene.things[target]
    single = [g for g in scene.groups() if g.count == 1 and (g.sprite, g.colour) != (thing.sprite, thing.colour)]
    beside: list[tuple[Relation, int, int]] = [(r, g.sprite, g.colour) for g in single for r in RELATIONS]
    plain = [Expression(thing.sprite), Expression(thing.sprite, thing.colour)]
    sized = [Expression(thing.sprite, colour, thing.large) for colour in (None, thing.colour)]
    extreme = [Expression(thing.sprite, thing.colour, superlative=k) for k in range(len(SUPERLATIVES))]
    related = [Expression(thing.sprite, thing.colour, beside=each) for each in beside]
    forms = [sized, extreme, related]
    rng.shuffle(forms)
    for candidates in (plain, *forms):
        unique = [each for each in candidates if matches(scene, each) == [target]]
        if unique:
            return rng.choice(unique)
    return None
