"""The store of a run's frozen parameters: each leaf once, beside the checkpoints.

    WORKDIR/frozen/<SHA-256>    the bytes of one leaf, in C order

The name is the hash of the leaf's dtype, shape and bytes (`tree.leaf_hash`). A checkpoint's manifest has the same hash
of the leaf, so the file is checked whenever it is read, and leaves that are equal share a file.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from mmjax import tree
from mmjax.training.checkpoint_format import DamagedCheckpoint, describe, host_copy, read_manifest
from mmjax.training.storage import is_local, sync_path, write_file

FOLDER = "frozen"


class FrozenStore:
    """Writes the frozen leaves of one run."""

    def __init__(self, workdir: Any):
        self._folder = epath.Path(workdir) / FOLDER
        self._stored: dict[str, dict[str, Any]] = {}

    def store(self, leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Makes sure that every leaf is in the store; returns {key: its description in the manifest}.

        A leaf is hashed and written the first time that its key comes: no step of the run changes it. A file that an
        earlier run left is read back, and replaced if it is damaged.
        """
        for key in leaves.keys() - self._stored.keys():
            array = np.asarray(host_copy(leaves[key]), order="C")  # ascontiguousarray makes a scalar [1]
            digest = tree.leaf_hash(array)
            description = describe(array) | {"sha256": digest, "file": f"{FOLDER}/{digest}"}
            path = self._folder / digest
            if not path.exists() or path.read_bytes() != array.tobytes():
                write_file(path, array.tobytes())
                if is_local(path):
                    sync_path(self._folder)
                if path.read_bytes() != array.tobytes():
                    raise DamagedCheckpoint(f"{path} ({key}): read back, it is not what was written")
            self._stored[key] = description
        return {key: self._stored[key] for key in leaves}

    def prune(self, folders: Iterable[epath.Path]) -> None:
        """Removes the files that no manifest of these steps' folders names; none, where one of them is damaged."""
        if not self._folder.is_dir():
            return
        used = {leaf["file"] for leaf in self._stored.values()}
        try:
            for folder in folders:
                used |= {leaf["file"] for leaf in read_manifest(folder)["leaves"].values() if "file" in leaf}
        except DamagedCheckpoint:
            return
        for path in list(self._folder.iterdir()):
            if f"{FOLDER}/{path.name}" not in used:
                path.unlink()


def read_frozen(workdir: Any, leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays of those leaves of a manifest that are in the store.

    Raises DamagedCheckpoint: a file is missing, or not what was written; names every file and key.
    """
    workdir, arrays, wrong = epath.Path(workdir), {}, []
    for key, leaf in leaves.items():
        path = workdir / FOLDER / os.path.basename(leaf["file"])
        try:
            data = path.read_bytes()
            array = np.frombuffer(data, np.dtype(leaf["dtype"])).reshape(leaf["shape"])
        except (OSError, ValueError) as error:
            wrong.append(f"{path} ({key}): {type(error).__name__}: {error}")
            continue
        if tree.leaf_hash(array) != leaf["sha256"]:
            wrong.append(f"{path} ({key}): wrong bytes")
        arrays[key] = array
    if wrong:
        raise DamagedCheckpoint("frozen weights are not what was written: " + "; ".join(wrong))
    return arrays
