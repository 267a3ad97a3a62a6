"""Which features an image has in a prompt, as rows of the table of all features (LLaVA 1.6: any resolution).

Sources: llava_arch.py, prepare_inputs_labels_for_multimodal, and transformers' LlavaNextModel.pack_image_features. All
is integer arithmetic. The tiles themselves, and where an image is within them: `mmjax.data.tiles`. Generation and
training use the same functions here.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from mmjax.data.tiles import Size, best_grid, unpadded
from mmjax.errors import MmjaxError
from mmjax.models.vision_language.network import VisionLanguageConfig

Rows = Int[np.ndarray, "l"]
"""The rows of one image, in the order of the prompt."""


def tile_count(image: Size, grids: tuple[Size, ...], side: int) -> int:
    """The number of pictures that an image becomes: the whole, and the tiles of its grid."""
    rows, columns = best_grid(image, grids, side)
    return 1 + rows * columns


def spatial_rows(first: int, image: Size, grid: Size | None, patches: Size, newline: int | None) -> Rows:
    """The whole picture's features, then those of its tiles as one image, row of patches by row of patches.

    first: the row of the whole picture's first feature; the features of the tiles follow in order.
    image: (height, width) of the image before preprocessing. grid: (rows, columns) of its tiles; None: it has none.
    patches: (rows, columns) of a picture's features.
    newline: the row of the feature that ends each row of patches, where the border is left out; None: neither.

    >>> spatial_rows(0, (10, 40), (1, 2), (2, 2), newline=12).tolist()  # 4 of the whole, the first 4 of 2 x 4, newlines
    [0, 1, 2, 3, 4, 5, 8, 9, 12, 6, 7, 10, 11, 12]
    """
    whole = np.arange(first, first + patches[0] * patches[1])
    if grid is None:
        return np.asarray(np.append(whole, [] if newline is None else newline), np.int32)
    (rows, columns), (height, width) = grid, patches
    tiles = whole[-1] + 1 + np.arange(rows * columns * height * width).reshape(rows, columns, height, width)
    tiles = tiles.swapaxes(1, 2).reshape(rows * height, columns * width)
    if newline is not None:
        inside = tiles[unpadded(image, (rows * height, columns * width))]
        tiles = np.pad(inside, ((0, 0), (0, 1)), constant_values=newline)
    return np.concatenate([whole, tiles.reshape(-1)]).astype(np.int32)


def picture_counts(config: VisionLanguageConfig, images: Sequence[Size]) -> list[int]:
    """The number of pictures of each image. images: (height, width) before preprocessing."""
    side = config.vision.image_size[0]
    return [tile_count(image, config.grids, side) if config.grids else 1 for image in images]


def feature_rows(config: VisionLanguageConfig, images: Sequence[Size], newline: int | None = None) -> list[Rows]:
    """The rows of each image, whose pictures follow one another in the table from row 0.

    images: (height, width) before preprocessing. newline: its row; None: the first after those of the images.
    """
    starts = np.cumsum([0, *picture_counts(config, images)]) * config.tile_tokens
    if not config.grids or config.merge == "flat":
        return [np.arange(start, end, dtype=np.int32) for start, end in itertools.pairwise(starts)]
    newline = (int(starts[-1]) if newline is None else newline) if config.newline else None
    side, patches = config.vision.image_size[0], config.vision.grid
    return [
        spatial_rows(int(start), image, best_grid(image, config.grids, side), patches, newline)
        for start, image in zip(starts, images)
    ]


def split_pictures(config: VisionLanguageConfig, pixels: Any, image_sizes: Any = None) -> tuple[Any, list[Rows]]:
    """(pictures [n, h, w, 3], the rows of each image) of `pixel_values` and `image_sizes` as of `forward`.

    Without tiles an image may be several pictures [images, pictures, ...]. Tiles may be padded, [images, tiles, ...],
    or those of all images one after the other [n, ...].
    Raises MmjaxError for tiles without image_sizes, or another number of them than the sizes have.
    """
    if not config.grids:
        counts = [1 if pixels.ndim == 4 else pixels.shape[1]] * len(pixels)
        ends = np.cumsum([0, *counts]) * config.tile_tokens
        rows = [np.arange(start, end, dtype=np.int32) for start, end in itertools.pairwise(ends)]
        return pixels.reshape(-1, *pixels.shape[-3:]), rows
    if image_sizes is None:
        raise MmjaxError("image_sizes [images, 2]: the grid of tiles follows from the height and width of an image")
    sizes = as_sizes(image_sizes)
    counts = picture_counts(config, sizes)
    few = [n for n in counts if pixels.ndim == 5 and n > pixels.shape[1]]
    if few or (len(sizes) != len(pixels) if pixels.ndim == 5 else sum(counts) != len(pixels)):
        raise MmjaxError(f"image_sizes {sizes} have {counts} tiles, pixel_values {list(pixels.shape)}")
    if pixels.ndim == 5:
        pixels = jnp.concatenate([tiles[:n] for tiles, n in zip(pixels, counts)])
    return pixels, feature_rows(config, sizes)


def as_sizes(image_sizes: Any) -> list[Size]:
    """int [images, 2] -> (height, width) of each image."""
    return [(int(height), int(width)) for height, width in np.asarray(image_sizes)]
