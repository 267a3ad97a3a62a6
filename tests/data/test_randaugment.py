"""Each operation against what PIL's documentation and the papers' tables say, on distinguishable pixels."""

import math

import numpy as np
import pytest
from PIL import Image

from mmjax.data.pipeline import Pipeline
from mmjax.data.randaugment import (
    BLACK,
    GREY,
    RandAugment,
    TrivialAugmentWide,
    cutout,
    posterize,
    randaugment_space,
    rotate,
    shear,
    solarize,
    solarize_add,
    translate,
    trivial_augment_space,
)
from mmjax.data.sources import ArraySource
from mmjax.errors import MmjaxError

NOISE = np.random.default_rng(3).integers(0, 256, (61, 83, 3), np.uint8)
PICTURE = Image.fromarray(NOISE)
NAMES = [
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness"),
    *("Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd"),
]


def applied(level, name, seed=0, picture=PICTURE):
    return np.asarray(randaugment_space(level)[name](picture, np.random.default_rng(seed)))


class Always:
    """A generator whose uniforms are constant and whose integers are the middle of the range."""

    def __init__(self, positive=True):
        self.positive = positive

    def random(self):
        return 0.0 if self.positive else 0.9

    def integers(self, high):
        return high // 2


def test_translation_moves_whole_pixels_and_fills():
    got = np.asarray(translate(PICTURE, 5, -7, GREY))
    np.testing.assert_array_equal(got[7:, :-5], NOISE[:-7, 5:])
    assert (got[:7] == 128).all() and (got[:, -5:] == 128).all()


def test_shear_moves_each_row_by_its_height():
    got = np.asarray(shear(PICTURE, 0.5, 0, BLACK))
    for row in (0, 1, 2, 10, 60):
        shift = math.floor((row + 0.5) * 0.5 + 0.5)
        np.testing.assert_array_equal(got[row, : 83 - shift], NOISE[row, shift:])
        assert (got[row, 83 - shift :] == 0).all()
    np.testing.assert_array_equal(
        np.asarray(shear(PICTURE, 0, 0.5, BLACK)),
        np.asarray(shear(PICTURE.transpose(Image.Transpose.TRANSPOSE), 0.5, 0, BLACK)).transpose(1, 0, 2),
    )


def test_rotation_is_counter_clockwise_about_the_centre():
    square = Image.fromarray(NOISE[:, :61])
    np.testing.assert_array_equal(np.asarray(rotate(square, 90, GREY)), np.rot90(NOISE[:, :61]))
    assert (np.asarray(rotate(square, 45, GREY))[0, 0] == 128).all()


def test_value_tables_by_hand():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2))
    values = np.arange(256).reshape(16, 16, 1).repeat(3, 2)
    np.testing.assert_array_equal(posterize(ramp, 3), values // 32 * 32)
    assert not np.any(np.asarray(posterize(ramp, 0))) and np.array_equal(posterize(ramp, 8), values)
    np.testing.assert_array_equal(solarize(ramp, 100), np.where(values < 100, values, 255 - values))
    np.testing.assert_array_equal(solarize(ramp, 384), values)
    np.testing.assert_array_equal(solarize_add(ramp, 110), np.where(values < 128, values + 110, values))
    np.testing.assert_array_equal(
        solarize_add(ramp, 165), np.where(values < 128, np.minimum(values + 165, 255), values)
    )


def test_cutout_is_cut_off_at_the_border():
    got = np.asarray(cutout(PICTURE, 5, (2, 30), GREY))
    assert (got[25:35, :7] == 128).all()
    np.testing.assert_array_equal(got[:, 7:], NOISE[:, 7:])
    np.testing.assert_array_equal(got[:25], NOISE[:25])
    np.testing.assert_array_equal(np.asarray(cutout(PICTURE, 0, (2, 30), GREY)), NOISE)


def test_magnitudes_are_those_of_the_table():
    """Level 10 is AutoAugment's strongest; above it the scale continues; level 0 is not the identity."""
    assert list(randaugment_space(10)) == NAMES
    space = {level: randaugment_space(level) for level in (0, 10, 15, 20)}
    up, down = Always(), Always(False)
    for level, degrees in ((10, 30), (15, 45), (20, 60)):
        np.testing.assert_array_equal(space[level]["Rotate"](PICTURE, up), rotate(PICTURE, degrees, GREY))
        np.testing.assert_array_equal(space[level]["Rotate"](PICTURE, down), rotate(PICTURE, -degrees, GREY))
    np.testing.assert_array_equal(space[15]["TranslateX"](PICTURE, down), translate(PICTURE, -150, 0, GREY))
    np.testing.assert_array_equal(space[20]["ShearY"](PICTURE, up), shear(PICTURE, 0, 0.6, GREY))
    np.testing.assert_array_equal(space[15]["Posterize"](PICTURE, up), posterize(PICTURE, 6))
    np.testing.assert_array_equal(space[10]["Cutout"](PICTURE, up), cutout(PICTURE, 40, (41, 30), GREY))
    # Brightness at 0, 10 and 15 multiplies by 0.1, 1.9 and 2.8.
    for level, factor in ((0, 0.1), (10, 1.9), (15, 2.8)):
        expected = np.clip(NOISE.astype(np.float64) * factor, 0, 255)
        assert np.abs(np.asarray(space[level]["Brightness"](PICTURE, up)) - expected).max() <= 1
    assert not np.any(applied(0, "Posterize"))
    np.testing.assert_array_equal(applied(0, "Solarize"), 255 - NOISE)
    np.testing.assert_array_equal(applied(10, "Invert"), 255 - NOISE)
    np.testing.assert_array_equal(applied(0, "TranslateX"), NOISE)


def test_contrast_and_colour_blend_with_the_mean_and_the_grey():
    grey, picture = np.asarray(PICTURE.convert("L"), np.float64), NOISE.astype(np.float64)
    mean = int(grey.mean() + 0.5)
    assert np.abs(applied(5, "Contrast") - (mean + 1.0 * (picture - mean))).max() <= 1  # level 5: factor 1
    expected = np.clip(mean + 1.9 * (picture - mean), 0, 255)
    assert np.abs(applied(10, "Contrast") - expected).max() <= 1
    expected = np.clip(grey[..., None] + 0.1 * (picture - grey[..., None]), 0, 255)
    assert np.abs(applied(0, "Color") - expected).max() <= 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", [0, 10, 15, 20])
def test_every_operation_keeps_form_and_its_input(name, level):
    before = np.asarray(PICTURE).copy()
    got = applied(level, name, seed=level)
    assert got.shape == NOISE.shape and got.dtype == np.uint8
    np.testing.assert_array_equal(PICTURE, before)


def test_all_operations_are_drawn_equally_often():
    narrow = NOISE // 2 + 20  # full-range noise would leave AutoContrast nothing to do
    source, picture = {"image": narrow}, Image.fromarray(narrow)
    one = RandAugment(1, 10)
    outcomes = {
        applied(10, name, 0, picture).tobytes(): name for name in ("AutoContrast", "Equalize", "Invert", "Posterize")
    }
    counts = dict.fromkeys(outcomes.values(), 0)
    draws = 1600
    for seed in range(draws):
        got = one.random_map(source, np.random.default_rng(seed))["image"].tobytes()
        if got in outcomes:
            counts[outcomes[got]] += 1
    expected, spread = draws / 16, 4 * math.sqrt(draws / 16 * 15 / 16)
    assert all(abs(count - expected) < spread for count in counts.values()), counts


def test_trivial_augment_follows_its_table():
    np.testing.assert_array_equal(trivial_augment_space(1.0, -1.0)["Rotate"](PICTURE), rotate(PICTURE, -135, BLACK))
    # Moved right by 32: what is at column 32 was at column 0.
    moved = np.asarray(trivial_augment_space(1.0, 1.0)["TranslateX"](PICTURE))
    np.testing.assert_array_equal(moved[:, 32:], NOISE[:, :-32])
    assert not moved[:, :32].any()
    np.testing.assert_array_equal(trivial_augment_space(1.0, 1.0)["Posterize"](PICTURE), NOISE & 0b11000000)
    np.testing.assert_array_equal(trivial_augment_space(0.5, 1.0)["Posterize"](PICTURE), NOISE & 0b11111000)
    np.testing.assert_array_equal(trivial_augment_space(1.0, 1.0)["Solarize"](PICTURE), 255 - NOISE)
    for name, operation in trivial_augment_space(0.0, 1.0).items():
        if name not in ("AutoContrast", "Equalize", "Solarize"):
            np.testing.assert_array_equal(np.asarray(operation(PICTURE)), NOISE, err_msg=name)
    assert len(trivial_augment_space(0.3, -1.0)) == 14


def test_a_pipeline_repeats_its_draws():
    source = ArraySource(image=np.stack([NOISE] * 6), label=np.arange(6))
    pipeline = Pipeline(source, 3, seed=5, transforms=(RandAugment(2, 15), TrivialAugmentWide()))
    one, two = iter(pipeline), iter(pipeline)
    first = next(one)["image"]
    np.testing.assert_array_equal(first, next(two)["image"])
    assert not np.array_equal(first[0], first[1])  # every record is sampled independently


@pytest.mark.parametrize("arguments", [(0, 10), (2, -1), (2, 31)])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(MmjaxError, match="RandAugment"):
        RandAugment(*arguments)
