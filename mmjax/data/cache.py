"""Arrays cached on disk between runs: renderings, features of frozen networks. All can be computed again."""

import contextlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping

import numpy as np

Columns = Mapping[str, np.ndarray]


def cache_folder() -> pathlib.Path:
    """MMJAX_CACHE, else $XDG_CACHE_HOME/mmjax, else ~/.cache/mmjax."""
    if os.environ.get("MMJAX_CACHE"):
        return pathlib.Path(os.environ["MMJAX_CACHE"])
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mmjax"


def cached(
    file: pathlib.Path, compute: Callable[[], Columns], valid: Callable[[Columns], bool] = lambda stored: True
) -> Columns:
    """The named arrays of an .npz file, or if it is not there those of `compute`, which are then written to it.

    A file that is damaged, or that `valid` does not accept, is made anew; one that cannot be written costs the
    computation again the next time, no more.
    """
    try:
        with file.open("rb") as opened, np.load(opened) as archive:
            stored = {name: archive[name] for name in archive.files}
        if valid(stored):
            return stored
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    columns = compute()
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as target:
            np.savez_compressed(target, **columns)  # type: ignore[arg-type]
        temporary.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return columns
