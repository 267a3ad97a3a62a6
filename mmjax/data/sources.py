"""Random-access sources: `source[i]` is a record, a dict with encoded images as bytes, captions as str, labels as int.

A source knows nothing of order, decoding or batches. Files are opened when a record is asked for, so that a source
travels to worker processes as a few paths.
"""

import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from mmjax.data.decoding import BadRecord
from mmjax.errors import MmjaxError

Record: TypeAlias = dict[str, Any]


class Source(Protocol):
    """What a pipeline reads from.

    name: for messages. fingerprint: hex; the same as long as the records and their order are the same.
    `source[i]` may raise BadRecord; `record_name(i)` names record i for the quarantine file, without reading it.
    """

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...
    def record_name(self, index: int, /) -> str: ...


class ArraySource:
    """Columns in memory: arrays [n, ...] and sequences of n values.

        ArraySource(image=images, label=labels, name="digits")

    Raises MmjaxError for columns of different lengths.
    """

    def __init__(self, *, name: str = "arrays", **columns: np.ndarray | Sequence[Any]):
        lengths = {key: len(column) for key, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise MmjaxError(f"{name}: the columns of a source must have one length, these have {lengths}")
        self.name, self.columns = name, columns
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        return {key: _scalar(column[index]) for key, column in self.columns.items()}

    def record_name(self, index: int) -> str:
        return f"{self.name}[{index}]"

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for key, column in self.columns.items():
            if isinstance(column, np.ndarray):
                digest.update(f"{key}{column.dtype}{column.shape}".encode())
                digest.update(np.ascontiguousarray(column).tobytes())
            else:
                digest.update(f"{key}{list(column)!r}".encode())
        return digest.hexdigest()

    def select(self, indices: Sequence[int], name: str | None = None) -> "ArraySource":
        """The records at `indices`, in that order."""
        chosen: Mapping[str, Any] = {
            key: column[np.asarray(indices)] if isinstance(column, np.ndarray) else [column[i] for i in indices]
            for key, column in self.columns.items()
        }
        return ArraySource(name=name or self.name, **chosen)


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def read_bytes(path: pathlib.Path) -> bytes:
    """A file's bytes; BadRecord "file: missing" or "file: unreadable"."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadRecord("file: missing", str(path)) from error
    except OSError as error:
        raise BadRecord("file: unreadable", str(path), str(error)) from error


def records(source: Source) -> Iterator[Record]:
    """All records in order; raises the first BadRecord."""
    return (source[i] for i in range(len(source)))
