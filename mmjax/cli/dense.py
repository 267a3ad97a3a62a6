"""The verbs of dense prediction: segment, detect."""

import pathlib

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Column, Table

from mmjax.cli.loading import load
from mmjax.data.decoding import read_image
from mmjax.data.masks import palette
from mmjax.errors import MmjaxError
from mmjax.evaluation.pictures import detected_picture, png, segmented_picture


def segment(source: str, image: str, out: str, mask: str | None) -> None:
    """A picture of the image with its classes, their shares as a table, and with `mask` a PNG with a palette."""
    model = load(source)
    if not hasattr(model, "segment"):
        raise MmjaxError(
            f"{source}: {model.system} does not segment; mmjax train experiments/segment.py makes a network"
        )
    pixels, names = np.asarray(read_image(image)), model.class_names()
    (classes,) = model.segment(pixels)
    table = Table(Column("class", overflow="fold"), "pixels")
    shares = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    for k in np.argsort(-shares, kind="stable"):
        if shares[k]:
            table.add_row(names[k], f"{100 * shares[k]:.1f} %")
    Console(markup=False, emoji=False).print(table)
    colours = palette(len(names))
    pathlib.Path(out).write_bytes(png(segmented_picture(pixels, classes, names, colours)))
    print(out)
    if mask is not None:
        stored = Image.fromarray(classes.astype(np.uint8), "P")
        stored.putpalette(colours.tobytes())
        stored.save(mask, format="PNG")
        print(mask)


def detect(source: str, image: str, threshold: float, out: str) -> None:
    """A table of the things in the image, the best first, and a picture of it with their boxes."""
    if not 0 <= threshold <= 1:
        raise MmjaxError(f"--threshold {threshold}: from 0 to 1")
    model = load(source)
    if not hasattr(model, "detect"):
        raise MmjaxError(
            f"{source}: {model.system} does not detect; mmjax train experiments/detect.py makes a detector"
        )
    pixels = np.asarray(read_image(image))
    (detections,) = model.detect(pixels, threshold)
    table = Table(Column("class", overflow="fold"), "score", "x", "y", "width", "height")
    for name, score, box in detections:
        table.add_row(name, f"{100 * score:.1f} %", *(f"{value:.0f}" for value in box))
    Console(markup=False, emoji=False).print(table)
    boxes = np.array([box for _, _, box in detections]).reshape(-1, 4)
    lines = [f"{name} {100 * score:.0f} %" for name, score, _ in detections]
    pathlib.Path(out).write_bytes(png(detected_picture(pixels, boxes, lines)))
    print(out)
