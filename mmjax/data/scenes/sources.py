"""Scenes as random-access sources: record i is a function of (split, seed, i), computed on access, at any size.

    train = SceneCaptions(100_000)                                     # as many as you like: nothing is stored
    train[0]                                                           # {"image": uint8 [96, 96, 3], "text": ..., ...}
    Pipeline(SceneQuestions(10_000, "pairs"), batch_size=64, workers=2, transforms=...)
    SceneStatements(1_000, "counts", size=224)

Records have the fields of the published files' sources (`mmjax.data.image_text`, `task_lists`), with arrays in place of
encoded images. Scenes of one index are the same at all sizes, and in captions, masks, boxes and conversations.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import Literal, TypeAlias, TypeVar

import numpy as np
from jaxtyping import UInt8

from mmjax.data.scenes.language import Expression, long_caption, refer, short_caption
from mmjax.data.scenes.questions import KINDS, Kind, Question, sample_question, sample_scene
from mmjax.data.scenes.rendering import Picture, render
from mmjax.data.scenes.sequences import (
    IMAGE,
    Clip,
    Conversation,
    Document,
    sample_clip,
    sample_conversation,
    sample_document,
)
from mmjax.data.scenes.splits import Split, check_split
from mmjax.data.scenes.sprites import CANVAS, CATEGORIES, SPRITES, sprite_library
from mmjax.data.scenes.two_images import STATEMENT_KINDS, StatementKind, sample_comparison, sample_statement
from mmjax.data.scenes.world import MAX_THINGS, Scene
from mmjax.data.sources import Record
from mmjax.errors import MmjaxError

VERSION = 1
"""Of what the sources give: it changes when the same (split, seed, i) gives another record."""
KindT = TypeVar("KindT", bound=str)
Labels: TypeAlias = Literal["category", "sprite"]
"""What a class is: one of four categories, which held-out sprites have too, or one of the 128 sprites."""


class SceneSource:
    """The base of all: `length` records of a split.

    seed: other seeds give other records. size: side of the images in pixels.
    Raises MmjaxError for an unknown split, a length below 1, or when `pip install "mmjax[demo]"` is missing.
    """

    def __init__(self, length: int, split: Split = "train", *, seed: int = 0, size: int = CANVAS):
        check_split(split)
        if length < 1:
            raise MmjaxError(f"length={length}: a source of scenes has at least one record")
        # In this process, so that a missing package is an error here and workers read the file that this writes.
        for each in (CANVAS, size):
            sprite_library(each)
        self.length, self.seed, self.size = length, seed, size
        self.split: Split = split
        self.name = f"{type(self).__name__}-{split}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        raise IndexError(index)

    def record_name(self, index: int) -> str:
        return f"{self.name}[{index}]"

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{VERSION} {sorted(self.__dict__.items())}".encode()).hexdigest()

    def rng(self, index: int, stream: str = "scene") -> random.Random:
        """The random numbers of a record; Python's, whose scalars cost a tenth of NumPy's."""
        return random.Random(f"{self.seed} {self.split} {stream} {range(self.length)[index]}")

    def scene(self, index: int) -> Scene:
        return sample_scene(self.rng(index), self.split)

    def picture(self, scene: Scene) -> Picture:
        return render(scene, self.size)


class SceneCaptions(SceneSource):
    """{"image", "text": the short caption, "texts": (short, long), "image_id": int}"""

    def __getitem__(self, index: int) -> Record:
        scene = self.scene(index)
        texts = (short_caption(scene), long_caption(scene))
        image_id = range(self.length)[index]
        return {"image": self.picture(scene).image, "text": texts[0], "texts": texts, "image_id": image_id}


def class_names(labels: Labels) -> tuple[str, ...]:
    return CATEGORIES if labels == "category" else tuple(sprite.name for sprite in SPRITES)


def _class_of(sprite: int, labels: Labels) -> int:
    return CATEGORIES.index(SPRITES[sprite].category) if labels == "category" else sprite


class SceneMasks(SceneSource):
    """{"image", "mask": uint8 [size, size], the class of each pixel}; `classes[0]` is "background", signs included."""

    def __init__(
        self, length: int, split: Split = "train", *, seed: int = 0, size: int = CANVAS, labels: Labels = "category"
    ):
        super().__init__(length, split, seed=seed, size=size)
        self.labels: Labels = labels

    @property
    def classes(self) -> tuple[str, ...]:
        return ("background", *class_names(self.labels))

    def __getitem__(self, index: int) -> Record:
        scene = self.scene(index)
        picture = self.picture(scene)
        table = np.zeros(256, np.uint8)
        table[1 : len(scene.things) + 1] = [_class_of(thing.sprite, self.labels) + 1 for thing in scene.things]
        return {"image": picture.image, "mask": table[picture.owner]}


class SceneBoxes(SceneSource):
    """{"image", "boxes": float32 [MAX_THINGS, 4] (x, y, width, height), "labels": int32 [MAX_THINGS], "image_id": int}

    Boxes are around visible pixels. Labels are indices in `classes`; from the number of things on they are -1.
    """

    def __init__(
        self, length: int, split: Split = "train", *, seed: int = 0, size: int = CANVAS, labels: Labels = "category"
    ):
        super().__init__(length, split, seed=seed, size=size)
        self.labels: Labels = labels

    @property
    def classes(self) -> tuple[str, ...]:
        return class_names(self.labels)

    def __getitem__(self, index: int) -> Record:
        scene = self.scene(index)
        picture = self.picture(scene)
        labels = np.full(MAX_THINGS, -1, np.int32)
        labels[: len(scene.things)] = [_class_of(thing.sprite, self.labels) for thing in scene.things]
        image_id = range(self.length)[index]
        return {"image": picture.image, "boxes": _padded(picture.boxes()), "labels": labels, "image_id": image_id}


def _padded(boxes: np.ndarray) -> np.ndarray:
    padded = np.zeros((MAX_THINGS, 4), np.float32)
    padded[: len(boxes)] = boxes
    return padded


class SceneReferring(SceneSource):
    """{"image", "text", "box": float32 [4], "mask": bool [size, size], "boxes": [MAX_THINGS, 4], "target", "image_id"}

    text describes exactly one thing, `boxes[target]`; `boxes` are the proposals to choose from, padded with zeros.
    """

    def example(self, index: int) -> tuple[Scene, Expression, int]:
        """(scene, expression, the index of its thing)."""
        rng = self.rng(index, "referring")
        while True:
            scene = sample_scene(rng, self.split)
            target = rng.randrange(len(scene.things))
            expression = refer(rng, scene, target)
            # Without another thing there is nothing to refer to.
            if expression is not None and len(scene.things) > 1:
                return scene, expression, target

    def __getitem__(self, index: int) -> Record:
        scene, expression, target = self.example(index)
        picture = self.picture(scene)
        boxes = _padded(picture.boxes())
        record = {"image": picture.image, "text": str(expression), "image_id": range(self.length)[index]}
        return record | {"box": boxes[target], "boxes": boxes, "target": target, "mask": picture.mask(target)}


class SceneQuestions(SceneSource):
    """{"image", "text", "answers": (answer,), "answer_weights": (1.0,), "question_id": int64, "kind"}

    kinds: of `KINDS`, one after the other. Raises MmjaxError for none, or for an unknown one.
    """

    def __init__(
        self,
        length: int,
        split: Split = "train",
        *,
        seed: int = 0,
        size: int = CANVAS,
        kinds: Sequence[Kind] = KINDS,
    ):
        super().__init__(length, split, seed=seed, size=size)
        self.kinds = _checked_kinds("questions", kinds, KINDS)

    def example(self, index: int) -> Question:
        kind = self.kinds[range(self.length)[index] % len(self.kinds)]
        return sample_question(self.rng(index, "question"), self.split, kind)

    def __getitem__(self, index: int) -> Record:
        question = self.example(index)
        return {"image": self.picture(question.scenes[0]).image} | _answered(question, range(self.length)[index])


def _checked_kinds(what: str, kinds: Sequence[KindT], known: Sequence[KindT]) -> tuple[KindT, ...]:
    if not kinds or set(kinds) - set(known):
        raise MmjaxError(f"kinds={tuple(kinds)}: the kinds of {what} are {', '.join(known)}")
    return tuple(kinds)


def _answered(question: Question, index: int) -> Record:
    record = {"text": question.text, "answers": (question.answer,), "answer_weights": (1.0,), "kind": question.kind}
    return record | {"question_id": np.int64(index)}


class _TwoImages(SceneSource):
    def example(self, index: int) -> Question:
        raise IndexError(index)

    def images(self, question: Question) -> dict[str, UInt8[np.ndarray, "size size 3"]]:
        return {f"image_{side}": self.picture(scene).image for side, scene in enumerate(question.scenes)}


class SceneComparisons(_TwoImages):
    """{"image_0", "image_1", "text", "answers", "answer_weights", "question_id", "kind": "comparing"}"""

    def example(self, index: int) -> Question:
        return sample_comparison(self.rng(index, "comparison"), self.split)

    def __getitem__(self, index: int) -> Record:
        question = self.example(index)
        return self.images(question) | _answered(question, range(self.length)[index])


class SceneStatements(_TwoImages):
    """{"image_0", "image_1", "text", "label": 1 if the statement is true, "kind"}, as NLVR2's.

    kinds: of `STATEMENT_KINDS`, sampled. Raises MmjaxError for none, or for an unknown one.
    """

    def __init__(
        self,
        length: int,
        split: Split = "train",
        *,
        seed: int = 0,
        size: int = CANVAS,
        kinds: Sequence[StatementKind] = STATEMENT_KINDS,
    ):
        super().__init__(length, split, seed=seed, size=size)
        self.kinds = _checked_kinds("statements", kinds, STATEMENT_KINDS)

    def example(self, index: int) -> Question:
        return sample_statement(self.rng(index, "statement"), self.split, self.kinds)

    def __getitem__(self, index: int) -> Record:
        question = self.example(index)
        label = int(question.answer == "true")
        return self.images(question) | {"text": question.text, "label": label, "kind": question.kind}


class SceneDocuments(SceneSource):
    """{"images": uint8 [3, size, size, 3], "texts": the four parts around them, "text": these joined by "<image>"}"""

    def example(self, index: int) -> Document:
        return sample_document(self.rng(index, "document"), self.split)

    def __getitem__(self, index: int) -> Record:
        document = self.example(index)
        images = np.stack([self.picture(scene).image for scene in document.scenes])
        return {"images": images, "text": document.text, "texts": document.texts}


class SceneClips(SceneSource):
    """{"frames": uint8 [t, size, size, 3], "text", "question", "answers", "answer_weights", "boxes": float32 [t,
    MAX_THINGS, 4], "visible": float32 [t, MAX_THINGS]}, with t = `frames`.
    """

    def __init__(self, length: int, split: Split = "train", *, seed: int = 0, size: int = CANVAS, frames: int = 8):
        super().__init__(length, split, seed=seed, size=size)
        if frames < 2:
            raise MmjaxError(f"frames={frames}: a clip has at least two")
        self.frames = frames

    def example(self, index: int) -> Clip:
        return sample_clip(self.rng(index, "clip"), self.split, self.frames)

    def __getitem__(self, index: int) -> Record:
        clip = self.example(index)
        pictures = [self.picture(scene) for scene in clip.frames]
        visible = np.zeros((self.frames, MAX_THINGS), np.float32)
        for time, picture in enumerate(pictures):
            visible[time, : len(picture.areas)] = picture.visible()
        question = self.rng(index, "question").choice(clip.questions)
        return {
            "frames": np.stack([picture.image for picture in pictures]),
            "text": clip.text,
            "question": question.text,
            "answers": (question.answer,),
            "answer_weights": (1.0,),
            "boxes": np.stack([_padded(picture.boxes()) for picture in pictures]),
            "visible": visible,
        }


class SceneConversations(SceneSource):
    """{"image", "conversations": [{"from": "human" or "gpt", "value": str}, ...]}, as LLaVA's files."""

    def example(self, index: int) -> Conversation:
        return sample_conversation(self.rng(index, "conversation"), self.split)

    def __getitem__(self, index: int) -> Record:
        conversation = self.example(index)
        turns: list[dict[str, str]] = []
        for number, turn in enumerate(conversation.turns):
            image = f"{IMAGE}\n" if number == 0 else ""
            turns.append({"from": "human", "value": image + turn.text})
            turns.append({"from": "gpt", "value": f"{turn.answer[0].upper()}{turn.answer[1:]}."})
        return {"image": self.picture(conversation.scene).image, "conversations": turns}
