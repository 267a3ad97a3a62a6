"""Questions and statements about two images, as NLVR2 has them.

    questions   Which image shows more cats, the left or the right?     left, right, neither
                Do both images show a cat?                              yes, no
                How many cats do the two images show together?          1 ... 8
    statements  true or false, of six kinds:
        more        The left image shows more cats than the right one.
        both        Both images show a cat.
        one         Exactly one image shows a cat.
        exactly     The left image shows exactly three cats.
        total       The two images show five cats together.
        relation    In the left image the cat is above the dog.

The answer is chosen first, then the two counts among all that give it. The number in a statement has one distribution,
whether the statement is true or false.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

from mmjax.data.scenes.language import NUMBERS, name, with_article
from mmjax.data.scenes.questions import Question, sample_word
from mmjax.data.scenes.splits import Split, cast, counts_of, held_out_count
from mmjax.data.scenes.world import COLOURS, OPPOSITE, RELATIONS, Group, Scene, layout, populate, relation

Counts: TypeAlias = tuple[int, int]
StatementKind: TypeAlias = Literal["more", "both", "one", "exactly", "total", "relation"]
STATEMENT_KINDS: tuple[StatementKind, ...] = get_args(StatementKind)
SIDES = ("left", "right")
MAX_TOTAL = 8


def sample_comparison(rng: random.Random, split: Split) -> Question:
    """A question of the kind "comparing"."""
    sprites = cast(rng, split, 3)
    noun, nouns = name(sprites[0]), name(sprites[0], plural=True)
    form = rng.randrange(3)
    if form == 0:
        text, answers = f"Which image shows more {nouns}, the left or the right?", ("left", "right", "neither")
        answer = rng.choice(answers)
        accept = lambda m, n: answers[0 if m > n else 1 if n > m else 2] == answer  # noqa: E731
    elif form == 1:
        text, answer = f"Do both images show {with_article(noun)}?", rng.choice(("yes", "no"))
        accept = lambda m, n: (m > 0 and n > 0) == (answer == "yes")  # noqa: E731
    else:
        total = rng.choice(_totals(split, sprites[0]))
        text, answer = f"How many {nouns} do the two images show together?", str(total)
        accept = lambda m, n: m + n == total  # noqa: E731
    return Question("comparing", _scenes(rng, split, sprites, _counts(rng, split, sprites[0], accept)), text, answer)


def sample_statement(rng: random.Random, split: Split, kinds: Sequence[StatementKind] = STATEMENT_KINDS) -> Question:
    """A statement of one of the kinds."""
    kind, true = rng.choice(kinds), rng.random() < 0.5
    scenes, text = STATEMENTS[kind](rng, split, cast(rng, split, 3), true)
    return Question(kind, scenes, text, "true" if true else "false")


def _feasible(split: Split, sprite: int) -> list[Counts]:
    """All pairs of counts of the first of the cast that a record of a split may have; not both 0."""
    plain = (0, *counts_of(sprite, "train", True))
    if split != "counts":
        return [pair for pair in itertools.product(plain, plain) if pair != (0, 0)]
    held_out = held_out_count(sprite)
    return [*((held_out, n) for n in plain), *((m, held_out) for m in plain), (held_out, held_out)]


def _totals(split: Split, sprite: int) -> list[int]:
    """The possible sums of two counts, but for the number that this split may not name with this sprite."""
    totals = {m + n for m, n in _feasible(split, sprite)}
    apart = set() if split == "counts" else {held_out_count(sprite)}
    return sorted(total for total in totals - apart if total <= MAX_TOTAL)


def _counts(rng: random.Random, split: Split, sprite: int, accept: Callable[[int, int], bool]) -> Counts:
    return rng.choice([pair for pair in _feasible(split, sprite) if accept(*pair)])


def _scenes(rng: random.Random, split: Split, sprites: list[int], counts: Counts) -> tuple[Scene, Scene]:
    """Two scenes with these counts of the first sprite; what a split demands is in the scenes that have it."""
    left, right = (_scene(rng, split, sprites, count) for count in counts)
    return left, right


def _scene(rng: random.Random, split: Split, sprites: list[int], count: int) -> Scene:
    if count:
        groups = populate(rng, split, sprites, [Group(sprites[0], rng.choice(COLOURS), count)], extra=1)
    else:
        groups = populate(rng, "train", sprites[1:], [], extra=1)
    return layout(rng, groups, sample_word(rng, split))


Made: TypeAlias = tuple[tuple[Scene, Scene], str]


def _more(rng: random.Random, split: Split, sprites: list[int], true: bool) -> Made:
    side = rng.randrange(2)
    counts = _counts(rng, split, sprites[0], lambda m, n: ((m, n)[side] > (m, n)[1 - side]) == true)
    nouns = name(sprites[0], plural=True)
    text = f"The {SIDES[side]} image shows more {nouns} than the {SIDES[1 - side]} one."
    return _scenes(rng, split, sprites, counts), text


def _both(rng: random.Random, split: Split, sprites: list[int], true: bool) -> Made:
    counts = _counts(rng, split, sprites[0], lambda m, n: (m > 0 and n > 0) == true)
    return _scenes(rng, split, sprites, counts), f"Both images show {with_article(name(sprites[0]))}."


def _one(rng: random.Random, split: Split, sprites: list[int], true: bool) -> Made:
    counts = _counts(rng, split, sprites[0], lambda m, n: (m > 0 and n > 0) != true)
    return _scenes(rng, split, sprites, counts), f"Exactly one image shows {with_article(name(sprites[0]))}."


def _exactly(rng: random.Random, split: Split, sprites: list[int], true: bool) -> Made:
    sprite, side = sprites[0], rng.randrange(2)
    number = rng.choice(counts_of(sprite, split, True))
    counts = _counts(rng, split, sprite, lambda m, n: ((m, n)[side] == number) == true and (m, n)[side] > 0)
    noun = name(sprite, plural=number > 1)
    return _scenes(rng, split, sprites, counts), f"The {SIDES[side]} image shows exactly {NUMBERS[number]} {noun}."


def _total(rng: random.Random, split: Split, sprites: list[int], true: bool) -> Made:
    sprite = sprites[0]
    number = rng.choice([total for total in _totals(split, sprite) if total > 1])
    counts = _counts(rng, split, sprite, lambda m, n: (m + n == number) == true)
    text = f"The two images show {NUMBERS[number]} {name(sprite, plural=True)} together."
    return _scenes(rng, split, sprites, counts), text


def _relation(rng: random.Random, split: Split, sprites: list[int], true: bool) -> Made:
    first, second = (sprites[1], sprites[2]) if split == "counts" else (sprites[0], sprites[1])
    side = rng.randrange(2)
    groups = populate(rng, split, sprites, [Group(each, rng.choice(COLOURS), 1) for each in (first, second)], extra=1)
    while True:
        scene = layout(rng, groups)
        between = relation(scene.select(first)[0], scene.select(second)[0])
        if between is not None:
            break
    claimed = between if true else OPPOSITE[between] if rng.random() < 0.5 else _other_axis(rng, between)
    other = layout(rng, populate(rng, "train", sprites[2:] if split == "pairs" else sprites[1:], [], extra=1))
    text = f"In the {SIDES[side]} image the {name(first)} is {claimed} the {name(second)}."
    return ((scene, other) if side == 0 else (other, scene)), text


def _other_axis(rng: random.Random, between: str) -> str:
    return rng.choice(RELATIONS[2:] if between in RELATIONS[:2] else RELATIONS[:2])


STATEMENTS: dict[StatementKind, Callable[[random.Random, Split, list[int], bool], Made]] = {
    "more": _more,
    "both": _both,
    "one": _one,
    "exactly": _exactly,
    "total": _total,
    "relation": _relation,
}
