"""A folder of images, one sub-folder a class, as ImageNet and torchvision lay them out; or one without classes."""

import copy
import hashlib
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Self

from mmjax.data.decoding import BadRecord
from mmjax.data.labels import check_names
from mmjax.data.sources import Record, read_bytes
from mmjax.errors import MmjaxError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})


class ImageFolder:
    """Records {"image": bytes, "label": int, "text": class name}; {"image": bytes} if there are no sub-folders.

    classes: the sub-folders by name, without hidden ones; `label` is the index in them. If passed, they are
        numbered as passed, and some may lack a sub-folder. Files are sorted by class, then by path.

    Raises MmjaxError: no such folder, no image in it, or a sub-folder that is not among `classes`.

    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp(), "cat")
    >>> folder.mkdir()
    >>> _ = (folder / "tom.png").write_bytes(b"...")
    >>> source = ImageFolder(folder.parent)
    >>> source.classes, source[0]
    (('cat',), {'image': b'...', 'label': 0, 'text': 'cat'})
    """

    def __init__(self, root: str | os.PathLike[str], name: str | None = None, classes: Sequence[str] | None = None):
        self.root = pathlib.Path(root)
        if not self.root.is_dir():
            raise MmjaxError(f"{self.root}: no such folder of images")
        self.name = name or self.root.name
        inside = sorted(e.name for e in os.scandir(self.root) if e.is_dir() and not e.name.startswith("."))
        self.classes: tuple[str, ...] = tuple(inside if classes is None else classes)
        unknown = sorted(set(inside) - set(self.classes))
        if unknown:
            raise MmjaxError(f"{self.root}: {', '.join(unknown)}: not among the classes {', '.join(self.classes)}")
        folders = self.classes or (".",)
        images = [(label, path) for label, folder in enumerate(folders) for path in image_paths(self.root, folder)]
        if not images:
            raise MmjaxError(f"{self.root}: no image ({', '.join(sorted(SUFFIXES))}) in it")
        self.labels, self.paths = [label for label, _ in images], [path for _, path in images]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        record: Record = {"image": read_bytes(self.root / self.paths[index])}
        if self.classes:
            label = self.labels[index]
            record |= {"label": label, "text": self.classes[label]}
        return record

    def record_name(self, index: int) -> str:
        return str(self.root / self.paths[index])

    def select(self, indices: Sequence[int]) -> Self:
        """The records at `indices`, in that order, with the same classes."""
        chosen = copy.copy(self)
        chosen.labels, chosen.paths = [self.labels[i] for i in indices], [self.paths[i] for i in indices]
        return chosen

    def split(self, share: float) -> tuple[Self, Self]:
        """(the rest, about `share` of each class); of a class with two images or more at least one on either side.

        Which ones follows from the paths below the root alone: the same on every machine and in every run, and images
        that join later move few of the others.
        """
        held_out: list[int] = []
        for label in sorted(set(self.labels)):
            indices = [i for i, other in enumerate(self.labels) if other == label]
            indices.sort(key=lambda i: hashlib.sha256(self.paths[i].encode(errors="surrogateescape")).digest())
            held_out += indices[: min(max(math.floor(share * len(indices) + 0.5), 1), len(indices) - 1)]
        rest = sorted(set(range(len(self))) - set(held_out))
        return self.select(rest), self.select(sorted(held_out))

    @property
    def fingerprint(self) -> str:
        """A hash of the paths below the root: independent of the folder's location."""
        return hashlib.sha256("\n".join(self.paths).encode(errors="surrogateescape")).hexdigest()


def image_paths(root: str | os.PathLike[str], folder: str = ".") -> list[str]:
    """The paths below `root` of all images in root/folder, sorted.

    Linked folders are entered, each real one once. Hidden names are not data: Jupyter and macOS leave copies beside
    images (.ipynb_checkpoints, ._photo.png).
    """
    paths, entered = [], set()
    for parent, folders, files in os.walk(os.path.join(root, folder), followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = (name for name in files if os.path.splitext(name)[1].lower() in SUFFIXES and name[0] != ".")
        paths += [os.path.relpath(os.path.join(parent, name), root) for name in images]
    return sorted(paths)


def split_folders(root: str | os.PathLike[str]) -> tuple[ImageFolder, ImageFolder | None]:
    """(training images, test images): of root/train and root/test, val or validation; else all of root, and None.

    Raises MmjaxError: not one sub-folder a class, or a class among the test images that is not trained on.
    """
    root = pathlib.Path(root)
    tests = [root / name for name in ("test", "val", "validation") if (root / name).is_dir()]
    if not ((root / "train").is_dir() and tests):
        train, test = ImageFolder(root), None
    else:
        train = ImageFolder(root / "train", root.name)
        test = ImageFolder(tests[0], root.name, train.classes) if train.classes else None
    if not train.classes:
        raise MmjaxError(f"{train.root}: its images lie in no class: want one sub-folder a class")
    return train, test


def labelled_split(root: str | os.PathLike[str], held_out: float) -> tuple[ImageFolder, ImageFolder | None]:
    """(training, held-out images) to train a classifier with: `split_folders`, or where there is no such split a share
    of each class; None with held_out=0.

    Raises MmjaxError, also for fewer than two classes, a class without an image to train on, or one whose name is not
    UTF-8.
    """
    if not 0 <= held_out < 1:
        raise MmjaxError(f"held_out={held_out}: a share from 0 to below 1")
    train, test = split_folders(root)
    if len(train.classes) < 2:
        raise MmjaxError(f"{train.root}: {', '.join(train.classes)} is its only class; a classifier needs two")
    check_names(train.classes, train.root)
    empty = sorted({train.classes[i] for i in set(range(len(train.classes))) - set(train.labels)})
    if empty:
        raise MmjaxError(f"{train.root}: no image ({', '.join(sorted(SUFFIXES))}) of the classes {', '.join(empty)}")
    if test is None and held_out:
        train, test = train.split(held_out)
        if not len(test):
            raise MmjaxError(f"{train.root}: one image a class: nothing can be held out; held_out=0 trains on all")
    return train, test


def inside(folder: pathlib.Path, path: str) -> pathlib.Path:
    """`folder / path`; BadRecord "file: outside the folder" for one that leaves it."""
    joined, root = os.path.normpath(folder / path), os.path.abspath(folder)
    if "\0" in path or os.path.commonpath([os.path.abspath(joined), root]) != root:
        raise BadRecord("file: outside the folder", path)
    return pathlib.Path(joined)
