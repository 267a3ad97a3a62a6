"""The contents of a weight file of any format: arrays by key, with shapes and dtypes known before any is read."""

import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mmjax.weights.table import Shape, WeightsError

ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    UnicodeDecodeError,
    NotImplementedError,
    RuntimeError,
)
"""All exceptions of `zipfile` for a damaged archive."""


@dataclass(frozen=True)
class Record:
    """One array of a file: shape and dtype from the header, and a function that reads it."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Arrays(Mapping[str, np.ndarray]):
    """key -> array, read on access; NaN and infinity are refused unless `allow_nan`."""

    def __init__(self, records: Mapping[str, Record], file: str, allow_nan: bool = False):
        self._records, self._file, self._allow_nan = records, file, allow_nan

    def __getitem__(self, key: str) -> np.ndarray:
        array = self._records[key].read()
        if not self._allow_nan and array.dtype.kind in "fV" and not np.isfinite(array).all():
            bad = int(np.size(array) - np.count_nonzero(np.isfinite(array)))
            raise WeightsError(
                f"{self._file}: {key} holds {bad} values that are NaN or infinite (allow_nan admits them)"
            )
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: object) -> bool:
        return key in self._records


@dataclass(frozen=True)
class Weights:
    """The contents of a weight file. `arrays` reads lazily; `shapes` and `dtypes` cost nothing."""

    arrays: Mapping[str, np.ndarray]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, np.dtype]
    file: str
    metadata: Mapping[str, str]


def check_downloaded(path: pathlib.Path) -> None:
    """Raises WeightsError for what an incomplete download leaves in place of weights: nothing, Git LFS's pointer to
    them, or a web page."""
    with path.open("rb") as file:
        start = file.read(256)
    if not start:
        raise WeightsError(f"{path}: an empty file")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path}: a Git LFS pointer, not the weights: `git lfs pull` fetches them")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(f"{path}: a web page, not weights: the server answered the download with an error")
