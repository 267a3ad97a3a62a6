"""Which features an image has in a prompt, as rows of the table of all features (LLaVA 1.6: any resolution).

Sources: llava_arch.py, prepare_inputs_labels_for_multimodal, and transformers' LlavaNextModel.pack_image_features. All
is integer arithmetic. The tiles themselves, and where an image is within them: `mmjax.data.tiles`.
"""

import numpy as np
from jaxtyping import Int

from mmjax.data.tiles import Size, best_grid, unpadded

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
