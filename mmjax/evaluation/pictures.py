"""Pictures of results, as uint8 arrays [height, width, 3]; matplotlib without pyplot's global state."""

import io
import textwrap
import warnings
from collections.abc import Sequence, Set
from typing import Any, TypeAlias

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from mmjax.types import Float, Int, MmjaxError, UInt8

RIGHT, WRONG, REJECTED = "#1a9850", "#bbbbbb", "#c0392b"
Ranking = tuple[Int[np.ndarray, " rows"], Int[np.ndarray, "rows k"]]
"""Indices of queries, and of each query's candidates, best first."""


def retrieval_picture(
    thumbnails: UInt8[np.ndarray, "n height width 3"],
    captions: Sequence[str],
    text_image: Int[np.ndarray, " m"],
    image_queries: Ranking,
    text_queries: Ranking,
    attribution: str | None = None,
) -> UInt8[np.ndarray, "pixels_high pixels_wide 3"]:
    """Queries with their nearest candidates: on the left texts for images, on the right images for texts.

    Right answers are framed, or written, in green. `attribution` is a line at the foot.
    Raises MmjaxError for thumbnails that are not uint8 images, or captions that are not one a text.
    """
    if thumbnails.dtype != np.uint8 or thumbnails.ndim != 4:
        raise MmjaxError(f"thumbnails: need uint8 [n, height, width, 3], not {thumbnails.dtype} {thumbnails.shape}")
    if len(captions) != len(text_image):
        raise MmjaxError(f"captions: {len(captions)} of them for {len(text_image)} texts")
    k = max(image_queries[1].shape[1], text_queries[1].shape[1])
    rows = max(len(image_queries[0]), len(text_queries[0]))
    figure = Figure(figsize=(4.6 + 2.2 + 1.0 * k, 1.15 * rows + 0.7), dpi=100)
    grid = figure.add_gridspec(
        1, 2, width_ratios=(4.6, 2.2 + 1.0 * k), wspace=0.04, left=0.01, right=0.99, bottom=0.06, top=0.95
    )
    _texts_of_images(figure, grid[0, 0], rows, thumbnails, captions, text_image, image_queries)
    _images_of_texts(figure, grid[0, 1], rows, thumbnails, captions, text_image, text_queries)
    if attribution:
        figure.text(0.01, 0.01, attribution, fontsize=7, color="#444444")
    return pixels(figure)


def _texts_of_images(
    figure: Figure,
    cell: SubplotSpec,
    rows: int,
    thumbnails: np.ndarray,
    captions: Sequence[str],
    text_image: np.ndarray,
    ranking: Ranking,
) -> None:
    grid = cell.subgridspec(rows, 2, width_ratios=(1, 3.6), wspace=0.03, hspace=0.12)
    for row, (query, candidates) in enumerate(zip(*ranking)):
        axes = figure.add_subplot(grid[row, 0])
        axes.imshow(thumbnails[query], interpolation="nearest")
        bare(axes)
        caption = figure.add_subplot(grid[row, 1])
        caption.axis("off")
        if row == 0:
            axes.set_title("image", fontsize=9)
            caption.set_title("nearest texts", fontsize=9, loc="left")
        for index, text in enumerate(candidates):
            right = text_image[text] == query
            line = textwrap.shorten(captions[int(text)], 52, placeholder=" ...")
            colour, weight = (RIGHT, "bold") if right else ("#333333", "normal")
            height = 1 - (index + 0.5) / len(candidates)
            caption.text(0, height, plain(line), fontsize=8, color=colour, weight=weight, va="center")


def _images_of_texts(
    figure: Figure,
    cell: SubplotSpec,
    rows: int,
    thumbnails: np.ndarray,
    captions: Sequence[str],
    text_image: np.ndarray,
    ranking: Ranking,
) -> None:
    k = ranking[1].shape[1]
    grid = cell.subgridspec(rows, k + 1, width_ratios=(2.2, *[1.0] * k), wspace=0.08, hspace=0.12)
    for row, (query, candidates) in enumerate(zip(*ranking)):
        caption = figure.add_subplot(grid[row, 0])
        caption.axis("off")
        line = "\n".join(textwrap.wrap(captions[int(query)], 26, max_lines=4, placeholder=" ..."))
        caption.text(0.97, 0.5, plain(line), fontsize=8, ha="right", va="center")
        if row == 0:
            caption.set_title("text", fontsize=9, loc="right")
        for column, image in enumerate(candidates):
            axes = figure.add_subplot(grid[row, column + 1])
            axes.imshow(thumbnails[image], interpolation="nearest")
            bare(axes, RIGHT if text_image[query] == image else WRONG)
            if row == 0:
                axes.set_title(f"{column + 1}", fontsize=9)


def confusion_picture(
    matrix: Int[np.ndarray, "c c"], classes: Sequence[str], attribution: str | None = None
) -> UInt8[np.ndarray, "pixels_high pixels_wide 3"]:
    """The confusion matrix, true classes in rows, predicted ones in columns: row percentages, counts if they fit."""
    if matrix.shape != (len(classes), len(classes)):
        raise MmjaxError(f"matrix: need [{len(classes)}, {len(classes)}] for the classes, not {list(matrix.shape)}")
    share = 100.0 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = min(14.0, 2.5 + 0.45 * len(classes))
    figure = Figure(figsize=(size + 1, size), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, vmin=0, vmax=100, cmap="viridis")
    figure.colorbar(image, ax=axes, label="% of the class", shrink=0.8)
    if len(classes) <= 40:
        names = [plain(textwrap.shorten(name, 24, placeholder=" ...")) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(classes)), names, fontsize=8)
    if len(classes) <= 20:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "black" if share[row, column] > 60 else "white"
                axes.text(column, row, f"{count}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if attribution:
        figure.supxlabel(attribution, fontsize=7, color="#444444", x=0.01, ha="left")
    return pixels(figure)


def mistakes_picture(
    images: UInt8[np.ndarray, "n height width c"], lines: Sequence[str], attribution: str | None = None
) -> UInt8[np.ndarray, "pixels_high pixels_wide 3"]:
    """A grid of images with a line or two under each: its class and the predicted one."""
    if not 0 < len(images) == len(lines):
        raise MmjaxError(f"lines: {len(lines)} lines for {len(images)} images")
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.6 * columns, 2.1 * rows + 0.3), dpi=100, layout="constrained")
    for index, (image, line) in enumerate(zip(images, lines), 1):
        axes = figure.add_subplot(rows, columns, index)
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        axes.set_xlabel("\n".join(textwrap.wrap(plain(line), 22)), fontsize=7)
        bare(axes)
    if attribution:
        figure.supxlabel(attribution, fontsize=7, color="#444444", x=0.01, ha="left")
    return pixels(figure)


def filtered_picture(
    images: Sequence[UInt8[np.ndarray, "height width 3"]], texts: Sequence[Sequence[tuple[str, str, float, bool]]]
) -> UInt8[np.ndarray, "pixels_high pixels_wide 3"]:
    """A grid of images of any sizes with their texts as a filter decided (BLIP, figure 4).

    texts: for each image (source, text, score, kept) of each text: + and green: kept, - and red: dropped.
    Raises MmjaxError unless there is a list of texts for each image.
    """
    if not 0 < len(images) == len(texts):
        raise MmjaxError(f"texts: {len(texts)} lists of texts for {len(images)} images")
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    lines = max(map(len, texts))
    figure = Figure(figsize=(2.4 * columns, (2.1 + 0.48 * lines) * rows), dpi=100)
    grid = figure.add_gridspec(
        2 * rows,
        columns,
        height_ratios=[2.1, 0.48 * lines] * rows,
        wspace=0.12,
        hspace=0.05,
        left=0.01,
        right=0.99,
        bottom=0.01,
        top=0.99,
    )
    for index, (image, image_texts) in enumerate(zip(images, texts)):
        row, column = divmod(index, columns)
        axes = figure.add_subplot(grid[2 * row, column])
        axes.imshow(image)
        bare(axes)
        below = figure.add_subplot(grid[2 * row + 1, column])
        below.axis("off")
        for line, (source, text, score, kept) in enumerate(image_texts):
            wrapped = "\n".join(textwrap.wrap(f"{source}: {text}", 34, max_lines=2, placeholder=" ..."))
            mark = "+" if kept else "-"
            below.text(
                0,
                1 - line / lines,
                f"{mark} {plain(wrapped)} ({score:.2f})",
                fontsize=7,
                va="top",
                color=RIGHT if kept else REJECTED,
            )
    return pixels(figure)


def accuracy_picture(
    accuracy: Float[np.ndarray, " c"],
    counts: Int[np.ndarray, " c"],
    classes: Sequence[str],
    attribution: str | None = None,
) -> UInt8[np.ndarray, "pixels_high pixels_wide 3"]:
    """A bar a class, best first: accuracy in percent, with the number of items beside the name. NaN: no items."""
    if not len(accuracy) == len(counts) == len(classes):
        raise MmjaxError(f"classes: {len(classes)} for {len(accuracy)} accuracies and {len(counts)} counts")
    order = np.argsort(np.nan_to_num(accuracy, nan=-1.0), kind="stable")
    figure = Figure(figsize=(7, min(40.0, 1.2 + 0.24 * len(classes))), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(order)), np.nan_to_num(accuracy[order]), color="#4575b4")
    names = [f"{plain(textwrap.shorten(classes[int(i)], 32, placeholder=' ...'))} ({counts[i]})" for i in order]
    axes.set_yticks(range(len(order)), names, fontsize=8)
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, %")
    axes.grid(axis="x", alpha=0.3)
    if attribution:
        figure.supxlabel(attribution, fontsize=7, color="#444444", x=0.01, ha="left")
    return pixels(figure)


def pixels(figure: Figure) -> UInt8[np.ndarray, "pixels_high pixels_wide 3"]:
    """A matplotlib figure as an array."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for a character without a glyph
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png(picture: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """The picture as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def plain(text: str) -> str:
    """Text that matplotlib does not parse as mathematics."""
    return text.replace("$", r"\$")


def bare(axes: object, frame: str | None = None) -> None:
    """No ticks; a thick frame in a colour, or none."""
    axes.set_xticks([])  # type: ignore[attr-defined]
    axes.set_yticks([])  # type: ignore[attr-defined]
    for spine in axes.spines.values():  # type: ignore[attr-defined]
        spine.set_visible(frame is not None)
        spine.set_linewidth(3 if frame == RIGHT else 1)
        spine.set_edgecolor(frame or "none")


def segmentation_picture(
    examples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    names: Sequence[str],
    colours: UInt8[np.ndarray, "classes 3"],
    attribution: str | None = None,
) -> UInt8[np.ndarray, "pixels_high pixels_wide 3"]:
    """Image, true and predicted classes [height, width] of each example, a row each, with a legend of the classes."""
    figure = Figure(figsize=(6.6, 2.1 * len(examples) + 0.8), dpi=100)
    grid = figure.subplots(len(examples), 3, squeeze=False)
    for row, (image, *masks) in zip(grid, examples):
        row[0].imshow(image)
        for axes, mask in zip(row[1:], masks):
            axes.imshow(blended(image, mask, colours))
        for axes in row:
            bare(axes)
    for axes, title in zip(grid[0], ("image", "truth", "prediction")):
        axes.set_title(title, fontsize=9)
    _legend(figure, {int(k) for _, *masks in examples for mask in masks for k in np.unique(mask)}, names, colours)
    figure.subplots_adjust(0.01, 0.8 / (2.1 * len(examples) + 0.8), 0.99, 0.95, 0.03, 0.05)
    if attribution:
        figure.text(0.01, 0.005, attribution, fontsize=6, color="#444444")
    return pixels(figure)


def _legend(figure: Figure, classes: Set[int], names: Sequence[str], colours: np.ndarray) -> None:
    """The names of these classes with their colours, at the foot; a class without a name is left out."""
    named = sorted(k for k in classes if k < len(names))
    patches = [Patch(color=tuple((colours[k] / 255).tolist()), label=plain(names[k])) for k in named]
    foot = 0.2 / figure.get_size_inches()[1]  # above the line of the attribution
    figure.legend(
        handles=patches,
        loc="lower center",
        ncols=min(len(patches), 6),
        fontsize=8,
        frameon=False,
        bbox_to_anchor=(0.5, foot),
    )


def blended(
    image: UInt8[np.ndarray, "height width 3"],
    mask: Int[np.ndarray, "height width"],
    colours: UInt8[np.ndarray, "classes 3"],
) -> UInt8[np.ndarray, "height width 3"]:
    """The image with the colours of its classes laid over it; class 0 and pixels without a class stay as they are."""
    over = image * 0.35 + colours[mask] * 0.65
    return np.where(((mask > 0) & (mask < 255))[..., None], over, image).astype(np.uint8)


def segmented_picture(
    image: UInt8[np.ndarray, "height width 3"],
    mask: Int[np.ndarray, "height width"],
    names: Sequence[str],
    colours: UInt8[np.ndarray, "classes 3"],
) -> UInt8[np.ndarray, "pixels_high pixels_wide 3"]:
    """The image beside itself with the colours of its classes, and a legend of them."""
    height, width = mask.shape
    figure = Figure(figsize=(8, 4 * height / width + 0.7), dpi=120)
    left, right = figure.subplots(1, 2)
    left.imshow(image)
    right.imshow(blended(image, mask, colours))
    _legend(figure, set(np.unique(mask).tolist()), names, colours)
    for axes in (left, right):
        bare(axes)
    figure.subplots_adjust(0.01, 0.7 / (4 * height / width + 0.7), 0.99, 0.99, 0.02)
    return pixels(figure)


Boxes: TypeAlias = tuple[Float[np.ndarray, "n 4"], Int[np.ndarray, " n"]]
"""Boxes (x, y, width, height) and their classes."""


def detection_picture(
    examples: Sequence[tuple[np.ndarray, Boxes, Boxes]], names: Sequence[str], attribution: str | None = None
) -> UInt8[np.ndarray, "pixels_high pixels_wide 3"]:
    """Images with their true boxes, in the upper row, and with the predicted ones."""
    figure = Figure(figsize=(2.3 * len(examples), 5.0), dpi=100)
    grid = figure.subplots(2, len(examples), squeeze=False)
    for column, (image, *both) in zip(grid.T, examples):
        for axes, (boxes, labels) in zip(column, both):
            axes.imshow(image)
            bare(axes)
            _draw_boxes(axes, boxes, [str(names[label]) for label in labels])
    for axes, title in zip(grid[:, 0], ("truth", "prediction")):
        axes.set_title(title, fontsize=9, loc="left")
    figure.subplots_adjust(0.01, 0.04, 0.99, 0.94, 0.03, 0.12)
    if attribution:
        figure.text(0.01, 0.005, attribution, fontsize=6, color="#444444")
    return pixels(figure)


def detected_picture(
    image: UInt8[np.ndarray, "height width 3"], boxes: Float[np.ndarray, "n 4"], lines: Sequence[str]
) -> UInt8[np.ndarray, "pixels_high pixels_wide 3"]:
    """An image with boxes, a line of text at each."""
    height, width = image.shape[:2]
    figure = Figure(figsize=(7, 7 * height / width), dpi=120)
    axes = figure.subplots()
    axes.imshow(image)
    bare(axes)
    _draw_boxes(axes, boxes, lines)
    figure.subplots_adjust(0, 0, 1, 1)
    return pixels(figure)


def _draw_boxes(axes: Any, boxes: np.ndarray, lines: Sequence[str]) -> None:
    colours = {
        line: colormaps["tab10"](i % 10) for i, line in enumerate(sorted({each.split(" ")[0] for each in lines}))
    }
    for (x, y, width, height), line in zip(boxes, lines):
        colour = colours[line.split(" ")[0]]
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=colour, linewidth=1.5))
        axes.text(x, y - 1, plain(line), fontsize=6, color="white", va="bottom", clip_on=True).set_bbox(
            {"facecolor": colour, "edgecolor": "none", "pad": 0.6}
        )
