"""The verbs on images and texts: match, answer, ground, caption."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from mmjax.cli.images import show
from mmjax.cli.loading import load
from mmjax.data.decoding import read_image
from mmjax.data.task_lists import read_answers
from mmjax.errors import MmjaxError
from mmjax.evaluation.heat_pictures import heat_picture
from mmjax.evaluation.pictures import png
from mmjax.interface.answers import AnsweringModel


def load_able(source: str, ability: str) -> Any:
    """The loaded model. Raises MmjaxError, naming what it can do, if it lacks an ability."""
    model = load(source)
    if ability not in model.abilities:
        can = ", ".join(model.abilities) or "nothing but forward"
        raise MmjaxError(f"{source}: this {model.system} does not {ability}; it can {can}")
    return model


def match(source: str, files: Sequence[str], texts: Sequence[str]) -> None:
    """A table: for each image and text the ITM head's probability of a match and, with projections, their cosine."""
    model = load_able(source, "match")
    images = [read_image(file) for file in files]
    pairs = [(i, j) for i in range(len(images)) for j in range(len(texts))]
    probabilities = model.match([images[i] for i, _ in pairs], [texts[j] for _, j in pairs]).tolist()
    cosines = None
    if "encode_image" in model.abilities:
        cosines = model.similarity(model.encode_image(images), model.encode_text(list(texts))).tolist()
    table = Table(Column("image", overflow="fold"), "text", "match", *([] if cosines is None else ["cosine"]))
    for (i, j), probability in zip(pairs, probabilities):
        cosine = [] if cosines is None else [f"{cosines[i][j]:.3f}"]
        table.add_row("" if j else files[i], texts[j], f"{100 * probability:.1f} %", *cosine)
    show(table)


def answer(source: str, file: str, questions: Sequence[str], answers: str | None, top: int, k: int) -> None:
    """A table: the answer to each question, or the most probable ones of a list.

    answers: a JSON file with a list of answers, or the answers, joined by commas. None: the model writes them.
    """
    if top < 1 or k < 1:
        raise MmjaxError(f"--top {top} --k {k}: at least 1")
    choices = None if answers is None else _choices(answers)
    model, image = load_able(source, "answer"), read_image(file)
    if choices is not None and not isinstance(model, AnsweringModel):
        raise MmjaxError(f"--answers: this {model.system} ranks no list; without it the model writes its answers")
    images = [image] * len(questions)
    if choices is None:
        table = Table(Column("question", overflow="fold"), "answer")
        for question, text in zip(questions, model.answer(images, questions)):
            table.add_row(question, text)
    else:
        table = Table(Column("question", overflow="fold"), "answer", "probability")
        for question, ranked in zip(questions, model.answer(images, questions, choices, top=top, k=k)):
            for rank, (text, probability) in enumerate(ranked):
                table.add_row("" if rank else question, text, f"{100 * probability:.1f} %")
    show(table)


def _choices(answers: str) -> Sequence[str]:
    if pathlib.Path(answers).suffix == ".json":
        return read_answers(answers)
    names = [name.strip() for name in answers.split(",") if name.strip()]
    if len(names) < 2:
        raise MmjaxError(f"--answers {answers}: a .json file, or at least two answers A,B")
    return names


def ground(source: str, file: str, text: str, out: str, block: int | None) -> None:
    """Prints the box and the probability of a match, and stores the picture."""
    model, image = load_able(source, "ground"), read_image(file)
    grounding = model.ground(image, text, block=block)
    x, y, width, height = grounding.box
    box = f"x {x:.0f}, y {y:.0f}, width {width:.0f}, height {height:.0f}"
    Console(markup=False, emoji=False).print(f"{text}: {box} (match {100 * grounding.probability:.1f} %)")
    pathlib.Path(out).write_bytes(png(heat_picture(np.asarray(image), grounding.heat, grounding.box, text)))
    print(out)


def caption(source: str, files: Sequence[str], options: Mapping[str, Any]) -> None:
    """A table: a caption of each image. options: keywords of the model's `caption`."""
    model = load_able(source, "caption")
    captions = model.caption([read_image(file) for file in files], **options)
    table = Table(Column("image", overflow="fold"), "caption")
    for file, text in zip(files, captions):
        table.add_row(file, text)
    show(table)
