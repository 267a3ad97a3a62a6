"""The files of one checkpoint: every leaf of a state under its path, and a manifest that describes them.

`mmjax.training.checkpoint` decides when they count; here they are made, described and read back, or refused.
"""

import base64
import collections
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.training.partition import FROZEN, Partition
from mmjax.training.storage import local_copy
from mmjax.types import Params

MANIFEST = "manifest.json"
FILES = "files.json"

# Logged at each save in this layout, and of no meaning to the user.
logging.getLogger("absl").addFilter(lambda record: "Skipping merge of OCDBT" not in record.getMessage())


class CheckpointError(MmjaxError):
    """A checkpoint cannot be written, or does not fit the state it should fill."""


class DamagedCheckpoint(CheckpointError):
    """The files of a checkpoint are not what was written."""


# ------------------------------------------------------------------------------------------------------------ leaves


def state_leaves(state: Any) -> dict[str, Any]:
    """{"params/stem/kernel": leaf} for any pytree; typed PRNG keys stay typed."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def frozen_keys(partition: Partition, params: Params) -> frozenset[str]:
    """The keys of a state's leaves that no step changes. params: arrays or shapes, int8 matrices among them."""
    labels = partition.labels(params)
    frozen = {path: leaf for path, leaf in tree.flatten(params).items() if labels[path] == FROZEN}
    return frozenset(state_leaves({"params": tree.unflatten(frozen)}))


def is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def host_copy(leaf: Any) -> np.ndarray:
    """A NumPy copy, which later donation of the device buffer cannot touch."""
    if isinstance(leaf, jax.Array) and is_key(leaf.dtype):
        leaf = jax.random.key_data(leaf)
    return np.array(leaf, copy=True)


def describe(leaf: Any) -> dict[str, Any]:
    """Shape and dtype as the manifest has them; works for arrays and ShapeDtypeStructs."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


# ---------------------------------------------------------------------------------------------------------- manifest


def make_manifest(
    state: Any,
    step: int,
    data: Any = None,
    counters: Mapping[str, Any] | None = None,
    stored: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The content of `manifest.json` for a state; equal states (and iterator positions) give equal manifests.

    stored: {key: description} of the leaves that are in the `mmjax.training.frozen` store.
    """
    stored = stored or {}
    leaves = {
        key: dict(stored[key]) if key in stored else describe(leaf) | {"sha256": tree.leaf_hash(leaf)}
        for key, leaf in state_leaves(state).items()
    }
    body = {
        "format": 1,
        "step": step,
        "fields": sorted({key.split("/")[0] for key in leaves} | field_names(state)),
        "leaves": leaves,
        "data": encode(data),
        "counters": dict(counters or {}),
    }
    return body | {"sha256": _digest(body)}


def field_names(state: Any) -> set[str]:
    """The top-level fields, those without leaves included."""
    if dataclasses.is_dataclass(state):
        return {field.name for field in dataclasses.fields(state)}
    return set(state) if isinstance(state, Mapping) else set()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def encode(value: Any) -> Any:
    """A data iterator's state as JSON; opaque bytes survive."""
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    if isinstance(value, list | tuple):
        return [encode(part) for part in value]
    if isinstance(value, Mapping):
        return {str(name): encode(part) for name, part in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def decode(value: Any) -> Any:
    if isinstance(value, list):
        return [decode(part) for part in value]
    if isinstance(value, dict):
        if value.keys() == {"__bytes__"}:
            return base64.b64decode(value["__bytes__"])
        return {name: decode(part) for name, part in value.items()}
    return value


def read_manifest(folder: Any) -> dict[str, Any]:
    """The verified manifest of a step's folder. Raises DamagedCheckpoint."""
    path = epath.Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        body = {name: value for name, value in manifest.items() if name != "sha256"}
        whole = manifest["sha256"] == _digest(body)
    except (OSError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: unreadable: {type(error).__name__}: {error}") from error
    if not whole:
        raise DamagedCheckpoint(f"{path}: its content does not have the SHA-256 that it states")
    return manifest


# ------------------------------------------------------------------------------------------------------------- arrays


def _checkpointer() -> ocp.Checkpointer:
    # One process writes: the others have sent their shards before, and must not be waited for.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="mmjax"
    )
    # A folder a leaf, named by its path, so that a damaged file names its key.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def write_arrays(folder: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    # Orbax refuses arrays without elements; their shape in the manifest is enough.
    full = {key: array for key, array in arrays.items() if array.size}
    dotted = collections.Counter(_folder_name(key) for key in full)
    if any(count > 1 for count in dotted.values()):
        raise CheckpointError(f"leaves whose paths differ only by a dot: {[k for k, n in dotted.items() if n > 1]}")
    if full:
        with _checkpointer() as checkpointer:
            checkpointer.save(os.fspath(folder), args=ocp.args.PyTreeSave(tree.unflatten(full)))


def read_arrays(folder: epath.Path, leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays that `leaves` (a part of a manifest) names, each checked against its SHA-256."""
    filled = {key for key, leaf in leaves.items() if 0 not in leaf["shape"]}
    flat: dict[str, Any] = {}
    if filled:
        with _checked_files(folder, filled) as local:
            flat = _restore(folder, local, filled)
    arrays, wrong = {}, []
    for key, leaf in leaves.items():
        dtype = None if leaf["dtype"].startswith("key<") else np.dtype(leaf["dtype"])
        array = np.asarray(flat[key]) if key in flat else np.zeros(leaf["shape"], dtype or np.uint32)
        if key in filled and (key not in flat or tree.leaf_hash(array) != leaf["sha256"]):
            wrong.append(key)
        arrays[key] = array
    if wrong:
        raise DamagedCheckpoint(f"{folder}: wrong bytes in {', '.join(wrong)}")
    return arrays


def _restore(folder: epath.Path, local: pathlib.Path, keys: Collection[str]) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(), _checkpointer() as checkpointer:
            warnings.simplefilter("ignore")
            item = tree.unflatten(dict.fromkeys(sorted(keys), 0))
            numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            args = ocp.args.PyTreeRestore(item, restore_args=numpy, partial_restore=True)
            return tree.flatten(checkpointer.restore(os.fspath(local), args=args))
    except Exception as error:  # Orbax and TensorStore raise whatever the damaged bytes lead them to
        raise DamagedCheckpoint(f"{folder}: unreadable: {type(error).__name__}: {str(error)[:300]}") from error


def file_digests(folder: Any) -> dict[str, str]:
    """{slash path below the folder: SHA-256} of every file of a local folder."""
    local = pathlib.Path(folder)
    paths = sorted(path for path in local.rglob("*") if path.is_file())
    return {path.relative_to(local).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@contextmanager
def _checked_files(folder: epath.Path, keys: Collection[str]) -> Iterator[pathlib.Path]:
    """A local folder with the files of these leaves, their SHA-256 as they were written.

    Checked before Orbax reads them: no parser of array files gets damaged bytes, and the message can name the file.
    """
    index = folder.parent / FILES
    try:
        digests = dict(json.loads(index.read_bytes()))
        folders = {_folder_name(key) for key in keys}  # beside them Orbax's own files
        names = [name for name in digests if "/" not in name or name.split("/")[0] in folders]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{index}: unreadable: {type(error).__name__}: {error}") from error
    with ExitStack() as stack:
        try:
            local = stack.enter_context(local_copy(folder, names))
            actual = file_digests(local)
        except OSError as error:
            raise DamagedCheckpoint(f"{folder}: unreadable: {type(error).__name__}: {error}") from error
        bad = [f"{folder / name}" for name in names if actual.get(name) != digests[name]]
        if bad:
            raise DamagedCheckpoint(f"not what was written: {', '.join(bad)}")
        yield local


def _folder_name(key: str) -> str:
    """Orbax's name of the folder of a leaf."""
    return key.replace("/", ".")
