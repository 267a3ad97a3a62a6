"""What a workdir holds beside checkpoints: the lock of its one writer, and config.json."""

import dataclasses
import fcntl
import json
import os
import pathlib
import socket
from typing import Any

from etils import epath

from mmjax.training.checkpoint_format import CheckpointError, is_local
from mmjax.training.experiment import ExperimentConfig


class Lock:
    """One writer a workdir: an advisory lock that dies with its process, however that ends."""

    def __init__(self, workdir: Any):
        """Makes the workdir. Raises CheckpointError: it is not writable, or another process holds it (pid told)."""
        self._file = None
        workdir = epath.Path(workdir)
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if not is_local(workdir):
                return
            self._file = open(os.path.join(workdir, ".lock"), "a+")  # noqa: SIM115
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
    """Writes config.json: what `mmjax.load` needs of the model, and the experiment's fields.

    Returns the fields that a config.json already there had otherwise: "steps 100 -> 200".
    """
    recipe: Any = config
    system, model = recipe.model()
    told = {"system": system, "model": dataclasses.asdict(model), "layout": "mmjax"}
    told |= recipe.save_assets(pathlib.Path(workdir))
    told |= {"experiment": dataclasses.asdict(config), "experiment_file": experiment_file}
    path = epath.Path(workdir) / "config.json"
    text = json.dumps(told, indent=2, default=str) + "\n"
    before = json.loads(path.read_text()).get("experiment", {}) if path.exists() else {}
    now = json.loads(text)["experiment"]
    temporary = path.parent / "config.json.tmp"
    temporary.write_text(text)
    temporary.replace(path)
    return [f"{name} {before.get(name)} -> {now[name]}" for name in now if before and before.get(name) != now[name]]
