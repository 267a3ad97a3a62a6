"""The files of a workdir, on a disk or in an object store (`gs://`, `s3://`: whatever `etils.epath` knows).

`gs://` needs gcsfs, which the extra gcs installs, `s3://` needs s3fs.
"""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
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


@contextmanager
def local_copy(folder: Any, names: Iterable[str] | None = None) -> Iterator[pathlib.Path]:
    """The files of a folder on this machine's disk, for code that reads with `pathlib`: the folder itself, or of one in
    an object store a copy, until the end of the block.

    names: slash paths below the folder; by default the files that lie directly in it.
    """
    folder = epath.Path(folder)
    if is_local(folder):
        yield pathlib.Path(folder)
        return
    if names is None:
        names = [path.name for path in folder.iterdir() if not path.is_dir()] if folder.is_dir() else []
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            target = pathlib.Path(temporary) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((folder / name).read_bytes())
        yield pathlib.Path(temporary)


def upload(local: pathlib.Path, folder: Any) -> None:
    """Writes every file below a local folder into `folder`."""
    for file in sorted(path for path in local.rglob("*") if path.is_file()):
        write_file(epath.Path(folder) / file.relative_to(local).as_posix(), file.read_bytes())


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
    """Optional writes of a run: curves, pictures, tables. A failure ends no run; each file's first is reported.

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
