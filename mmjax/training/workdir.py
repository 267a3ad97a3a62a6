"""The files of a workdir beside checkpoints: the lock of its one writer, config.json and origins.json."""

import dataclasses
import fcntl
import json
import os
import pathlib
import socket
import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath

from mmjax.training.checkpoint_format import CheckpointError
from mmjax.training.experiment import ExperimentConfig
from mmjax.training.storage import is_local, write_changed


class Lock:
    """One writer a workdir: an advisory lock that dies with its process, however that ends."""

    def __init__(self, workdir: Any):
        """Makes the workdir.

        Raises CheckpointError: it cannot be written, its store needs a package (named), or another process (named)
        uses it.
        """
        self._file = None
        try:
            workdir = epath.Path(workdir)
        except KeyError as error:
            raise CheckpointError(f"workdir {workdir}: unknown scheme; gs://, s3:// or a folder") from error
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if not is_local(workdir):
                return
            self._file = open(os.path.join(workdir, ".lock"), "a+")  # noqa: SIM115
        except ImportError as error:
            raise CheckpointError(f"workdir {workdir}: {error}") from error
        except OSError as error:
            raise CheckpointError(f"workdir {workdir} cannot be written: {error.strerror or error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise CheckpointError(f"workdir {workdir} is in use by another run: {holder}") from error
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def write_config(
    config: ExperimentConfig, workdir: str | os.PathLike[str], experiment_file: str | None = None
) -> list[str]:
    """Writes config.json, and before it the files of `save_assets`: what `mmjax.load` needs beside the weights.

    Call it once the run is certain: its checkpoint was accepted, or there is none. Each file is replaced as a whole,
    and only where it changes.

    Returns the fields that a config.json already there had otherwise: "steps 100 -> 200".
    """
    recipe: Any = config
    system, model = recipe.model()
    workdir = epath.Path(workdir)
    contents = {"system": system, "model": dataclasses.asdict(model), "layout": "mmjax"}
    path = workdir / "config.json"
    before = json.loads(path.read_text()).get("experiment", {}) if path.exists() else {}
    with tempfile.TemporaryDirectory() as local:  # recipes write with pathlib; the workdir may be in an object store
        contents |= recipe.save_assets(pathlib.Path(local))
        assets = [file for file in sorted(pathlib.Path(local).rglob("*")) if file.is_file()]
        files = {file.relative_to(local).as_posix(): file.read_bytes() for file in assets}
    contents |= {"experiment": dataclasses.asdict(config), "experiment_file": experiment_file}
    text = json.dumps(contents, indent=2, default=str) + "\n"
    now = json.loads(text)["experiment"]
    for name, data in (files | {"config.json": text.encode()}).items():
        _write(workdir / name, data)
    return [f"{name} {before.get(name)} -> {now[name]}" for name in now if before and before.get(name) != now[name]]


def write_origins(origins: Mapping[str, str], workdir: str | os.PathLike[str]) -> None:
    """Writes origins.json: the path of each initial parameter and its source (`mmjax.training.initialize`)."""
    _write(epath.Path(workdir) / "origins.json", (json.dumps(origins, indent=1) + "\n").encode())


def _write(path: Any, data: bytes) -> None:
    """Replaces a file as a whole where it changes. Raises CheckpointError if it cannot be written."""
    try:
        write_changed(path, data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
