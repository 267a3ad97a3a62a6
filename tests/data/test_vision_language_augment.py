"""ALBEF's and BLIP's RandAugment, against OpenCV where it is installed and against its recorded outputs.

Largest differences, at six magnitudes both ways on three sizes of noise: from OpenCV 4.10.0 and 4.14.0 none in any
operation, and none from the pixels recorded of 4.5.5. From 5.0.0 none in Sharpness and whole translations, 4 in others,
5 in shears and 7 in rotations, because OpenCV 5 no longer rounds coordinates to 1/32 of a pixel.
"""

import math
import zlib

import numpy as np
import pytest

from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource
from mmjax.data.vision_language_augment import (
    VisionLanguageRandAugment,
    autocontrast,
    brightness,
    equalize,
    rotate,
    sharpness,
    shear,
    translate,
    vision_language_space,
    warp,
)
from mmjax.errors import MmjaxError

NOISE = np.random.default_rng(3).integers(0, 256, (61, 83, 3), np.uint8)
DULL = (NOISE // 2 + 20).astype(np.uint8)
"""Neither black nor white in it."""
SMALL = (np.arange(5 * 7 * 3).reshape(5, 7, 3) * 37 % 256).astype(np.uint8)
NAMES = ["Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness"]
NAMES += ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"]


# ------------------------------------------------------------------------------------------------------- operations


def by_opencv(cv2, image, matrix):
    return cv2.warpAffine(image, matrix, image.shape[1::-1], borderValue=(128, 128, 128), flags=cv2.INTER_LINEAR)


@pytest.mark.parametrize("magnitude", [1, 3.3, 5, 7, 9, 10])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_geometry_is_opencvs(magnitude, sign):
    cv2 = pytest.importorskip("cv2")
    share, space = magnitude / 10, vision_language_space(magnitude)
    for height, width in ((61, 83), (128, 128), (200, 97)):
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
        expected = {
            "ShearX": np.float32([[1, sign * 0.3 * share, 0], [0, 1, 0]]),
            "ShearY": np.float32([[1, 0, 0], [sign * 0.3 * share, 1, 0]]),
            "TranslateX": np.float32([[1, 0, sign * 10 * share], [0, 1, 0]]),
            "TranslateY": np.float32([[1, 0, 0], [0, 1, sign * 10 * share]]),
            "Rotate": cv2.getRotationMatrix2D((width / 2, height / 2), sign * 30 * share, 1),
        }
        for name, matrix in expected.items():
            difference = np.abs(space[name](image, sign).astype(int) - by_opencv(cv2, image, matrix))
            # OpenCV 5 differs by up to 1/64 of a pixel along an axis, times 255, and a rounding.
            limit = 0 if int(cv2.__version__[0]) < 5 else 9 if name == "Rotate" else 5
            assert difference.max() <= limit, name


@pytest.mark.parametrize("factor", [0.1, 0.64, 1.0, 1.36, 1.9])
def test_sharpness_is_opencvs_filter(factor):
    cv2 = pytest.importorskip("cv2")
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = cv2.filter2D(NOISE, -1, kernel / 13).astype(np.float32)
    expected = NOISE.astype(np.float32)
    expected[1:-1, 1:-1] = (smooth + factor * (expected - smooth))[1:-1, 1:-1]
    np.testing.assert_array_equal(sharpness(NOISE, factor), np.clip(expected, 0, 255).astype(np.uint8))


RECORDED = {
    "ShearX": 1437002756,
    "ShearY": 3130213472,
    "TranslateX": 3231023938,
    "TranslateY": 3235674599,
    "Rotate": 3962073004,
}
SMALL_ROTATED = [
    [128, 152, 96, 181, 64, 136, 138],
    [93, 193, 136, 148, 127, 106, 156],
    [52, 159, 195, 118, 185, 76, 180],
    [22, 130, 234, 125, 192, 115, 151],
    [56, 96, 150, 91, 158, 151, 125],
]
SMALL_SHEARED = [
    [37, 148, 3, 114, 225, 80, 191],
    [63, 134, 29, 140, 211, 106, 189],
    [90, 121, 56, 167, 198, 133, 184],
    [113, 112, 79, 190, 189, 156, 179],
    [139, 98, 105, 64, 71, 182, 168],
]


def test_geometry_is_what_opencv_once_gave():
    """CRC-32 of the pixels of OpenCV 4.5.5, and of a small picture the pixels themselves."""
    checksums = {name: zlib.crc32(vision_language_space(7)[name](NOISE, 1.0).tobytes()) for name in RECORDED}
    assert checksums == RECORDED
    np.testing.assert_array_equal(rotate(SMALL, 21)[..., 0], SMALL_ROTATED)
    np.testing.assert_array_equal(shear(SMALL, -0.15, 0)[..., 1], SMALL_SHEARED)


def slow_warp(image, matrix):
    """Bilinear at the exact coordinates, pixel by pixel."""
    height, width = image.shape[:2]
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    expected = np.empty(image.shape)
    for row in range(height):
        for column in range(width):
            x, y, _ = back @ (column, row, 1)
            expected[row, column] = 0
            for left in (math.floor(x), math.floor(x) + 1):
                for top in (math.floor(y), math.floor(y) + 1):
                    inside = 0 <= left < width and 0 <= top < height
                    weight = (1 - abs(x - left)) * (1 - abs(y - top))
                    expected[row, column] += weight * (image[top, left] if inside else 128)
    return expected


def test_warping_is_bilinear_up_to_the_rounding_of_coordinates():
    matrix = np.array([[0.9, 0.3, -4.7], [-0.2, 1.1, 3.3]])
    off = warp(NOISE, matrix) - slow_warp(NOISE, matrix)
    # Places are off by at most 1/64 of a pixel, and 1/1024 more, along either axis, of slope 255 at most.
    assert np.abs(off).max() < 0.5 + 2 * 255 * (1 / 64 + 1 / 1024)
    assert np.abs(off).mean() < 1 and abs(off.mean()) < 4 * off.std() / math.sqrt(61 * 83)


def test_whole_pixels_move_whole_and_grey_comes_in():
    got = translate(NOISE, 5, -7)
    np.testing.assert_array_equal(got[:-7, 5:], NOISE[7:, :-5])
    assert (got[-7:] == 128).all() and (got[:, :5] == 128).all()
    half = translate(NOISE, 0.5, 0).astype(int)
    wide = np.pad(NOISE.astype(int), ((0, 0), (1, 0), (0, 0)), constant_values=128)
    np.testing.assert_array_equal(half, (wide[:, :-1] + wide[:, 1:] + 1) // 2)
    assert (translate(NOISE, 1000, 0) == 128).all()


def test_shears_move_rows_by_their_height_and_rotation_turns_against_the_clock():
    got = shear(NOISE, 0.25, 0)
    for row in (0, 4, 8, 60):
        shift = row // 4
        np.testing.assert_array_equal(got[row, shift:], NOISE[row, : 83 - shift])
        assert (got[row, :shift] == 128).all()
    turned = shear(np.ascontiguousarray(NOISE.transpose(1, 0, 2)), 0, 0.25)
    np.testing.assert_array_equal(turned, got.transpose(1, 0, 2))
    square = np.ascontiguousarray(NOISE[:60, :60])
    # The centre of rotation is (30, 30) from the middle of the first pixel: one row is filled from outside.
    np.testing.assert_array_equal(rotate(square, 90)[1:], np.rot90(square)[:-1])
    assert (rotate(square, 90)[0] == 128).all()
    for operation in (lambda image: shear(image, 0, 0), lambda image: rotate(image, 0)):
        np.testing.assert_array_equal(operation(NOISE), NOISE)


def test_contrast_is_stretched_where_the_originals_whiten():
    """The original subtracts `low` in eight bits: -20 is 236 there, and no channel keeps a value below 255."""
    low, high = 20, 147
    assert DULL.min() == low and DULL.max() == high
    scale = 255 / (high - low)
    original = np.clip(np.arange(256) * scale + np.uint8(256 - low) * scale, 0, 255)[DULL]
    assert original.min() == 255
    expected = np.clip(np.arange(256) * scale - low * scale, 0, 255).astype(np.uint8)[DULL]
    np.testing.assert_array_equal(autocontrast(DULL), expected)
    assert autocontrast(DULL).min() == 0 and autocontrast(DULL).max() == 255
    flat = np.full((5, 7, 3), 9, np.uint8)
    np.testing.assert_array_equal(autocontrast(flat), flat)
    np.testing.assert_array_equal(autocontrast(NOISE), NOISE)  # already from 0 to 255


@pytest.mark.parametrize("image", [NOISE, DULL, SMALL, np.full((5, 7, 3), 9, np.uint8), NOISE // 128 * 255])
def test_equalize_is_the_formula(image):
    expected = np.empty_like(image)
    for channel in range(3):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        step = int(counts[counts > 0][:-1].sum()) // 255
        table = np.arange(256)
        if step:
            table = np.clip((step // 2 + np.concatenate([[0], np.cumsum(counts[:-1])])) // step, 0, 255)
        expected[..., channel] = table[image[..., channel]]
    np.testing.assert_array_equal(equalize(image), expected)


def test_brightness_truncates():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    got = brightness(ramp, 1.36)[..., 0].ravel()
    assert got.tolist() == [min(value * 136 // 100, 255) for value in range(256)]


def test_what_is_sharpened_past_white_or_black_is_clipped():
    """By hand: smooth = (8 neighbours + 5 times the middle) / 13, rounded; then smooth + 1.36 (middle - smooth)."""
    image = np.full((4, 4, 3), 200, np.uint8)
    image[1, 1] = 255
    image[2, 2] = 0
    got = sharpness(image, 1.36)[..., 0]
    smooth = round((7 * 200 + 0 + 5 * 255) / 13)
    assert smooth + 1.36 * (255 - smooth) > 256 and got[1, 1] == 255  # the original casts 272 to 16
    assert got[2, 2] == 0
    beside = round((6 * 200 + 255 + 0 + 5 * 200) / 13)
    assert got[1, 2] == int(beside + 1.36 * (200 - beside))
    np.testing.assert_array_equal(got[[0, 3]], image[[0, 3], :, 0])


# ---------------------------------------------------------------------------------------------------- RandAugment


def test_the_space_at_albefs_and_blips_magnitudes():
    seven, five = vision_language_space(7), vision_language_space(5)
    assert list(seven) == NAMES
    for sign in (1.0, -1.0):
        expected = {
            "Brightness": brightness(NOISE, 1.36),
            "Sharpness": sharpness(NOISE, 1.36),
            "ShearX": shear(NOISE, sign * 0.21, 0),
            "ShearY": shear(NOISE, 0, sign * 0.21),
            "TranslateX": translate(NOISE, sign * 7, 0),
            "TranslateY": translate(NOISE, 0, sign * 7),
            "Rotate": rotate(NOISE, sign * 21),
        }
        for name, image in expected.items():
            np.testing.assert_array_equal(seven[name](NOISE, sign), image, err_msg=name)
        for name in ("Identity", "Brightness", "Sharpness"):
            np.testing.assert_array_equal(five[name](NOISE, sign), NOISE, err_msg=name)
        np.testing.assert_array_equal(five["Rotate"](NOISE, sign), rotate(NOISE, sign * 15))
    before = DULL.copy()
    for name, operation in seven.items():
        got = operation(DULL, 1.0)
        assert got.shape == DULL.shape and got.dtype == np.uint8, name
        assert np.array_equal(got, DULL) == (name == "Identity")
    np.testing.assert_array_equal(DULL, before)


def test_each_operation_is_drawn_a_tenth_of_the_time_and_applied_half_of_it():
    image = np.ascontiguousarray(DULL[:16, :16])
    space = vision_language_space(7)
    outcomes = {space[name](image, sign).tobytes(): name for name in NAMES for sign in (1.0, -1.0)}
    assert len(outcomes) == 15  # five go both ways
    counts = dict.fromkeys(NAMES, 0)
    draws = 2000
    one = VisionLanguageRandAugment(7, layers=1)
    for seed in range(draws):
        counts[outcomes[one.random_map({"image": image}, np.random.default_rng(seed))["image"].tobytes()]] += 1
    shares = {name: 0.55 if name == "Identity" else 0.05 for name in NAMES}
    chi_square = sum((counts[name] - draws * share) ** 2 / (draws * share) for name, share in shares.items())
    assert chi_square < 27.9, counts  # one in a thousand, at nine degrees of freedom


def test_two_layers_draw_with_replacement_and_a_pipeline_repeats_them():
    two = VisionLanguageRandAugment(7)
    image = np.ascontiguousarray(DULL[:16, :16])
    twice = vision_language_space(7)["TranslateX"]
    expected = twice(twice(image, 1.0), 1.0)
    sampled = (two.random_map({"image": image}, np.random.default_rng(seed))["image"] for seed in range(4000))
    assert any(np.array_equal(got, expected) for got in sampled)
    source = ArraySource(image=np.stack([image] * 6), label=np.arange(6))
    pipeline = Pipeline(source, 6, seed=5, transforms=(two,))
    first, again = next(iter(pipeline)), next(iter(pipeline))
    np.testing.assert_array_equal(first["image"], again["image"])
    assert len({row.tobytes() for row in first["image"]}) > 2  # every record is sampled independently


@pytest.mark.parametrize("arguments", [(11,), (-1,), (7, 0)])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(MmjaxError, match="VisionLanguageRandAugment"):
        VisionLanguageRandAugment(*arguments)
