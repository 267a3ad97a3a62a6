"""Device-side views: each operation against PIL or plain formulas, the draws by counting, the same bits anywhere."""

import collections
import colorsys
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmjax.errors import MmjaxError
from mmjax.training import augment_color as color
from mmjax.training.augment import View, gaussian_blur, one_view, random_box, resized_crop, to_unit, two_views

HEIGHT, WIDTH = 23, 31
UNIT = 1 / 255


def pixels(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def unit_image(seed: int = 0) -> np.ndarray:
    return pixels(seed).astype(np.float32) / 255


def luma(image: np.ndarray) -> np.ndarray:
    return image @ np.array([0.299, 0.587, 0.114])


def within(count: int, n: int, p: float) -> bool:
    """Five standard deviations of a binomial: a right implementation fails once in a million."""
    return abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


# ------------------------------------------------------------------------------------------------------ operations


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", [(0, 0, 23, 31), (3, 5, 17, 13), (11, 2, 5, 7)])
def test_crop_is_pils_resize(filter, box):
    top, left, height, width = box
    # Bicubic between 64 and 191: it overshoots, but not so far that PIL's clipping between the two axes matters.
    image = pixels() if filter == "bilinear" else pixels() // 2 + 64
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    expected = np.asarray(crop.resize((11, 11), getattr(Image.Resampling, filter.upper()))) / 255
    actual = resized_crop(jnp.asarray(image / 255, jnp.float32), jnp.asarray(box, jnp.float32), 11, filter)
    # PIL rounds to 8 bits after the rows and again after the columns.
    np.testing.assert_allclose(actual, expected, atol=2 * UNIT)
    assert np.mean(np.abs(np.asarray(actual) - expected)) < 0.5 * UNIT


def test_the_whole_box_at_its_own_size_is_the_image():
    image = unit_image()[:, :23]
    actual = resized_crop(jnp.asarray(image), jnp.asarray([0.0, 0.0, 23.0, 23.0]), 23)
    np.testing.assert_allclose(actual, image, atol=1e-6)


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
def test_brightness_contrast_and_saturation(factor):
    x = unit_image(1).astype(np.float64)
    expected = {
        color.brightness: x * factor,
        color.contrast: factor * x + (1 - factor) * luma(x).mean(),
        color.saturation: factor * x + (1 - factor) * luma(x)[..., None],
    }
    for operation, value in expected.items():
        np.testing.assert_allclose(operation(jnp.asarray(x, jnp.float32), factor), value.clip(0, 1), atol=1e-5)


@pytest.mark.parametrize("shift", [-0.4, -0.1, 0.0, 0.1, 0.5])
def test_hue_shifts_as_in_colorsys(shift):
    x = unit_image(2)
    x[0, :4] = [[0.5, 0.5, 0.5], [0, 0, 0], [1, 1, 1], [0.7, 0.7, 0.2]]

    def turned(rgb):
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb((h + shift) % 1, s, v)

    expected = np.array([[turned(rgb) for rgb in row.tolist()] for row in x])
    np.testing.assert_allclose(color.hue(jnp.asarray(x), shift), expected, atol=1e-5)


def test_grey_and_solarise_are_pils():
    image = pixels(3)
    x = jnp.asarray(image / 255, jnp.float32)
    expected = np.asarray(Image.fromarray(image).convert("L"))[..., None] / 255
    np.testing.assert_allclose(color.to_grey(x), np.broadcast_to(expected, image.shape), atol=1.01 * UNIT)
    np.testing.assert_allclose(color.to_grey(x)[..., 1], luma(image / 255), atol=1e-6)
    image[0, :3] = [[127] * 3, [128] * 3, [129] * 3]
    expected = np.where(image < 128, image, 255 - image) / 255
    np.testing.assert_allclose(color.solarise(to_unit(jnp.asarray(image))), expected, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_is_a_gaussian_convolution(sigma):
    x = unit_image(4).astype(np.float64)
    offsets = np.arange(-8, 9)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(x, ((8, 8), (8, 8), (0, 0)), mode="edge")
    rows = np.sum([w * padded[8 + o : 8 + o + HEIGHT] for w, o in zip(kernel, offsets)], 0)
    expected = np.sum([w * rows[:, 8 + o : 8 + o + WIDTH] for w, o in zip(kernel, offsets)], 0)
    np.testing.assert_allclose(gaussian_blur(jnp.asarray(x, jnp.float32), sigma, 2.0), expected, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("hue_at", [0, 1, 2, 3])
def test_jitter_applies_its_four_operations_in_the_given_order(order, hue_at):
    x, factors, shift = jnp.asarray(unit_image(5)), (1.3, 0.6, 1.4), 0.1
    blends = (color.brightness, color.contrast, color.saturation)
    operations: list[Any] = [functools.partial(blends[i], factor=factors[i]) for i in order]
    operations.insert(hue_at, functools.partial(color.hue, shift=shift))
    expected = x
    for operation in operations:
        expected = operation(expected)
    actual = color.colour_jitter(x, jnp.asarray(factors), shift, jnp.asarray(order), hue_at)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ draws

N = 400
KEYS = jax.random.split(jax.random.key(7), N)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip_p": 0.0}


def views(**fields) -> np.ndarray:
    """N views of one square image, of the image's own size and not cropped, that differ by what `fields` say."""
    image = jnp.asarray(pixels(6, 13, 13))
    view = View(13, **(PLAIN | fields))
    return np.asarray(jax.jit(jax.vmap(view, (0, None)))(KEYS, image))


@pytest.mark.parametrize(
    "fields, p",
    [
        ({"flip_p": 0.5}, 0.5),
        ({"grey_p": 0.2}, 0.2),
        ({"grey_p": 0.2, "grey_first": True}, 0.2),
        ({"jitter_p": 0.8}, 0.8),
        ({"blur_p": 0.5, "blur_sigma": (0.5, 2.0)}, 0.5),
        ({"blur_p": 0.1, "blur_sigma": (0.5, 2.0)}, 0.1),
        ({"solarise_p": 0.2}, 0.2),
    ],
)
def test_each_operation_happens_as_often_as_it_should(fields, p):
    image = pixels(6, 13, 13) / 255
    actual = views(**fields)
    changed = np.abs(actual - image).max((1, 2, 3)) > 1e-4
    assert within(int(changed.sum()), N, p), changed.mean()
    if "flip_p" in fields:
        np.testing.assert_allclose(actual[changed], np.broadcast_to(image[:, ::-1], actual[changed].shape), atol=1e-5)


def test_boxes_have_the_area_and_the_ratio_of_torchvision():
    boxes = np.asarray(jax.vmap(lambda key: random_box(key, (97, 101), (0.2, 1.0), (3 / 4, 4 / 3)))(KEYS))
    top, left, height, width = boxes.T
    assert (boxes == np.round(boxes)).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 97).all() and (left + width <= 101).all()
    area, ratio = height * width / (97 * 101), width / height
    assert area.min() > 0.19 and area.max() <= 1.0
    assert ratio.min() > 0.73 and ratio.max() < 1.37
    # torchvision's own procedure, in NumPy, many times: quartiles agree.
    rng, expected = np.random.default_rng(0), []
    while len(expected) < 4000:
        target_area, aspect = 97 * 101 * rng.uniform(0.2, 1.0), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(target_area * aspect)), round(math.sqrt(target_area / aspect))
        if 0 < w <= 101 and 0 < h <= 97:
            expected.append((w * h / (97 * 101), w / h))
    for actual, reference in zip((area, ratio), np.array(expected).T):
        for quartile in (0.25, 0.5, 0.75):
            assert within(int((actual < np.quantile(reference, quartile)).sum()), N, quartile)


def test_a_box_that_never_fits_is_the_largest_central_one():
    box = random_box(jax.random.key(0), (10, 101), (1.0, 1.0), (3 / 4, 4 / 3))
    np.testing.assert_array_equal(box, [0, 44, 10, 13])


@pytest.fixture(scope="module")
def jitters() -> np.ndarray:
    """[N, 8]: the jitter's samples: three factors, the shift of hue, the order of three, the position of hue."""

    def record_parameters(image, factors, shift, order, hue_at):
        return jnp.concatenate([factors, shift[None], order.astype(jnp.float32), hue_at[None].astype(jnp.float32)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(color, "colour_jitter", record_parameters)
        draw = lambda key: color.random_colour_jitter(key, jnp.zeros((1, 1, 3)), (0.4, 0.3, 1.5, 0.2))  # noqa: E731
        return np.asarray(jax.vmap(draw)(KEYS))


def test_each_order_of_a_jitter_is_as_likely(jitters):
    orders = collections.Counter()
    for *order, hue_at in jitters[:, 4:].astype(int).tolist():
        order.insert(hue_at, 3)
        assert sorted(order) == [0, 1, 2, 3]
        orders[tuple(order)] += 1
    assert set(orders) == set(itertools.permutations(range(4)))
    assert all(within(count, N, 1 / 24) for count in orders.values())


def test_jitter_draws_evenly_in_the_ranges_of_torchvision(jitters):
    ranges = [(0.6, 1.4), (0.7, 1.3), (0.0, 2.5), (-0.2, 0.2)]  # a factor is never negative
    for sampled, (low, high) in zip(jitters.T, ranges):
        assert low <= sampled.min() and sampled.max() <= high
        for share in (0.05, 0.25, 0.5, 0.75, 0.95):
            assert within(int((sampled < low + share * (high - low)).sum()), N, share)
    # None follows from another: each half of one is cut in halves by the others.
    upper = jitters > np.median(jitters, 0)
    for one, other in itertools.combinations(range(4), 2):
        assert within(int((upper[:, one] == upper[:, other]).sum()), N, 0.5), (one, other)
    first_is_brightness = jitters[:, 4] == 0
    for i in range(4):
        assert within(int(upper[first_is_brightness, i].sum()), int(first_is_brightness.sum()), 0.5), i


def test_hue_shifts_are_uniform_and_have_the_configured_probability():
    """The shift of a flat image whose hue is a third of the circle, in a jitter of hue alone. The shift is independent
    of whether it happens: with one sample for both, shifts of the rarer side would be missing."""
    flat = jnp.broadcast_to(jnp.asarray([0.2, 0.8, 0.2]), (5, 5, 3))
    view = View(5, **(PLAIN | {"jitter": (0.0, 0.0, 0.0, 0.1), "jitter_p": 0.8}))
    colours = np.asarray(jax.jit(jax.vmap(view, (0, None)))(KEYS, flat))[:, 2, 2]
    hues, saturations, values = np.array([colorsys.rgb_to_hsv(*rgb) for rgb in colours.tolist()]).T
    np.testing.assert_allclose(saturations, 0.75, atol=1e-5)
    np.testing.assert_allclose(values, 0.8, atol=1e-5)
    turned = hues - 1 / 3
    moved = np.abs(turned) > 1e-6
    assert within(int(moved.sum()), N, 0.8)
    assert np.abs(turned).max() <= 0.1 + 1e-5
    for bound in (-0.08, -0.05, 0.0, 0.05, 0.08):
        assert within(int((turned[moved] < bound).sum()), int(moved.sum()), (bound + 0.1) / 0.2), bound


def test_jitter_draws_brightness_factors_evenly():
    mid = jnp.full((2, 2, 3), 0.5)
    only_brightness = jax.vmap(lambda key: color.random_colour_jitter(key, mid, (0.4, 0.0, 0.0, 0.0)))(KEYS)
    factor = np.asarray(only_brightness)[:, 0, 0, 0] / 0.5
    assert 0.6 <= factor.min() < 0.62 and 1.38 < factor.max() <= 1.4
    for bound in (0.8, 1.0, 1.2):
        assert within(int((factor < bound).sum()), N, (bound - 0.6) / 0.8)


# ------------------------------------------------------------------------------------------------------------ views

PUBLISHED = [View.moco_v1(11), View.moco_v2(11), View.moco_v3_2(11), View.clip(11), View.supervised(11)]


@pytest.mark.parametrize("view", PUBLISHED, ids=["moco_v1", "moco_v2", "moco_v3_2", "clip", "supervised"])
def test_a_view_depends_on_its_key_and_image_alone(view):
    images, keys = jnp.stack([jnp.asarray(pixels(i)) for i in range(4)]), jax.random.split(jax.random.key(1), 4)
    many = jax.jit(jax.vmap(view))
    actual = np.asarray(many(keys, images))
    np.testing.assert_array_equal(actual, many(keys, images))
    halves = [np.asarray(many(keys[i : i + 2], images[i : i + 2])) for i in (0, 2)]
    np.testing.assert_allclose(actual, np.concatenate(halves), atol=1e-5)
    again = np.stack([np.asarray(jax.jit(view)(key, image)) for key, image in zip(keys, images)])
    np.testing.assert_allclose(actual, again, atol=1e-5)
    assert np.abs(np.asarray(many(keys[::-1], images)) - actual).max() > 0.1
    raw = actual * np.array(view.std) + np.array(view.mean)
    assert actual.dtype == np.float32 and raw.min() > -1e-5 and raw.max() < 1 + 1e-5


def test_two_views_differ_and_compile_once():
    view = View.moco_v2(11)
    traced = []
    augment = two_views(view, view)

    @jax.jit
    def run(keys, batch):
        traced.append(1)
        return augment(keys, batch)

    images = jnp.stack([jnp.asarray(pixels(i)) for i in range(3)])
    for seed in range(3):
        out = run(jax.random.split(jax.random.key(seed), 3), {"image": images, "label": jnp.arange(3)})
    assert len(traced) == 1 and sorted(out) == ["label", "view_1", "view_2"]
    assert np.abs(np.asarray(out["view_1"] - out["view_2"])).max((1, 2, 3)).min() > 0.1


OPERATIONS: dict[str, dict[str, Any]] = {
    "grey": {"grey_p": 0.5},
    "jitter": {"jitter_p": 0.5},
    "blur": {"blur_p": 0.5, "blur_sigma": (0.5, 2.0)},
    "solarise": {"solarise_p": 0.5},
    "flip": {"flip_p": 0.5},
}


@pytest.fixture(scope="module")
def happened() -> dict[str, np.ndarray]:
    """In which of N views each operation happens, measured without other operations."""
    image = pixels(6, 13, 13) / 255
    return {name: np.abs(views(**fields) - image).max((1, 2, 3)) > 1e-4 for name, fields in OPERATIONS.items()}


@pytest.mark.parametrize("one, other", list(itertools.combinations(OPERATIONS, 2)))
def test_no_draw_is_shared_between_operations(happened, one, other):
    """One draw for both would make them happen together, or never, or in another share than a quarter."""
    assert within(int((happened[one] & happened[other]).sum()), N, 0.25)


@pytest.fixture(scope="module")
def everything() -> np.ndarray:
    return views(**{key: value for fields in OPERATIONS.values() for key, value in fields.items()})


@pytest.mark.parametrize("name", OPERATIONS)
def test_leaving_an_operation_out_changes_no_other(happened, everything, name):
    """A view with all of them and one without this one differ where this one happens by itself, and nowhere else."""
    rest = {key: value for other in OPERATIONS if other != name for key, value in OPERATIONS[other].items()}
    changed = np.abs(everything - views(**rest)).max((1, 2, 3)) > 1e-4
    assert not (changed & ~happened[name]).any()
    # A few views have become too dark for solarising to find a bright pixel.
    assert changed.sum() > 0.9 * happened[name].sum()


def test_the_strength_of_a_blur_is_independent_of_its_presence(happened):
    image = pixels(6, 13, 13) / 255
    strength = np.abs(views(**OPERATIONS["blur"] | {"blur_p": 1.0}) - image).mean((1, 2, 3))
    stronger = strength > np.median(strength)
    assert within(int(stronger[happened["blur"]].sum()), int(happened["blur"].sum()), 0.5)


def test_a_batch_without_images_is_named():
    with pytest.raises(MmjaxError, match=r"'image'.*'text'"):
        one_view(View(11))(KEYS[:2], {"text": jnp.zeros((2, 3))})
