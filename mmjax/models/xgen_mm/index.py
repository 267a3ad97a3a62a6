"""Which tokens of the tower the resampler takes as those of each picture, and which of them show padding.

Sources: open_flamingo's src/vlm.py, VLMWithLanguageStream._encode_vision_x_anyres, and train/any_res_data_utils.py. All
is integer arithmetic on the host.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from mmjax.data.tiles import Size, best_grid
from mmjax.models.vision_language.network import VisionLanguageConfig

Order = tuple[Int[np.ndarray, "n p"], Bool[np.ndarray, "n p"]]


def picture_tokens(config: VisionLanguageConfig, images: Sequence[Size]) -> Order:
    """(token_index, token_mask) of the pictures of all images, as `VisionLanguage.encode_image` takes them.

    images: (height, width) before preprocessing.
    """
    patches, first = config.vision.grid, 0
    orders: list[Order] = []
    for image in images:
        index, mask = token_order(image, best_grid(image, config.grids, config.vision.image_size[0]), patches)
        orders.append((index + first, mask))
        first += index.size
    if not orders:
        none = np.zeros((0, patches[0] * patches[1]))
        return none.astype(np.int32), none.astype(bool)
    return np.concatenate([index for index, _ in orders]), np.concatenate([mask for _, mask in orders])


def token_order(image: Size, grid: Size, patches: Size) -> Order:
    """The same of one image, whose pictures are the whole and then its tiles: [1 + rows * columns, p].

    The original joins the tokens of all tiles to one map and views it as tiles again, without undoing the permutation:
    where tiles are side by side, the resampler takes a run of the map's rows, a band of the image, as one tile.

    image: (height, width) before preprocessing. grid: (rows, columns) of tiles. patches: those of a picture.

    >>> index, mask = token_order((10, 40), (1, 2), (2, 2))  # the map's first row is 4 5 8 9, and so the first band
    >>> index.tolist(), mask.tolist()[1:]
    ([[0, 1, 2, 3], [4, 5, 8, 9], [6, 7, 10, 11]], [[True, True, True, True], [True, True, True, True]])
    """
    (rows, columns), (height, width) = grid, patches
    p = height * width
    tiles = p + np.arange(rows * columns * p).reshape(rows, columns, height, width)
    joined = tiles.swapaxes(1, 2).reshape(rows * columns, p)
    mask = content(image, (rows * height, columns * width)).reshape(rows * columns, p)
    whole = np.arange(p)[None]
    return (
        np.concatenate([whole, joined]).astype(np.int32),
        np.concatenate([np.ones((1, p), bool), mask]),
    )


def content(image: Size, area: Size) -> Bool[np.ndarray, "height width"]:
    """Whether each position of an area of tokens shows the image, not the border beside it.

    Lengths are truncated, while those of the pixels were rounded up: the border may be one position too wide.
    """
    (height, width), (down, across) = image, area
    mask = np.zeros(area, bool)
    if width / height > across / down:
        border = (down - int(height * (across / width))) // 2
        mask[border : down - border] = True
    else:
        border = (across - int(width * (down / height))) // 2
        mask[:, border : across - border] = True
    return mask
