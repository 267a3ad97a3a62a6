"""The files of a workdir, on a disk or in an object store (`gs://`, `s3://`: whatever `etils.epath` knows)."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath


def is_local(path: Any) -> bool:
    """Whether a path is on a disk of this machine."""
    return "://" not in os.fspath(path)


def write_file(path: Any, data: bytes) -> None:
    """Replaces a file by `data`, or leaves it as it was; makes its folder.

    On a disk through a synced temporary file beside it. An object of a store appears when it is whole.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_changed(path: epath.Path, data: bytes) -> None:
    """`write_file`, unless the file already holds `data`."""
    if not path.exists() or path.read_bytes() != data:
        write_file(path, data)


def sync_folder(folder: Any) -> None:
    """Flushes every file and folder below to the disk: a rename must not become durable before what it names."""
    for parent, _, names in os.walk(folder):
        for path in [*(os.path.join(parent, name) for name in names), parent]:
            sync_path(path)


def sync_path(path: Any) -> None:
    """Flushes one file, or the names in one folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Any) -> None:
    """Removes a folder with all that is in it, if it is there."""
    folder = epath.Path(folder)
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.rmtree()


class BestEffort:
    """Writes without which a run goes on: curves, pictures, tables. The first failure of each file is reported.

    attempt = BestEffort(warn)
    with attempt(path):
        path.write_text(...)
    """

    def __init__(self, warn: Callable[[str], None]):
        self._warn, self._failed = warn, set[str]()

    @contextmanager
    def __call__(self, path: Any) -> Iterator[None]:
        # Clients of object stores raise errors of their own.
        errors: type[Exception] = OSError if is_local(path) else Exception
        try:
            yield
        except errors as error:
            if os.fspath(path) not in self._failed:
                self._failed.add(os.fspath(path))
                self._warn(f"{path} is not written, the run goes on without: {type(error).__name__}: {error}")
