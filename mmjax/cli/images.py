"""The verbs that apply a model to images: classify (texts too), retrieve."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Column, Table

from mmjax.cli.evaluate import image_features, read_images, text_features
from mmjax.cli.loading import load
from mmjax.data.decoding import read_image
from mmjax.data.image_folder import ImageFolder
from mmjax.errors import MmjaxError
from mmjax.evaluation.features import finite, similarities
from mmjax.interface.image_text import ImageTextModel
from mmjax.training.storage import local_copy


def classify(source: str, inputs: Sequence[str], labels: str | None) -> None:
    """A table: the most probable labels of each image, or of each text, with the model's probabilities.

    inputs: files of images; for a BERT, texts.
    labels: the names to choose from, or the names of a head's classes, joined by commas; None: the model's own.
    """
    model = load(source)
    if not hasattr(model, "classify"):
        raise MmjaxError(f"{model.system} does not classify")
    names = _names(labels) or list(model.labels) or None
    of_images = model.classified == "image"
    if names is None and of_images and hasattr(model, "encode_text"):
        raise MmjaxError("--labels A,B,C: there is no labels.json beside the model, so nothing to choose from")
    predictions = model.classify([read_image(name) for name in inputs] if of_images else list(inputs), names)
    table = Table(Column(model.classified, overflow="fold"), "label", "probability")
    for name, classes in zip(inputs, predictions):
        for rank, (label, probability) in enumerate(classes):
            table.add_row("" if rank else name, label, f"{100 * probability:.1f} %")
    show(table)


def show(table: Table) -> None:
    """At the width of the terminal, and literally: brackets and colons of a name are no markup."""
    Console(markup=False, emoji=False).print(table)


def _names(labels: str | None) -> list[str]:
    """The names in "a, b, c"; [] for None."""
    if labels is None:
        return []
    names = [name.strip() for name in labels.split(",") if name.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise MmjaxError(f"--labels {labels}: want at least two different labels")
    return names


def retrieve(
    source: str,
    image: str | None,
    text: str | None,
    folder: str | None,
    k: int,
    picture: str,
    rerank: int = 0,
    formula: str | None = None,
) -> None:
    """The k images of a folder nearest to the query by cosine: a table, and a picture of them.

    folder: None: `images` in the source, where an experiment stores its held-out images.
    rerank: the number of nearest images that the ITM head ranks again. formula: "itm" or "itm+similarity", its score.
    """
    if k < 1 or rerank < 0:
        raise MmjaxError(f"-k {k}, --rerank {rerank}: at least 1, and at least 0")
    if rerank and text is None:
        raise MmjaxError("--rerank: the ITM head compares a text with images; it needs --text")
    if formula and not rerank:
        raise MmjaxError("--formula: the score of --rerank K")
    stored = epath.Path(source) / "images"
    if folder is None and not stored.is_dir():
        raise MmjaxError(f"--folder DIR: {source} has no folder `images` to search")
    model = load(source)
    with local_copy(stored) if folder is None else nullcontext(folder) as searched:
        index = ImageFolder(searched)
        images, indices, _ = read_images(index)
    if rerank:
        _rerank(model, text or "", images, index, indices, k, rerank, formula, picture)
        return
    features = image_features(model, images)
    if text is not None:
        query_features, query_image = text_features(model, [text]), None
    else:
        query_image = np.asarray(read_image(image or ""))
        query_features = image_features(model, [query_image])
    unit = jnp.asarray(_l2_normalize(query_features)), jnp.asarray(_l2_normalize(features))
    compare = model.similarity if isinstance(model, ImageTextModel) else similarities
    scores = finite("cosines", np.asarray(compare(*unit)))[0]
    nearest = np.argsort(-scores, kind="stable")[:k]
    cosines = scores[nearest]
    names = [index.record_name(int(indices[i])) for i in nearest]
    _show_nearest(f"nearest to {text or image}", "cosine", names, cosines)
    _draw(picture, text or str(image), query_image, [images[i] for i in nearest], cosines)
    print(picture)


def _rerank(
    model: Any,
    text: str,
    images: Sequence[np.ndarray],
    index: ImageFolder,
    indices: np.ndarray,
    k: int,
    rerank: int,
    formula: str | None,
    picture: str,
) -> None:
    if "match" not in model.abilities or "retrieve" not in model.abilities:
        raise MmjaxError(f"--rerank: this {model.system} has no ITM head with features to choose from")
    add = model.add_similarity if formula is None else formula == "itm+similarity"
    results = model.retrieve([text], images, k, rerank, add)[0]
    column = "ITM logit + cosine" if add else "ITM logit"
    scores = np.asarray([score for _, score in results])
    names = [index.record_name(int(indices[i])) for i, _ in results]
    _show_nearest(f"nearest to {text}, the {min(rerank, len(images))} nearest reranked", column, names, scores)
    _draw(picture, text, None, [images[i] for i, _ in results], scores)
    print(picture)


def _show_nearest(title: str, column: str, names: Sequence[str], scores: np.ndarray) -> None:
    table = Table("", Column("image", overflow="fold"), column, title=title, title_justify="left")
    for rank, (name, score) in enumerate(zip(names, scores), 1):
        table.add_row(str(rank), name, f"{score:.3f}")
    show(table)


def _l2_normalize(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _draw(file: str, title: str, query_image: np.ndarray | None, images: Sequence[np.ndarray], cosines: Any) -> None:
    from matplotlib.figure import Figure

    panels = ([] if query_image is None else [("query", query_image)]) + [
        (f"{c:.3f}", i) for c, i in zip(cosines, images)
    ]
    figure = Figure(figsize=(2.2 * len(panels), 2.8), layout="constrained")
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)
    for position, (label, image) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), position)
        axes.imshow(image)
        axes.set_title(label, fontsize=9)
        axes.set_axis_off()
    figure.savefig(file, format="png", dpi=110)
