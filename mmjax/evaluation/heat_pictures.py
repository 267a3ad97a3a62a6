"""Pictures of heat maps over images, for grounding; matplotlib without pyplot's global state."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mmjax.evaluation.pictures import REJECTED, RIGHT, bare, pixels, plain
from mmjax.types import Float, MmjaxError, UInt8

Box = tuple[float, float, float, float]


def heat_picture(
    image: UInt8[np.ndarray, "height width 3"],
    heat: Float[np.ndarray, "height width"],
    box: Box | None = None,
    title: str = "",
) -> UInt8[np.ndarray, "pixels_high pixels_wide 3"]:
    """An image, and beside it the image under a heat map in [0, 1]; a box (x, y, width, height) is drawn in both.

    Raises MmjaxError for a map of another size than the image.
    """
    shown = image, overlay(image, heat)
    width = 4.0 * min(max(image.shape[1] / image.shape[0], 0.5), 2.0)
    figure = Figure(figsize=(2 * width + 0.2, 4.5), dpi=100, layout="constrained")
    for axes, picture in zip(figure.subplots(1, 2), shown):
        axes.imshow(picture)
        bare(axes)
        if box is not None:
            axes.add_patch(Rectangle(box[:2], *box[2:], fill=False, linewidth=2.5, edgecolor=RIGHT))
    if title:
        figure.suptitle(plain(textwrap.shorten(title, 90, placeholder=" ...")), fontsize=11)
    return pixels(figure)


def grounding_picture(
    images: Sequence[UInt8[np.ndarray, "height width 3"]],
    heats: Sequence[Float[np.ndarray, "height width"]],
    texts: Sequence[str],
    boxes: Sequence[Box],
    predicted: Sequence[Box | None],
    attribution: str | None = None,
) -> UInt8[np.ndarray, "pixels_high pixels_wide 3"]:
    """A grid of images under the heat maps of their texts: the named box in white; the predicted one in green where it
    is the same, in red where it is another.

    Raises MmjaxError for a map of another size than its image.
    """
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.0 * columns, 2.35 * rows + 0.2), dpi=100, layout="constrained")
    for index, (image, heat, text, box, guess) in enumerate(zip(images, heats, texts, boxes, predicted), 1):
        axes = figure.add_subplot(rows, columns, index)
        axes.imshow(overlay(image, heat))
        bare(axes)
        axes.set_title("\n".join(textwrap.wrap(plain(text), 27)), fontsize=8)
        frames = [] if guess is None else [(guess, RIGHT if guess == box else REJECTED, 3.0)]
        for (x, y, width, height), colour, thick in [*frames, (box, "white", 1.2)]:
            frame = Rectangle((x - 0.5, y - 0.5), width, height, fill=False, linewidth=thick, edgecolor=colour)
            axes.add_patch(frame)
    if attribution:
        figure.supxlabel(attribution, fontsize=6, color="#444444", x=0.01, ha="left")
    return pixels(figure)


def overlay(
    image: UInt8[np.ndarray, "height width 3"], heat: Float[np.ndarray, "height width"]
) -> Float[np.ndarray, "height width 3"]:
    """An image under a heat map in [0, 1], which covers it in proportion to heat^0.7, as in LAVIS's common/gradcam.py.

    Raises MmjaxError for a map of another size than the image.
    """
    if heat.shape != image.shape[:2]:
        raise MmjaxError(f"heat {list(heat.shape)}: should have the image's size {list(image.shape[:2])}")
    weight = 0.85 * np.clip(heat, 0, 1)[..., None] ** 0.7
    return (1 - weight) * image / 255 + weight * colormaps["turbo"](heat)[..., :3]
