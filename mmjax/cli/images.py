"""The verbs that ask a model: classify, retrieve."""

import pathlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Column, Table

from mmjax.cli.evaluate import image_features, read_images, text_features
from mmjax.cli.loading import load
from mmjax.data.decoding import decode_image
from mmjax.data.image_folder import ImageFolder
from mmjax.errors import MmjaxError
from mmjax.evaluation.retrieval import top_candidates
from mmjax.training.storage import local_copy


def classify(source: str, asked: Sequence[str], labels: str | None) -> None:
    """A table: the most probable labels of each image, or of each text, with the model's probabilities.

    asked: files of images; of a BERT, texts.
    labels: what a model with a text tower chooses from, or names for a head's classes.
    """
    model = load(source)
    if not hasattr(model, "classify"):
        raise MmjaxError(f"{model.system} does not classify")
    names = _names(labels) or list(model.labels) or None
    of_images = model.classified == "image"
    if names is None and of_images and hasattr(model, "encode_text"):
        raise MmjaxError("--labels A,B,C: there is no labels.json beside the model, so nothing to choose from")
    found = model.classify([read_image(file) for file in asked] if of_images else list(asked), names)
    table = Table(Column(model.classified, overflow="fold"), "label", "probability")
    for file, row in zip(asked, found):
        for place, (name, share) in enumerate(row):
            table.add_row("" if place else file, name, f"{100 * share:.1f} %")
    _show(table)


def _show(table: Table) -> None:
    """As wide as the terminal is now, and letter by letter: brackets and colons of a name are no markup."""
    Console(markup=False, emoji=False).print(table)


def _names(labels: str | None) -> list[str]:
    """The names in "a, b, c"; [] for None."""
    if labels is None:
        return []
    names = [name.strip() for name in labels.split(",") if name.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise MmjaxError(f"--labels {labels}: want at least two different labels")
    return names


def read_image(file: str) -> np.ndarray:
    """uint8 [height, width, 3]. Raises MmjaxError naming the file."""
    path = pathlib.Path(file)
    if not path.is_file():
        raise MmjaxError(f"{file}: no such image")
    return decode_image(path.read_bytes(), file)


def retrieve(source: str, image: str | None, text: str | None, folder: str | None, k: int, picture: str) -> None:
    """The k images of a folder nearest to the query by cosine: a table, and a picture of them.

    folder: None takes `images` in the source, where an experiment puts drawings or photographs of its own.
    """
    if k < 1:
        raise MmjaxError(f"-k {k}: at least 1")
    own = epath.Path(source) / "images"
    if folder is None and not own.is_dir():
        raise MmjaxError(f"--folder DIR: {source} has no images of its own to search")
    model = load(source)
    with local_copy(own) if folder is None else nullcontext(folder) as searched:
        index = ImageFolder(searched)
        images, rows, _ = read_images(index)
    features = image_features(model, images)
    if text is not None:
        query, asked = text_features(model, [text]), None
    else:
        asked = read_image(image or "")
        query = image_features(model, [asked])
    found = np.asarray(top_candidates(query, features, min(k, len(images))))[0]
    cosines = _unit(features[found]) @ _unit(query)[0]
    title = f"nearest to {text or image}"
    table = Table("", Column("image", overflow="fold"), "cosine", title=title, title_justify="left")
    for place, (row, cosine) in enumerate(zip(found, cosines), 1):
        table.add_row(str(place), index.record_name(int(rows[row])), f"{cosine:.3f}")
    _show(table)
    _draw(picture, text or str(image), asked, [images[row] for row in found], cosines)
    print(picture)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _draw(file: str, title: str, asked: np.ndarray | None, images: Sequence[np.ndarray], cosines: Any) -> None:
    from matplotlib.figure import Figure

    shown = ([] if asked is None else [("query", asked)]) + [(f"{c:.3f}", i) for c, i in zip(cosines, images)]
    figure = Figure(figsize=(2.2 * len(shown), 2.8), layout="constrained")
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)
    for place, (label, image) in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), place)
        axes.imshow(image)
        axes.set_title(label, fontsize=9)
        axes.set_axis_off()
    figure.savefig(file, format="png", dpi=110)
