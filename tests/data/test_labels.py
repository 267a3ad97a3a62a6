import json

import numpy as np
import pytest
from PIL import Image

from mmjax.data.image_folder import ImageFolder
from mmjax.data.labels import check_labels, write_labels
from mmjax.data.sources import ArraySource, RandomAccess
from mmjax.errors import MmjaxError


def arrays(labels):
    return ArraySource(name="digits", image=np.zeros((len(labels), 2, 3, 3), np.uint8), label=np.asarray(labels))


@pytest.mark.parametrize(("labels", "message"), [([0, 6, 2, 9], r"2 of 4 .*digits\[1\] has 6"), ([0, -1], "has -1")])
def test_labels_outside_the_classes_are_named(labels, message):
    with pytest.raises(MmjaxError, match=message):
        check_labels(arrays(labels), 5)


def test_good_labels_pass_and_others_are_refused():
    check_labels(arrays([0, 4, 2]), 5)
    with pytest.raises(MmjaxError, match="whole numbers"):
        check_labels(arrays([0.0, 1.5]), 5)
    with pytest.raises(MmjaxError, match=r"digits\[0\] has no label"):
        check_labels(ArraySource(name="digits", image=np.zeros((2, 3))), 5)


def test_folders(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / "three" / name).mkdir(parents=True)
        Image.new("RGB", (2, 3)).save(tmp_path / "three" / name / "x.png")
    check_labels(ImageFolder(tmp_path / "three"), 3)
    with pytest.raises(MmjaxError, match=r"x\.png has 2"):
        check_labels(ImageFolder(tmp_path / "three"), 2)
    with pytest.raises(MmjaxError, match=r"x\.png has no label"):
        check_labels(ImageFolder(tmp_path / "three" / "a"), 3)


def test_the_first_record_is_checked_where_a_source_lists_no_labels():
    items = [{"image": b"", "label": 7}, {"image": b""}]
    with pytest.raises(MmjaxError, match=r"things\[0\] has 7"):
        check_labels(RandomAccess(items, dict, "things"), 7)
    check_labels(RandomAccess(items, dict, "things"), 8)


def test_names_are_written_in_order(tmp_path):
    write_labels(["Stiefelette", "Hemd", "Übermantel"], tmp_path)
    assert json.loads((tmp_path / "labels.json").read_text()) == ["Stiefelette", "Hemd", "Übermantel"]
