"""Random erasing: the distribution of its rectangles, and the rest of the image."""

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.training.erasing import RandomErasing, erased_box

H, W = 40, 60
MEAN, STD = (0.2, 0.4, 0.6), (0.5, 0.25, 2.0)


def test_rectangles_have_the_configured_area_and_ratio():
    boxes = np.asarray(jax.jit(jax.vmap(lambda key: erased_box(key, (H, W))))(jax.random.split(jax.random.key(0), 500)))
    share, ratio = boxes.mean((1, 2)), []
    for box in boxes:
        rows, columns = box.any(1), box.any(0)
        np.testing.assert_array_equal(box, np.outer(rows, columns))
        ratio.append(rows.sum() / columns.sum())
    # Sides are rounded to whole pixels.
    assert 0.015 < share.min() < 0.04 and 0.28 < share.max() < 0.35
    assert abs(share.mean() - 0.175) < 0.015
    assert 0.25 < min(ratio) < 0.4 and 2.6 < max(ratio) < 3.6
    assert abs(np.log(ratio).mean()) < 0.1
    often = boxes.mean(0)
    assert often[H // 2, W // 2] > 2 * often[0].mean() > 0


def test_only_the_rectangle_becomes_the_mean():
    image = np.random.default_rng(0).integers(0, 256, (300, 7, 11, 3), np.uint8)
    keys = jax.random.split(jax.random.key(1), 300)
    outputs = jax.jit(RandomErasing(0.3, MEAN, STD))(keys, {"image": jnp.asarray(image), "label": jnp.arange(300)})
    plain = (image / 255 - np.array(MEAN)) / np.array(STD)
    same = np.isclose(outputs["image"], plain, atol=1e-5).all(-1)
    np.testing.assert_array_equal(np.asarray(outputs["image"])[~same], 0)
    touched = 1 - np.asarray(same).reshape(300, -1).all(1).mean()
    assert abs(touched - 0.3) < 5 * (0.3 * 0.7 / 300) ** 0.5
    np.testing.assert_array_equal(outputs["label"], np.arange(300))
