"""The verbs of dense prediction: segment."""

import pathlib

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Column, Table

from mmjax.cli.images import read_image
from mmjax.cli.loading import load
from mmjax.data.masks import palette
from mmjax.errors import MmjaxError
from mmjax.evaluation.pictures import png, segmented_picture


def segment(source: str, image: str, out: str, mask: str | None) -> None:
    """A picture of the image with its classes, their shares as a table, and with `mask` a PNG with a palette."""
    model = load(source)
    if not hasattr(model, "segment"):
        raise MmjaxError(
            f"{source}: {model.system} does not segment; mmjax train experiments/segment.py makes a network"
        )
    pixels, names = read_image(image), model.class_names()
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
