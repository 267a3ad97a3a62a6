"""easy-VQA (Victor Zhou 2019, MIT): questions about 64 px images of one coloured shape, from the package `easy_vqa`.

    test = EasyVqa("test")
    test[0]    # {"image": uint8 [64, 64, 3], "text": "what is the color of the shape?", "answers": ("red",), ...}

38,575 questions about 4,000 training images and 9,673 about 1,000 test images, in 13 answers. Kinds:

    presence    is there a blue shape? is a circle present?                     yes, no
    negation    does the image not contain a circle? is no red shape present?   yes, no
    colour      what is the color of the circle?                                eight colours
    shape       what shape is in the image? what is the blue shape?             circle, rectangle, triangle
"""

import functools
import hashlib
import importlib.util
import json
import pathlib
import re
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import UInt8

from mmjax.data.decoding import decode_image
from mmjax.data.sources import Record
from mmjax.errors import MmjaxError

PACKAGE = "easy_vqa"
Part: TypeAlias = Literal["train", "test"]
KINDS = ("presence", "negation", "colour", "shape")
NEGATION = re.compile(r"\b(not|no)\b")


class EasyVqa:
    """Records {"image", "text", "answers": (answer,), "answer_weights": (1.0,), "question_id", "image_id", "kind"}, as
    those of the scenes' questions.

    Raises MmjaxError for another part, or when `pip install "mmjax[demo]"` is missing.
    """

    def __init__(self, part: Part = "train"):
        if part not in ("train", "test"):
            raise MmjaxError(f"part={part!r}: train or test")
        self.part, self.name = part, f"easy_vqa-{part}"
        entries = json.loads((easy_vqa_folder() / part / "questions.json").read_text("utf-8"))
        self.questions: list[tuple[str, str, int]] = [(text, answer, image) for text, answer, image in entries]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Record:
        text, answer, image = self.questions[index]
        record = {"image": _images(self.part)[image], "text": text, "answers": (answer,), "answer_weights": (1.0,)}
        question_id = np.int64(range(len(self))[index])
        return record | {"question_id": question_id, "image_id": image, "kind": question_kind(text)}

    def record_name(self, index: int) -> str:
        return f"{self.name}[{index}]"

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.name} {self.questions}".encode()).hexdigest()


def question_kind(text: str) -> str:
    """One of `KINDS`."""
    if not text.startswith("what"):
        return "negation" if NEGATION.search(text) else "presence"
    return "colour" if "color" in text else "shape"


def easy_vqa_answers() -> tuple[str, ...]:
    """The 13 answers."""
    return tuple((easy_vqa_folder() / "answers.txt").read_text("utf-8").split())


def easy_vqa_folder() -> pathlib.Path:
    """The package's data; the package is not imported. Raises MmjaxError where it is missing."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    folder = pathlib.Path(folders[0]) / "data" if folders else None
    if folder is None or not (folder / "answers.txt").is_file():
        raise MmjaxError(f'easy-VQA needs the package {PACKAGE}: pip install "mmjax[demo]"')
    return folder


@functools.cache
def _images(part: Part) -> UInt8[np.ndarray, "n 64 64 3"]:
    """All images of a part by number, decoded once in each process: 49 MB of training images."""
    folder = easy_vqa_folder() / part / "images"
    files = [folder / f"{number}.png" for number in range(sum(1 for _ in folder.glob("*.png")))]
    return np.stack([decode_image(file.read_bytes(), str(file)) for file in files])
