"""Images of any resolution as tiles: which grid an image is cut in, and where its pixels are within it (LLaVA 1.6).

Sources: LLaVA's mm_utils.py (select_best_resolution, resize_and_pad_image) and llava_arch.py (unpad_image), with
transformers' order of (height, width) and its rounding.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

Size = tuple[int, int]
"""(height, width), or (rows, columns)."""


def best_grid(image: Size, grids: Sequence[Size], side: int) -> Size:
    """The grid of tiles that shows most of an image's pixels; among equals the smallest, then the first."""

    def shown(grid: Size) -> tuple[int, int]:
        height, width = grid[0] * side, grid[1] * side
        scale = min(width / image[1], height / image[0])
        pixels = min(int(image[1] * scale) * int(image[0] * scale), image[0] * image[1])
        return pixels, pixels - height * width

    return max(grids, key=shown)


def fitted(image: Size, area: Size) -> Size:
    """The size of an image enlarged or shrunk into an area, in its own proportions."""
    down, across = area[0] / image[0], area[1] / image[1]
    if across < down:
        return min(math.ceil(image[0] * across), area[0]), area[1]
    return area[0], min(math.ceil(image[1] * down), area[1])


def unpadded(image: Size, area: Size) -> tuple[slice, slice]:
    """The rows and columns of an area of features that show an image, not the border beside it (unpad_image)."""
    if image[1] / image[0] > area[1] / area[0]:
        border = (area[0] - int(round(image[0] * (area[1] / image[1]), 7))) // 2
        return slice(border, area[0] - border), slice(0, area[1])
    border = (area[1] - int(round(image[1] * (area[0] / image[0]), 7))) // 2
    return slice(0, area[0]), slice(border, area[1] - border)


def cut(picture: Image.Image, grids: Sequence[Size], side: int, resample: Image.Resampling) -> np.ndarray:
    """uint8 [1 + rows * columns, side, side, 3]: the whole image stretched to a tile, then the tiles of the best grid,
    row by row, with black padding around the image."""
    image = (picture.height, picture.width)
    rows, columns = best_grid(image, grids, side)
    height, width = fitted(image, (rows * side, columns * side))
    canvas = Image.new("RGB", (columns * side, rows * side))
    inside = ((canvas.width - width) // 2, (canvas.height - height) // 2)
    canvas.paste(picture.resize((width, height), resample), inside)
    tiles = np.asarray(canvas).reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    return np.concatenate([np.asarray(picture.resize((side, side), resample))[None], tiles])
