"""Features kept on disk: a frozen network gives the same ones in every run over the same images."""

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mmjax.data.image_folder import ImageFolder
from mmjax.data.openmoji import cache_folder
from mmjax.tree import tree_hash

Columns = Mapping[str, np.ndarray]


def kept(network: Any, settings: Any, folder: ImageFolder, compute: Callable[[], Columns]) -> Columns:
    """What `compute` gives, or gave the last time, for these weights, settings and files.

    network: a tree of arrays. settings: whatever else the features depend on; its repr counts. Of the files their
    names, sizes and times of change count. Kept in the cache of `mmjax.data.openmoji.cache_folder`; a damaged file is
    made anew, and one that cannot be written costs the computation again, no more.
    """
    file = cache_folder() / "features" / f"{_digest(network, settings, folder)}.npz"
    try:
        with file.open("rb") as opened, np.load(opened) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    columns = compute()
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as opened:
            np.savez(opened, **columns)  # type: ignore[arg-type]
        temporary.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return columns


def _digest(network: Any, settings: Any, folder: ImageFolder) -> str:
    digest = hashlib.sha256(f"{jax.__version__} {settings!r} {tree_hash(network)} {folder.classes}".encode())
    for label, path in zip(folder.labels, folder.paths):
        told = (folder.root / path).stat()
        digest.update(f"{label} {path} {told.st_size} {told.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
