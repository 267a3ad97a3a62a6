"""Padding to squares and tiles of any resolution, as in LLaVA, bit-exact against transformers."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from mmjax.data.preprocess import ImagePreprocessing, from_hf
from mmjax.data.tiles import best_grid, fitted, unpadded
from mmjax.errors import MmjaxError

SIZES = [(14, 28), (28, 14), (11, 33), (35, 12), (28, 28), (9, 8), (61, 43)]
"""(height, width): 1:2, 2:1, 1:3, 3:1, a square, smaller than a tile, much larger."""
PAD, TILES = ImagePreprocessing.llava(14), ImagePreprocessing.llava_tiles(14)


def picture(height: int, width: int) -> np.ndarray:
    """No two corners alike."""
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    return np.uint8(255 * np.stack([rows, columns, (rows * 7 + columns * 3) % 1], -1))


def test_a_square_is_padded_with_the_mean_on_both_sides():
    image = picture(10, 14)
    pixels = dataclasses.replace(PAD, resize=None, crop=None).to_uint8(image)
    assert pixels.shape == (14, 14, 3)
    np.testing.assert_array_equal(pixels[2:12], image)
    assert (pixels[[0, 1, 12, 13]] == [122, 116, 104]).all()


@pytest.mark.parametrize(
    "size, grid", [((14, 28), (1, 2)), ((28, 14), (2, 1)), ((11, 33), (1, 3)), ((36, 12), (3, 1)), ((61, 43), (2, 2))]
)
def test_the_grid_that_shows_most(size, grid):
    assert best_grid(size, TILES.grids, 14) == grid


def test_tiles_are_the_image_row_by_row_with_the_whole_before_them():
    image = picture(28, 14)
    tiles = TILES.to_uint8(image)
    np.testing.assert_array_equal(np.concatenate(tiles[1:]), image)
    np.testing.assert_array_equal(
        tiles[0], np.asarray(Image.fromarray(image).resize((14, 14), Image.Resampling.BICUBIC))
    )
    batch = TILES([image, picture(28, 28)])
    assert batch.shape == (2, 5, 14, 14, 3) and not batch[0, 3:].any() and batch[1].any((1, 2, 3)).all()
    np.testing.assert_array_equal(TILES.image_sizes([image, picture(9, 8)]), [[28, 14], [9, 8]])


def test_what_is_no_border_is_cut_out_again():
    image = picture(10, 28)
    tiles = TILES.to_uint8(image)
    assert fitted((10, 28), (14, 28)) == (10, 28)
    rows, columns = unpadded((10, 28), (14, 28))
    np.testing.assert_array_equal(np.concatenate(tiles[1:], 1)[rows, columns], image)


def test_tiles_are_whole_squares():
    with pytest.raises(MmjaxError, match="tiles are squares"):
        ImagePreprocessing(256, (224, 224), grids=((1, 2),))
    with pytest.raises(MmjaxError, match="not whole tiles of 14 x 14"):
        from_hf(TILES.to_hf() | {"image_grid_pinpoints": [[14, 30]]})


@pytest.mark.parametrize("preprocess", [PAD, TILES], ids=["pad", "tiles"])
def test_it_is_written_and_read(preprocess):
    as_read = dataclasses.replace(preprocess, crop_rounding="floor")
    assert from_hf(json.loads(json.dumps(preprocess.to_hf()))) == as_read
    assert ImagePreprocessing.from_json(preprocess.to_json()) == preprocess


@pytest.mark.torch
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preprocess", [PAD, TILES], ids=["pad", "tiles"])
def test_pixels_are_transformers(preprocess, size, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = {"pad": "LlavaImageProcessor", "tiles": "LlavaNextImageProcessor"}["tiles" if preprocess.grids else "pad"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocess.to_hf()))
    pil = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    processor = pil.from_pretrained(tmp_path)
    image = picture(*size)
    expected = processor(Image.fromarray(image), return_tensors="np")
    np.testing.assert_allclose(preprocess(image), np.moveaxis(expected["pixel_values"], -3, -1), atol=1e-6)
    if preprocess.grids:
        np.testing.assert_array_equal(preprocess.image_sizes(image), expected["image_sizes"])


@pytest.mark.torch
@pytest.mark.parametrize("size", SIZES)
def test_unpadding_is_transformers(size):
    torch = pytest.importorskip("torch")
    model = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")
    grid = best_grid(size, TILES.grids, 14)
    area = (6 * grid[0], 6 * grid[1])
    features = torch.arange(area[0] * area[1]).reshape(1, *area)
    rows, columns = unpadded(size, area)
    np.testing.assert_array_equal(features[0].numpy()[rows, columns], model.unpad_image(features, size)[0].numpy())
