"""Several images or several turns: documents with a change per image, clips of moving things, conversations.

document        "There are two red cats. <image> Now there is one red cat. <image> ... How many cats ...? One."
clip            "the two red cats move to the left and the blue dog does not move"
conversation    "Is there a cat?" "Yes." "What colour is it?" "Red." "Where is it?" "Top left."
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from mmjax.data.scenes.language import NUMBERS, enumeration, group_phrase, name
from mmjax.data.scenes.questions import (
    Question,
    colour_of,
    counting,
    presence,
    reading,
    region_of,
    relation_of,
    sample_scene,
)
from mmjax.data.scenes.rendering import render
from mmjax.data.scenes.splits import Split, another, cast, counts_of
from mmjax.data.scenes.sprites import CANVAS, SPRITES
from mmjax.data.scenes.world import COLOURS, MAX_THINGS, Group, Scene, Thing, layout, populate

IMAGE = "<image>"
MOTIONS = ("still", "left", "right", "up", "down")
MOTION_PHRASES = ("{do} not move", "{move} to the left", "{move} to the right", "{move} up", "{move} down")
DISTANCE = 32
"""The way of a moving thing, from the first frame to the last, pixels of the canvas."""
MARGIN = 14
"""Half of a large thing: centres are at least so far from the canvas' edge."""
CLIP_VISIBLE = 0.5
"""The least visible share of each thing in the first and in the last frame; in between it may be covered."""


# -------------------------------------------------------------------------------------------------------- documents


@dataclass(frozen=True)
class Document:
    """texts: one before each scene, and a last one: a question about the last scene with its answer."""

    scenes: tuple[Scene, ...]
    texts: tuple[str, ...]

    @property
    def text(self) -> str:
        return f" {IMAGE} ".join(self.texts)


def sample_document(rng: random.Random, split: Split, images: int = 3) -> Document:
    """Scenes of which each differs from the one before in one group: its count, its colour, or its presence."""
    sprites = cast(rng, split, 3)
    first = Group(sprites[0], rng.choice(COLOURS), rng.choice(counts_of(sprites[0], split, True)))
    groups = populate(rng, split, sprites, [first])
    texts, scenes = [f"{_there(groups)}."], [layout(rng, groups)]
    for _ in range(images - 1):
        groups, sentence = _changed(rng, split, sprites, groups)
        texts.append(sentence)
        scenes.append(layout(rng, groups))
    question = counting(scenes[-1], rng.choice(groups).sprite)
    answer = NUMBERS[int(question.answer)].capitalize()
    return Document(tuple(scenes), (*texts, f"{question.text} {answer}."))


def _there(groups: Sequence[Group]) -> str:
    ordered = sorted(groups, key=lambda group: -group.count)
    return f"There {'are' if ordered[0].count > 1 else 'is'} {enumeration([group_phrase(g) for g in ordered])}"


def _changed(
    rng: random.Random, split: Split, sprites: Sequence[int], groups: Sequence[Group]
) -> tuple[list[Group], str]:
    """The groups after one change that the split allows, and the sentence about it."""
    changes: list[tuple[list[Group], str]] = []
    for position, group in enumerate(groups):
        rest = [*groups[:position], *groups[position + 1 :]]
        space = MAX_THINGS - sum(each.count for each in rest)
        for count in counts_of(group.sprite, "train", True):
            if count != group.count and count <= space:
                new = dataclasses.replace(group, count=count)
                verb = "are" if count > 1 else "is"
                phrase = group_phrase(new) if count > 1 else f"one {name(new.sprite, new.colour)}"
                changes.append(([*rest, new], f"Now there {verb} {phrase}."))
        colour = rng.choice([each for each in COLOURS if each != group.colour])
        noun, verb = name(group.sprite, plural=group.count > 1), "are" if group.count > 1 else "is"
        recoloured = dataclasses.replace(group, colour=colour)
        changes.append(([*rest, recoloured], f"The {noun} {verb} now {name(group.sprite, colour).split(' ')[0]}."))
        if rest:
            changes.append((rest, f"The {name(group.sprite, group.colour, group.count > 1)} {verb} gone."))
    for sprite in {*sprites} - {group.sprite for group in groups}:
        new = Group(sprite, rng.choice(COLOURS), rng.choice(counts_of(sprite, "train", True)[:2]))
        if sum(each.count for each in groups) + new.count <= MAX_THINGS:
            phrase = group_phrase(new)
            verb = "have" if new.count > 1 else "has"
            changes.append(([*groups, new], f"{phrase[0].upper()}{phrase[1:]} {verb} come."))
    return rng.choice(changes)


# ------------------------------------------------------------------------------------------------------------ clips


@dataclass(frozen=True)
class Clip:
    """frames: the same things at each time. motions: of each thing, an index in MOTIONS. questions: one a group."""

    frames: tuple[Scene, ...]
    motions: tuple[int, ...]
    text: str
    questions: tuple[Question, ...]


def sample_clip(rng: random.Random, split: Split, frames: int = 8) -> Clip:
    """Groups of which each moves one way, or not, at constant speed."""
    sprites = cast(rng, split, 3)
    first = Group(sprites[0], rng.choice(COLOURS), rng.choice(counts_of(sprites[0], split, True)[:3]))
    groups = populate(rng, split, sprites, [first], extra=1)
    motion_of = {group.sprite: rng.randrange(len(MOTIONS)) for group in groups}
    while True:
        start = layout(rng, groups)
        motions = tuple(motion_of[thing.sprite] for thing in start.things)
        times = [_at(start, motions, step / (frames - 1)) for step in range(frames)]
        if all(render(each).visible().min() >= CLIP_VISIBLE for each in (times[0], times[-1])):
            break
    phrases, questions = [], []
    for group in groups:
        many, motion = group.count > 1, motion_of[group.sprite]
        noun = name(group.sprite, group.colour, plural=many)
        number = f"{NUMBERS[group.count]} " if many else ""
        verb = MOTION_PHRASES[motion].format(do="do" if many else "does", move="move" if many else "moves")
        phrases.append(f"the {number}{noun} {verb}")
        text = f"Which way {'do' if many else 'does'} the {name(group.sprite, plural=many)} move?"
        questions.append(Question("motion", (start,), text, MOTIONS[motion]))
    return Clip(tuple(times), motions, enumeration(phrases), tuple(questions))


def _at(start: Scene, motions: Sequence[int], share: float) -> Scene:
    """The scene at `share` of the way. Start positions are squeezed so that the whole way is on the canvas."""
    things = [_moved(thing, motion, share) for thing, motion in zip(start.things, motions)]
    return dataclasses.replace(start, things=tuple(things))


def _moved(thing: Thing, motion: int, share: float) -> Thing:
    if motion == 0:
        return thing
    along = thing.x if motion in (1, 2) else thing.y
    squeezed = MARGIN + (along - MARGIN) * (CANVAS - 2 * MARGIN - DISTANCE) / (CANVAS - 2 * MARGIN)
    squeezed = min(max(squeezed, MARGIN), CANVAS - MARGIN - DISTANCE)
    moved = round(squeezed + DISTANCE * (share if motion in (2, 4) else 1 - share))
    return dataclasses.replace(thing, **{"x" if motion in (1, 2) else "y": moved})


# ---------------------------------------------------------------------------------------------------- conversations


@dataclass(frozen=True)
class Conversation:
    """turns: (question, answer) on one scene; later questions may say "it" of the thing before."""

    scene: Scene
    turns: tuple[Question, ...]


def sample_conversation(rng: random.Random, split: Split, longest: int = 5) -> Conversation:
    """Two to `longest` turns of different kinds."""
    scene = sample_scene(rng, split)
    groups = scene.groups()
    sprites = [group.sprite for group in groups]
    single = [sprite for sprite in sprites if scene.count(sprite) == 1]
    turns: list[Question] = []
    if single:
        subject = rng.choice(single)
        turns = [presence(scene, subject)]
        follow = [colour_of(scene, subject), region_of(scene, subject)]
        turns += [dataclasses.replace(each, text=_with_pronoun(each.text, subject)) for each in follow]
        others = [sprite for sprite in single if sprite != subject]
        between = relation_of(scene, subject, rng.choice(others)) if others else None
        turns += [between] if between else []
    more = [counting(scene, sprite) for sprite in dict.fromkeys(sprites) if scene.count(sprite) > 1]
    more += [counting(scene, group.sprite, group.colour) for group in groups if sprites.count(group.sprite) > 1]
    more += [reading(scene)] if scene.sign else []
    more.append(presence(scene, another(rng, split, set(sprites))))
    rng.shuffle(more)
    start = rng.randint(0, max(longest - len(turns), 0))
    return Conversation(scene, (*more[:start], *turns, *more[start:])[:longest])


def _with_pronoun(text: str, sprite: int) -> str:
    return text.replace(f"the {SPRITES[sprite].name}", "it")
