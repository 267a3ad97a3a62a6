"""The inputs of `forward`: names, ranks, dtypes and lengths, with each full error message."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.interface.inputs import IMAGES_AND_TEXTS, PIXELS, TEXTS, Input, check_inputs

TILES = {"pixel_values": Input("images tiles height width 3", "float", required=True), **TEXTS}
IDS, IMAGE = np.zeros((2, 5), np.int32), np.zeros((3, 7, 7, 3), np.float32)


def test_declared_inputs_pass_as_arrays_and_none_is_left_out():
    arrays = check_inputs(IMAGES_AND_TEXTS, {"pixel_values": IMAGE, "input_ids": IDS, "attention_mask": None}, "clip")
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
        "pixel_values": ((3, 7, 7, 3), jnp.float32),
        "input_ids": ((2, 5), jnp.int32),
    }
    mask = check_inputs(TEXTS, {"input_ids": IDS, "attention_mask": IDS == 0}, "bert")["attention_mask"]
    assert mask.dtype == bool


def test_a_system_may_take_tiles_of_several_images():
    tiles = np.zeros((2, 4, 7, 7, 3), np.float32)
    assert check_inputs(TILES, {"pixel_values": tiles, "input_ids": IDS}, "llava")["pixel_values"].shape == tiles.shape
    with pytest.raises(MmjaxError, match=r"floats \[images, tiles, height, width, 3\], not float32 \[3, 7, 7, 3\]"):
        check_inputs(TILES, {"pixel_values": IMAGE, "input_ids": IDS}, "llava")


@pytest.mark.parametrize(
    ("declared", "values", "message"),
    [
        (
            PIXELS,
            {"input_ids": IDS},
            r"of x: it does not take input_ids. It takes pixel_values \(floats \[b, height, width, 3\], required\)",
        ),
        (
            TEXTS,
            {"attention_mask": IDS},
            r"it needs input_ids. It takes input_ids \(ints \[b, l\], required\), attention",
        ),
        (IMAGES_AND_TEXTS, {}, "it needs one of pixel_values, input_ids, attention_mask"),
        (
            PIXELS,
            {"pixel_values": IMAGE.astype(np.uint8)},
            r"not uint8 \[3, 7, 7, 3\]; preprocess\(images\) makes them",
        ),
        (PIXELS, {"pixel_values": IMAGE[..., :2]}, r"\[b, height, width, 3\], not float32 \[3, 7, 7, 2\]"),
        (TEXTS, {"input_ids": IDS.astype(np.float32)}, r"input_ids should be ints \[b, l\], not float32 \[2, 5\]"),
        (TEXTS, {"input_ids": IDS[0]}, r"input_ids should be ints \[b, l\], not int32 \[5\]"),
        (
            TEXTS,
            {"input_ids": IDS, "attention_mask": IDS[:, :4]},
            r"attention_mask \[2, 4\]: its axis l is 5 long in input_ids",
        ),
    ],
)
def test_wrong_inputs_are_one_clear_error(declared, values, message):
    with pytest.raises(MmjaxError, match=message):
        check_inputs(declared, values, "x")
