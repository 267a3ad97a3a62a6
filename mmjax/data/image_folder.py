"""A folder of images, one sub-folder a class, as ImageNet and torchvision lay them out; or one without classes."""

import hashlib
import os
import pathlib

from mmjax.data.decoding import BadRecord
from mmjax.data.sources import Record, read_bytes
from mmjax.errors import MmjaxError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})


class ImageFolder:
    """Records {"image": bytes, "label": int, "text": class name}; {"image": bytes} if there are no sub-folders.

    classes: the sub-folders by name; `label` counts them. Files are sorted by class, then by path.

    Raises MmjaxError: no such folder, or no image in it.
    """

    def __init__(self, root: str | os.PathLike[str], name: str | None = None):
        self.root = pathlib.Path(root)
        if not self.root.is_dir():
            raise MmjaxError(f"{self.root}: no such folder of images")
        self.name = name or self.root.name
        self.classes = tuple(sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir()))
        folders = self.classes or (".",)
        found = [(label, path) for label, folder in enumerate(folders) for path in self._images(folder)]
        if not found:
            raise MmjaxError(f"{self.root}: no image ({', '.join(sorted(SUFFIXES))}) in it")
        self.labels, self.paths = [label for label, _ in found], [path for _, path in found]

    def _images(self, folder: str) -> list[str]:
        paths = []
        for parent, folders, files in os.walk(self.root / folder):
            folders.sort()
            inside = os.path.relpath(parent, self.root)
            paths += [os.path.join(inside, f) for f in files if os.path.splitext(f)[1].lower() in SUFFIXES]
        return sorted(paths)

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

    @property
    def fingerprint(self) -> str:
        """Of the paths below the root: the same wherever the folder lies."""
        return hashlib.sha256("\n".join(self.paths).encode(errors="surrogateescape")).hexdigest()


def inside(folder: pathlib.Path, path: str) -> pathlib.Path:
    """`folder / path`; BadRecord "file: outside the folder" for one that leaves it."""
    joined = os.path.normpath(folder / path)
    if "\0" in path or os.path.commonpath([joined, os.path.normpath(folder)]) != os.path.normpath(folder):
        raise BadRecord("file: outside the folder", path)
    return pathlib.Path(joined)
