"""A disk cache of features: a frozen network gives the same features in every run over the same images."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax

from mmjax.data.cache import Columns, cache_folder, cached
from mmjax.data.image_folder import ImageFolder
from mmjax.tree import tree_hash


def cached_features(network: Any, settings: Any, folder: ImageFolder, compute: Callable[[], Columns]) -> Columns:
    """The result of `compute`, or its cached result for the same weights, settings and files.

    network: a tree of arrays. settings: everything else the features depend on, identified by its repr. Files are
    identified by name, size and modification time. `mmjax.data.cache` documents the location and damaged files.
    """
    return cached(cache_folder() / "features" / f"{_digest(network, settings, folder)}.npz", compute)


def _digest(network: Any, settings: Any, folder: ImageFolder) -> str:
    digest = hashlib.sha256(f"{jax.__version__} {settings!r} {tree_hash(network)} {folder.classes}".encode())
    for label, path in zip(folder.labels, folder.paths):
        stat = (folder.root / path).stat()
        digest.update(f"{label} {path} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
