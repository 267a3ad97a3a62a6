"""Scalars in TensorBoard's format, written by the thread of the run, to a disk or to an object store."""

import os
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from mmjax.training.storage import is_local

UPLOAD_SECONDS = 60
"""An object store has no append: there the file is replaced as a whole, at most so often."""


class EventFile:
    """One event file, with the records of one process in one run.

    tensorboardX's own writer hands events to a thread that dies of a full disk; the queue before it then fills and
    blocks the run. Here a failed write raises OSError, and the next one writes the missing records.
    """

    def __init__(self, folder: Any, first_step: int):
        """first_step: TensorBoard drops the records of earlier files in the folder for this step and later ones."""
        self._folder = epath.Path(folder)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path, self._records, self._written, self._uploaded = self._folder / name, b"", 0, 0.0
        self._record(file_version="brain.Event:2")
        self._record(step=first_step, session_log={"status": "START"})

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in numbers.items()]
        self._record(step=step, summary={"value": values})
        if is_local(self._path) or time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the records that are not written yet."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if is_local(self._path):
            with open(self._path, "ab") as file:
                file.truncate(self._written)  # the rest of a failed write
                file.write(self._records)
            self._written, self._records = self._written + len(self._records), b""
        else:
            self._path.write_bytes(self._records)
            self._uploaded = time.monotonic()

    def _record(self, **fields: Any) -> None:
        """Appends one event: the fields of TensorBoard's event.proto."""
        from tensorboardX.proto import event_pb2

        event: Any = event_pb2
        data = event.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        self._records += length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    """The masked CRC-32C of TFRecord files."""
    from tensorboardX.crc32c import crc32c

    value = crc32c(data)
    return struct.pack("<I", (((value >> 15) | (value << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
