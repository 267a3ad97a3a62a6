"""Random-access sources: `source[i]` is a record, a dict with encoded images as bytes, captions as str, labels as int.

A source knows nothing of order, decoding or batches. Files are opened on access, so that a source is sent to worker
processes as a few paths.
"""

import gzip
import hashlib
import math
import os
import pathlib
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from mmjax.data.decoding import BadRecord
from mmjax.errors import MmjaxError

Record: TypeAlias = dict[str, Any]


class Source(Protocol):
    """The source of a pipeline.

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

    >>> source = ArraySource(image=np.zeros((3, 8, 8, 3), np.uint8), label=np.arange(3), name="digits")
    >>> len(source), source[1]["label"], source.record_name(1)
    (3, 1, 'digits[1]')

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


class RandomAccess:
    """Anything with `len` and `[i]`: Grain's ArrayRecordDataSource, tfds.data_source, a `datasets.Dataset`.

    to_record: item -> record. fingerprint: what identifies the items and their order; by default the source's repr.
    """

    def __init__(self, items: Any, to_record: Callable[[Any], Record], name: str, fingerprint: str | None = None):
        self.items, self.to_record, self.name = items, to_record, name
        self.fingerprint = fingerprint or hashlib.sha256(f"{name} {items!r} {len(items)}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Record:
        return self.to_record(self.items[index])

    def record_name(self, index: int) -> str:
        return f"{self.name}[{index}]"


class Rotation:
    """A source whose epochs differ: all records of `always`, then those of one of `parts`, which take turns.

    Part `epoch % len(parts)`, as BLIP's pre-training reads LAION (data/pretrain_dataset.py:39-45). Parts may differ in
    length; of each, an epoch has as many records as the shortest has. `len` is that of an epoch. Indices are of
    `always`, then of the first part, then of the second.

    >>> numbers = Rotation(ArraySource(n=[0, 1]), [ArraySource(n=[2, 3]), ArraySource(n=[4, 5])])
    >>> [[numbers[numbers.index(epoch, i)]["n"] for i in range(len(numbers))] for epoch in range(3)]
    [[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 2, 3]]

    Raises MmjaxError for no part.
    """

    def __init__(self, always: Source, parts: Sequence[Source]):
        if not parts:
            raise MmjaxError(f"{always.name}: nothing to rotate: a rotation needs a part")
        self.sources = (always, *parts)
        self.shortest = min(map(len, parts))
        self.name = f"{always.name} + one of {', '.join(part.name for part in parts)}"

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(source.fingerprint for source in self.sources).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.sources[0]) + self.shortest

    def index(self, epoch: int, position: int) -> int:
        """The index of the record at a position of an epoch."""
        always, turn = len(self.sources[0]), epoch % (len(self.sources) - 1)
        return position if position < always else position + turn * self.shortest

    def __getitem__(self, index: int) -> Record:
        source, local = self._located(index)
        return source[local]

    def record_name(self, index: int) -> str:
        source, local = self._located(index)
        return source.record_name(local)

    def _located(self, index: int) -> tuple[Source, int]:
        turn, local = divmod(index - len(self.sources[0]), self.shortest)
        return (self.sources[0], index) if turn < 0 else (self.sources[1 + turn], local)


IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """An IDX file (MNIST and its family), gzipped or not, as an array in the machine's byte order.

        ArraySource(image=read_idx("train-images-idx3-ubyte.gz"), label=read_idx("train-labels-idx1-ubyte.gz"))

    Raises MmjaxError: not IDX, or of another length than in its header.
    """
    file = pathlib.Path(path)
    with file.open("rb") as opened:
        raw = opened.read(2)
    try:
        with gzip.open(file) if raw == b"\x1f\x8b" else file.open("rb") as opened:
            head = opened.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in IDX_TYPES:
                raise MmjaxError(f"{file}: not an IDX file, it starts with {head!r}")
            dtype = np.dtype(IDX_TYPES[head[2]])
            shape = struct.unpack(f">{head[3]}I", opened.read(4 * head[3]))
            size = math.prod(shape) * dtype.itemsize
            data = opened.read(size + 1)  # bounded, however much gzip would unpack
    except (EOFError, OSError, struct.error, zlib.error) as error:
        raise MmjaxError(f"{file}: {type(error).__name__}: {error}") from error
    if len(data) != size:
        count = "more" if len(data) > size else f"{len(data)}"
        raise MmjaxError(f"{file}: the header has {list(shape)} {dtype.name}, {size} bytes; there are {count}")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
