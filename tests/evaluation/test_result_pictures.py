"""Pictures: correct answers are green, captions and attributions are drawn, and unusual text is handled."""

import io

import numpy as np
import pytest
from PIL import Image

from mmjax.errors import MmjaxError
from mmjax.evaluation.pictures import accuracy_picture, confusion_picture, png, retrieval_picture

GREEN = np.array([0x1A, 0x98, 0x50])


def greens(picture, columns=slice(None)):
    return int(np.count_nonzero(np.abs(picture[:, columns].astype(int) - GREEN).max(-1) < 3))


def picture_of(candidates, attribution=None, captions=None):
    thumbnails = np.full((5, 7, 11, 3), 200, np.uint8)
    captions = captions or [f"caption {i}" for i in range(5)]
    # Text i belongs to image 4 - i: images 4 and 1 and texts 0 and 3 are the queries.
    images, texts = (np.array([4, 1]), np.array(candidates)), (np.array([0, 3]), 4 - np.array(candidates))
    return retrieval_picture(thumbnails, captions, 4 - np.arange(5), images, texts, attribution)


def test_right_answers_are_green():
    none, one, two = picture_of([[1, 2], [1, 2]]), picture_of([[0, 2], [1, 2]]), picture_of([[0, 2], [1, 3]])
    assert greens(none) == 0
    middle = slice(none.shape[1] // 2, None)
    assert greens(one, middle) > 500 and greens(two, middle) == pytest.approx(2 * greens(one, middle), rel=0.05)
    left = slice(0, none.shape[1] // 3)
    assert 20 < greens(one, left) < greens(two, left)
    assert none.dtype == np.uint8 and none.shape == two.shape and none.shape[2] == 3


def test_attribution_is_written_at_the_foot():
    without, with_line = picture_of([[1], [2]]), picture_of([[1], [2]], "All emojis designed by OpenMoji")
    changed = np.argwhere((without != with_line).any(-1))
    assert len(changed) > 100 and changed[:, 0].min() > 0.9 * without.shape[0]
    matrix = np.array([[3, 1], [0, 2]])
    for picture in (
        lambda line: confusion_picture(matrix, ["a", "b"], line),
        lambda line: accuracy_picture(np.array([75.0, np.nan]), np.array([4, 0]), ["a", "b"], line),
    ):
        assert picture("By nobody").shape == picture(None).shape
        assert (picture("By nobody") != picture(None)).any()


def test_odd_text_is_drawn():
    odd = ["costs $5 and $6", "笑う猫", "x" * 300, "", "new\nline \\frac{1}{2}"]
    assert greens(picture_of([[0, 1], [3, 4]], captions=odd)) > 500
    confusion_picture(np.eye(5, dtype=int), odd)
    confusion_picture(np.eye(97, dtype=int), ["name"] * 97)


def test_a_png_file_holds_the_same_pixels():
    picture = confusion_picture(np.array([[3, 1], [0, 2]]), ["a", "b"])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(picture)))), picture)


def test_bad_input_is_named():
    ranking = (np.array([0]), np.array([[0]]))
    with pytest.raises(MmjaxError, match="thumbnails"):
        retrieval_picture(np.ones((2, 3, 3, 3), np.float32), ["a", "b"], np.arange(2), ranking, ranking)  # type: ignore[arg-type]
    with pytest.raises(MmjaxError, match="captions: 1 of them for 2"):
        retrieval_picture(np.ones((2, 3, 3, 3), np.uint8), ["a"], np.arange(2), ranking, ranking)
    with pytest.raises(MmjaxError, match="matrix"):
        confusion_picture(np.eye(3, dtype=int), ["a", "b"])
    with pytest.raises(MmjaxError, match="classes"):
        accuracy_picture(np.ones(3), np.ones(3, int), ["a"])
