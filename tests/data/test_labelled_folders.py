"""Folders of labelled images: the split, and the errors."""

import os
import pathlib

import pytest

from mmjax.data.image_folder import ImageFolder, labelled_split, split_folders
from mmjax.errors import MmjaxError


def folder(root: pathlib.Path, **counts: int) -> pathlib.Path:
    """counts: the number of images of each class; their bytes are their names."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index}.png").write_bytes(f"{name}/{index}".encode())
    return root


def names(source: ImageFolder) -> list[tuple[str, int]]:
    return [(source[i]["image"].decode(), source[i]["label"]) for i in range(len(source))]


def test_a_share_of_each_class_is_held_out(tmp_path):
    root = folder(tmp_path / "a", cat=20, ant=7, bee=2)
    train, held_out = labelled_split(root, 0.3)
    assert held_out is not None and train.classes == held_out.classes == ("ant", "bee", "cat")
    assert [[label for _, label in names(part)].count(i) for i in range(3) for part in (train, held_out)] == [
        *(5, 2),
        *(1, 1),
        *(14, 6),
    ]
    assert sorted(names(train) + names(held_out)) == sorted(names(ImageFolder(root)))
    for name, label in names(train) + names(held_out):
        assert name.split("/")[0] == train.classes[label]
    assert train.record_name(0) == str(root / train.paths[0]) and train.fingerprint != held_out.fingerprint


def test_the_same_are_held_out_elsewhere_and_when_images_join(tmp_path):
    _, here = labelled_split(folder(tmp_path / "a", cat=20, ant=30), 0.2)
    _, elsewhere = labelled_split(folder(tmp_path / "b", cat=20, ant=30), 0.2)
    _, more = labelled_split(folder(tmp_path / "c", cat=20, ant=31), 0.2)
    assert here is not None and elsewhere is not None and more is not None
    assert names(here) == names(elsewhere)
    assert len(set(names(here)) - set(names(more))) <= 1


def test_a_split_that_is_there_is_taken(tmp_path):
    folder(tmp_path / "train", cat=3, ant=2, bee=2)
    folder(tmp_path / "val", cat=2)
    train, held_out = labelled_split(tmp_path, 0.5)
    assert held_out is not None and len(train) == 7
    assert names(held_out) == [("cat/0", 2), ("cat/1", 2)]
    folder(tmp_path / "test", cow=1)
    with pytest.raises(MmjaxError, match=r"test: cow: not among the classes ant, bee, cat"):
        split_folders(tmp_path)


def test_nothing_may_be_held_out(tmp_path):
    root = folder(tmp_path / "a", cat=1, ant=1)
    train, held_out = labelled_split(root, 0.0)
    assert held_out is None and len(train) == 2
    with pytest.raises(MmjaxError, match=r"one image a class: nothing can be held out"):
        labelled_split(root, 0.2)


def test_hidden_folders_are_no_classes(tmp_path):
    root = folder(tmp_path / "a", cat=2, ant=2)
    folder(root, **{".ipynb_checkpoints": 1})
    assert ImageFolder(root).classes == ("ant", "cat")


@pytest.mark.parametrize(
    "made, share, words",
    [
        ({"cat": 3}, 0.1, "cat is its only class"),
        ({"cat": 3, "ant": 0}, 0.1, r"no image \(.*\.png.*\) of the classes ant"),
        ({"cat": 0, "ant": 0}, 0.1, "no image"),
        ({".": 3}, 0.1, "want one sub-folder a class"),
        ({}, 0.1, "no such folder"),
        ({"cat": 3, "ant": 3}, 1.0, "held_out=1.0"),
        ({"cat": 3, "ant": 3}, -0.1, "held_out=-0.1"),
    ],
)
def test_what_cannot_be_trained_on_is_one_error(tmp_path, made, share, words):
    root = tmp_path / "data"
    if "." in made:
        folder(tmp_path, data=made["."])
    else:
        folder(root, **made)
    with pytest.raises(MmjaxError, match=words):
        labelled_split(root, share)


def test_hidden_copies_are_not_data_and_links_are_followed_once(tmp_path):
    root, far = folder(tmp_path / "photos", cat=2, ant=1), folder(tmp_path / "far", bird=3)
    for copy in (".ipynb_checkpoints/0-checkpoint.png", "._1.png"):
        (root / "cat" / copy).parent.mkdir(exist_ok=True)
        (root / "cat" / copy).write_bytes(b"no image")
    (root / "cow").symlink_to(far / "bird")
    (root / "cat" / "more").symlink_to(far)
    (root / "cat" / "circle").symlink_to(root / "cat")
    source = ImageFolder(root)
    assert source.classes == ("ant", "cat", "cow")
    assert [source.labels.count(label) for label in range(3)] == [1, 2 + 3, 3]
    assert not any(part.startswith(".") for path in source.paths for part in pathlib.Path(path).parts)


def test_a_class_whose_name_is_not_text_is_refused_before_training(tmp_path):
    folder(tmp_path, cat=2)
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(MmjaxError, match=r"caf\\xe9': its name is not UTF-8"):
        labelled_split(tmp_path, 0.5)
