"""Checkpoints that load whole and right, or not at all.

Orbax writes and reads the arrays; the commit is ours. A step is a folder `checkpoints/<step>/`:

    arrays/            every leaf of the state, unreplicated, under its path in the tree (Orbax)
    files.json         SHA-256 of every file of `arrays/`, checked before they are parsed: damage names its file
    environment.json   the environment of its writer: devices, lift, versions
    manifest.json      written last: key, shape, dtype and SHA-256 of every leaf, the data iterator's state, counters

Frozen parameters are not in it: they lie once in `frozen/` (`mmjax.training.frozen`), and the manifest names the files.

It is filled under a temporary name, synced and renamed; without a manifest it is no checkpoint. Equal states have equal
manifests. An object store cannot rename: there the files are made on this machine's disk and uploaded under the final
name, and the manifest alone commits.
"""

import dataclasses
import errno
import json
import os
import pathlib
import tempfile
import threading
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mmjax import tree
from mmjax.nn import int8
from mmjax.training.checkpoint_format import (
    FILES,
    MANIFEST,
    CheckpointError,
    DamagedCheckpoint,
    decode,
    describe,
    field_names,
    file_digests,
    host_copy,
    is_key,
    make_manifest,
    read_arrays,
    read_manifest,
    state_leaves,
    write_arrays,
)
from mmjax.training.frozen import FrozenStore, read_frozen
from mmjax.training.storage import is_local, remove_folder, sync_folder, sync_path, upload, write_file

FOLDER = "checkpoints"
TEMPORARY = "tmp-"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint: the state (NumPy leaves), and what it holds beside arrays."""

    state: Any
    step: int
    data: Any
    counters: dict[str, Any]
    environment: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ storage


def steps(workdir: Any) -> list[int]:
    """The committed steps of a workdir, oldest first."""
    folder = epath.Path(workdir) / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and (p / MANIFEST).exists())


def latest(workdir: Any) -> int | None:
    """The newest committed step (by its number, never by a clock), or None."""
    committed = steps(workdir)
    return committed[-1] if committed else None


def _discard(folder: epath.Path) -> None:
    """Removes a step, its manifest first: a half-removed step is then no checkpoint."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        remove_folder(folder)


def step_folder(workdir: Any, step: int) -> epath.Path:
    return epath.Path(workdir) / FOLDER / str(step)


# --------------------------------------------------------------------------------------------------------- read back


def load_state(folder: Any, template: Any, frozen: Collection[str] = ()) -> Restored:
    """Fills a state of the template's structure from one step's folder.

    Args:
        folder: `workdir/checkpoints/<step>`.
        template: the unreplicated state or its `jax.eval_shape`.
        frozen: keys of the template's frozen leaves (`frozen_keys`): they keep the dtype, or the int8 form, that they
            were saved in.

    Raises:
        DamagedCheckpoint: bytes are not what was written; names file and key.
        CheckpointError: leaves are missing, extra, of another shape or dtype; one message lists them all.
    """
    folder = epath.Path(folder)
    manifest = read_manifest(folder)
    template = _as_saved(template, manifest["leaves"], frozen)
    _check_fits(folder, manifest, template)
    arrays = _read_leaves(folder, manifest["leaves"])

    def fill(path: Any, leaf: Any) -> Any:
        array = arrays[jax.tree_util.keystr(path, simple=True, separator="/")]
        return (
            jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(_example_key(leaf)))
            if is_key(leaf.dtype)
            else array
        )

    state = jax.tree_util.tree_map_with_path(fill, template)
    try:
        environment = json.loads((folder / "environment.json").read_bytes())
    except (OSError, ValueError):
        environment = {}  # for information only
    return Restored(state, manifest["step"], decode(manifest["data"]), manifest["counters"], environment)


def _read_leaves(folder: epath.Path, leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays of some leaves of a step's manifest, from its folder and from the run's frozen store."""
    frozen = {key: leaf for key, leaf in leaves.items() if "file" in leaf}
    saved = {key: leaf for key, leaf in leaves.items() if key not in frozen}
    return read_frozen(folder.parent.parent, frozen) | read_arrays(folder / "arrays", saved)


def _as_saved(template: Any, leaves: Mapping[str, Mapping[str, Any]], frozen: Collection[str]) -> Any:
    """The template with its frozen leaves in the form in which a manifest has them, where the shapes are equal."""

    def shape(key: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(leaves[key]["shape"]), np.dtype(leaves[key]["dtype"]))

    def saved(path: Any, leaf: Any) -> Any:
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        values, scale = f"{key}/{int8.VALUES}", f"{key}/{int8.SCALE}"
        if key not in frozen:
            return leaf
        if values in leaves and scale in leaves and leaves[values]["shape"] == list(leaf.shape):
            return int8.from_arrays(shape(values), shape(scale))
        return shape(key) if key in leaves and leaves[key]["shape"] == list(leaf.shape) else leaf

    return jax.tree_util.tree_map_with_path(saved, template)


def _example_key(leaf: Any) -> Any:
    """key_impl needs an array; a ShapeDtypeStruct of keys has only the dtype, whose name holds the implementation."""
    names = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}
    return leaf if isinstance(leaf, jax.Array) else jax.random.key(0, impl=names[str(leaf.dtype)])


def _check_fits(folder: epath.Path, manifest: Mapping[str, Any], template: Any) -> None:
    saved, expected = manifest["leaves"], state_leaves(template)
    fields = field_names(template)
    wrong = [f"field {name} is missing" for name in sorted(fields - set(manifest["fields"]))]
    wrong += [f"field {name} is not of this experiment" for name in sorted(set(manifest["fields"]) - fields) if fields]
    wrong += [
        f"{key}: missing, want {leaf.dtype}{list(leaf.shape)}" for key, leaf in expected.items() if key not in saved
    ]
    wrong += [f"{key}: not in this experiment's state" for key in saved if key not in expected]
    for key, leaf in expected.items():
        want = describe(leaf)
        got = {name: saved[key][name] for name in want} if key in saved else want
        if got != want:
            wrong.append(f"{key}: want {want['dtype']}{want['shape']}, got {got['dtype']}{got['shape']}")
    if wrong:
        raise CheckpointError(f"{folder} does not fit this experiment:\n  " + "\n  ".join(wrong))


def check_fits(workdir: Any, template: Any, frozen: Collection[str] = ()) -> None:
    """Raises CheckpointError if the newest whole manifest of a workdir does not fit; no array is read."""
    for step in reversed(steps(workdir)):
        folder = step_folder(workdir, step)
        try:
            manifest = read_manifest(folder)
        except DamagedCheckpoint:
            continue
        return _check_fits(folder, manifest, _as_saved(template, manifest["leaves"], frozen))


def restore(
    workdir: Any, template: Any, warn: Callable[[str], None] = warnings.warn, frozen: Collection[str] = ()
) -> Restored | None:
    """The newest checkpoint of a workdir, or None if there is none. template, frozen: see `load_state`.

    A damaged newest step is passed over for the one before, with one warning; if no step is whole, that is an error.
    """
    committed = steps(workdir)
    damage: list[str] = []
    for step in reversed(committed):
        try:
            restored = load_state(step_folder(workdir, step), template, frozen)
        except DamagedCheckpoint as error:
            damage.append(str(error))
            continue
        if damage:
            warn(f"falling back to step {step}: " + "; ".join(damage))
        return restored
    if damage:
        raise DamagedCheckpoint(f"no checkpoint in {workdir} is whole:\n  " + "\n  ".join(damage))
    return None


def load_params(path: Any) -> dict[str, Any]:
    """The model of a checkpoint, without knowing its experiment: verified nested dicts of NumPy arrays.

    Args:
        path: `workdir/checkpoints/<step>`, or a workdir (its newest whole step).

    Returns:
        {"params", "stats", "ema", "queues", "averaged_stats": nested dicts, "config": the workdir's config.json or
        None}. Frozen parameters have the dtype, or the int8 form, that they were saved in.
        averaged_stats: the batch statistics of averaged weights (`mmjax.training.classification`), which are "ema".
    """
    path = epath.Path(path)
    if not (path / MANIFEST).exists() and (path / FOLDER).is_dir():
        newest = latest(path)
        if newest is None:
            raise CheckpointError(f"{path} holds no checkpoint")
        path = step_folder(path, newest)
    leaves = read_manifest(path)["leaves"]
    fields = ("params", "stats", "ema", "queues")
    averaged = "extra/averaged_stats/"
    chosen = {key: leaf for key, leaf in leaves.items() if key.split("/")[0] in fields or key.startswith(averaged)}
    nested = _with_int8(tree.unflatten(_read_leaves(path, chosen)))
    config = path.parent.parent / "config.json"
    loaded = {field: nested.get(field, {}) for field in fields}
    loaded["averaged_stats"] = nested.get("extra", {}).get("averaged_stats", {})
    return loaded | {"config": json.loads(config.read_text()) if config.exists() else None}


def _with_int8(nested: Mapping[str, Any]) -> Any:
    """Nested dicts whose int8 matrices are in two arrays each -> the same with `mmjax.nn.int8` matrices."""
    if not isinstance(nested, Mapping):
        return nested
    if nested.keys() == {int8.VALUES, int8.SCALE}:
        return int8.from_arrays(nested[int8.VALUES], nested[int8.SCALE])
    return {name: _with_int8(child) for name, child in nested.items()}


# ------------------------------------------------------------------------------------------------------------- write


class CheckpointWriter:
    """Writes checkpoints of one workdir in the background, one at a time; prunes the old ones.

    `save` copies nothing itself: it takes host arrays (`lift.fetch`). A failed save leaves nothing behind and is
    reported once: by the next `wait`.
    """

    def __init__(self, workdir: Any, keep: int = 2, environment: Mapping[str, Any] | None = None):
        """Removes the files of an interrupted save. keep: newest steps to hold, at least 2."""
        if keep < 2:
            raise CheckpointError(
                f"keep={keep}: at least 2 checkpoints are kept, so that a damaged one can be passed over"
            )
        self.workdir, self.keep, self.environment = epath.Path(workdir), keep, dict(environment or {})
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._folder = self.workdir / FOLDER
        self._frozen = FrozenStore(self.workdir)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self._folder} cannot be written: {error.strerror or error}") from error
        for path in list(self._folder.iterdir()) if self._folder.is_dir() else []:
            if path.name.startswith(TEMPORARY) or (path.name.isdecimal() and not (path / MANIFEST).exists()):
                remove_folder(path)

    def save(
        self,
        state: Any,
        step: int,
        data: Any = None,
        counters: Mapping[str, Any] | None = None,
        frozen: Collection[str] = (),
    ) -> None:
        """Starts writing a state of host arrays; waits for the save before, and raises what that one met.

        frozen: keys of leaves that no step changes (`frozen_keys`). They are stored once a run, beside the steps.
        """
        self.wait()
        manifest = {"step": step, "data": data, "counters": dict(counters or {})}
        self._thread = threading.Thread(target=self._run, args=(state, manifest, frozen), name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Until the save under way is durable. Raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, state: Any, manifest: dict[str, Any], frozen: Collection[str]) -> None:
        step = manifest["step"]
        if self._deleted:
            self._error = CheckpointError(f"step {step} was not saved: {self.workdir} was deleted during the run")
            return
        final = step_folder(self.workdir, step)
        temporary = self._folder / f"{TEMPORARY}{step}" if is_local(final) else final
        leaves = state_leaves(state)
        arrays = {key: host_copy(leaf) for key, leaf in leaves.items() if key not in frozen}
        try:
            stored = self._frozen.store({key: leaf for key, leaf in leaves.items() if key in frozen})
            self._write(temporary, final, arrays, make_manifest(state, **manifest, stored=stored))
            self._prune(step)
        except Exception as error:
            if temporary != final or not (final / MANIFEST).exists():
                remove_folder(temporary)
            size = sum(array.nbytes for array in arrays.values())
            # TensorStore has the system's error in its message alone.
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or "No space" in str(
                error
            )
            cause = " (disk full)" if full else ""
            self._error = CheckpointError(
                f"step {step} was not saved to {final}{cause}, {size} bytes needed: {type(error).__name__}: {error}"
            )

    @property
    def _deleted(self) -> bool:
        """Whether the workdir was deleted after the start: a checkpoint in a new one, without config.json, could not be
        loaded. In an object store there are no folders to delete."""
        return is_local(self.workdir) and not (self._folder.is_dir() or (self.workdir / "config.json").exists())

    def _write(self, temporary: epath.Path, final: epath.Path, arrays: dict[str, np.ndarray], manifest: Any) -> None:
        _discard(temporary)
        if is_local(final):
            self._write_files(temporary, arrays)
        else:  # Orbax and its checks work on a disk
            with tempfile.TemporaryDirectory() as folder:
                self._write_files(epath.Path(folder), arrays)
                upload(pathlib.Path(folder), final)
        # Read back before it counts: the older steps are removed for it.
        read_arrays(temporary / "arrays", {key: manifest["leaves"][key] for key in arrays})
        if is_local(final):
            sync_folder(temporary)
        write_file(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
        if temporary == final:
            return
        _discard(final)  # the same step once more, after a fall-back passed over a damaged one
        os.rename(temporary, final)
        sync_path(final.parent)

    def _write_files(self, folder: epath.Path, arrays: dict[str, np.ndarray]) -> None:
        """All but the manifest, into a local folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_arrays(folder / "arrays", arrays)
        (folder / FILES).write_text(json.dumps(file_digests(folder / "arrays"), indent=1))
        (folder / "environment.json").write_text(json.dumps(self.environment, indent=1, sort_keys=True))

    def _prune(self, newest: int) -> None:
        """Removes all but the `keep` newest steps up to the one just verified, those of an abandoned future, and
        frozen leaves that belong to none of the rest."""
        committed = steps(self.workdir)
        past = [step for step in committed if step <= newest]
        for step in [*past[: -self.keep], *(step for step in committed if step > newest)]:
            _discard(step_folder(self.workdir, step))
        self._frozen.prune(step_folder(self.workdir, step) for step in past[-self.keep :])
