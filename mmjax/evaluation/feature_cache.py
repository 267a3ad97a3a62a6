"""Features kept on disk: a frozen network gives the same ones in every run over the same images."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax

from mmjax.data.cache import Columns, cache_folder, cached
from mmjax.data.image_folder import ImageFolder
from mmjax.tree import tree_hash


def kept(network: Any, settings: Any, folder: ImageFolder, compute: Callable[[], Columns]) -> Columns:
    """What `compute` gives, or gave the last time, for these weights, settings and files.

    network: a tree of arrays. settings: whatever else the features depend on; its repr counts. Of the files their
    names, sizes and times of change count. Where they are kept, and what a damaged file does: `mmjax.data.cache`.
    """
    return cached(cache_folder() / "features" / f"{_digest(network, settings, folder)}.npz", compute)


def _digest(network: Any, settings: Any, folder: ImageFolder) -> str:
    digest = hashlib.sha256(f"{jax.__version__} {settings!r} {tree_hash(network)} {folder.classes}".encode())
    for label, path in zip(folder.labels, folder.paths):
        told = (folder.root / path).stat()
        digest.update(f"{label} {path} {told.st_size} {told.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
