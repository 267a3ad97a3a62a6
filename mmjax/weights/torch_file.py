"""Reads PyTorch files without PyTorch and without running anything that is in them.

A PyTorch file is a pickle beside raw storages. A pickle is a program; this module interprets the part of it that
describes nested dictionaries of tensors. It knows the few globals below, maps each to an inert record, and stops at any
other name with an error that names it. Settings beside the weights become placeholders. Python's unpickler never reads
the file.

Three containers are read: the zip of PyTorch >= 1.6, TorchScript archives (the same zip; its classes become plain
trees of attributes: OpenAI's CLIP files), and the format before 1.6 (five pickles, then the storages).
"""

import io
import math
import mmap
import pathlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from mmjax.weights.records import ZIP_ERRORS, Record
from mmjax.weights.table import Shape, WeightsError

STORAGES: Mapping[str, np.dtype] = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
"""Names of element types: a pickle has them as globals, but they are not called."""

MAX_PICKLE = 2**26
MAX_LEAVES = 10**6
MAX_NAME = 2**12
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass
class Script:
    """An object of a TorchScript class: its attributes, without its code."""

    fields: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """A block of raw elements, named and not yet read."""

    key: str
    dtype: np.dtype
    count: int
    first: int = 0


@dataclass(frozen=True)
class Tensor:
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: Shape
    stride: Shape


# -------------------------------------------------------------------------------------------------------------- globals


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v2: the view must lie inside its storage and not be larger than it."""
    if not isinstance(storage, Storage) or not _natural(offset):
        raise ValueError("a tensor without a storage")
    for sizes in (shape, stride):  # never shown: the repr of nested tuples can be made to fill any memory
        if not isinstance(sizes, tuple) or len(sizes) > 32 or not all(_natural(size) for size in sizes):
            raise ValueError("a tensor whose shape or strides are not tuples of whole numbers")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last >= storage.count or math.prod(shape) > storage.count):
        raise ValueError(f"a tensor {list(shape)} with strides {list(stride)} outside its {storage.count} elements")
    return Tensor(storage, offset, shape, stride)


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter without a tensor")
    return tensor


def _first(value: Any, *_: Any) -> Any:
    return value


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    return {_key(pair[0]): pair[1] for pair in pairs}


CALLABLES: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _first,
    # TorchScript's way of writing typed lists and dictionaries.
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
}
"""The ten globals that may be called, and the function called instead of each."""


class Inert:
    """A value that carries no weight, of a class that is not even imported: a placeholder."""

    def __init__(self, *_: Any):
        pass


INERT = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray)|_codecs\.encode|__builtin__\.set|builtins\.set"
    r"|collections\.(defaultdict|Counter)|builtins\.(int|float|list|dict)|datetime\.(datetime|date|timedelta)"
    r"|torch\.(device|serialization\._get_layout|(b?float(16|32|64)|int(8|16|32|64)|bool))"
    r"|omegaconf\.[\w.]+|yacs\.config\.CfgNode|easydict\.EasyDict"
)
"""What training loops save beside weights: settings, paths, numbers, states of random generators."""


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _key(value: Any) -> str | int:
    # Only these: hashing a deeply nested tuple would exhaust the C stack.
    if not isinstance(value, str | int):
        raise ValueError(f"a dictionary key of type {type(value).__name__}")
    return value


# -------------------------------------------------------------------------------------------------------------- machine


class _Mark:
    """The beginning of a run of stack items."""


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: Mapping[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": _Mark,
}
_LITERALS = re.compile(r"(SHORT_)?(BIN)?(INT[12]?|LONG[14]?|FLOAT|STRING|UNICODE8?|BYTES)")


class Machine:
    """Interprets one pickle. `storage(arguments)` makes a Storage of a persistent id."""

    def __init__(self, storage: Callable[[tuple[Any, ...]], Storage], scripted: bool = False):
        self.storage, self.scripted = storage, scripted
        self.stack: list[Any] = []
        self.memo: dict[Any, Any] = {}

    def run(self, file: Any) -> Any:
        """The object that the pickle describes; raises ValueError at anything that is not in the list."""
        for opcode, argument, _ in pickletools.genops(file):  # decodes, never executes
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if _LITERALS.fullmatch(name):
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self.stack.append(_EMPTY[name]())
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                self.stack.append(self.memo[argument])
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                self.memo[argument] = self.stack[-1]
            elif name == "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            elif name not in ("PROTO", "FRAME"):
                self.step(name, argument)
        raise ValueError("the pickle has no end")

    def step(self, name: str, argument: Any) -> None:
        """The opcodes that build something out of the stack."""
        stack = self.stack
        if name in ("GLOBAL", "STACK_GLOBAL"):
            module, attribute = argument.split(" ", 1) if name == "GLOBAL" else self.pop(2)
            stack.append(self.find(_as(str, module) + "." + _as(str, attribute)))
        elif name in ("REDUCE", "NEWOBJ"):
            target, arguments = self.pop(2)
            stack.append(self.call(target, arguments))
        elif name == "BUILD":
            target, state = self.pop(2)
            stack.append(self.build(target, state))
        elif name == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(self.pop(int(name[-1])))
        elif name == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif name == "LIST":
            stack.append(self.since_mark())
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self.since_mark()
            if not isinstance(stack[-1], Inert):
                _as(list, stack[-1]).extend(items)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            items = list(self.pop(2)) if name == "SETITEM" else self.since_mark()
            if name == "DICT":
                stack.append({})
            if not isinstance(stack[-1], Inert):
                pairs = zip(items[::2], items[1::2], strict=True)
                _as(dict, stack[-1]).update({_key(key): value for key, value in pairs})
        else:
            raise ValueError(f"the opcode {name} has no business in a weight file")

    def pop(self, n: int) -> tuple[Any, ...]:
        if len(self.stack) < n:
            raise ValueError("the pickle takes more from its stack than there is")
        items = tuple(self.stack[-n:])
        del self.stack[-n:]
        return items

    def since_mark(self) -> list[Any]:
        start = next(i for i in range(len(self.stack) - 1, -1, -1) if isinstance(self.stack[i], _Mark))
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def find(self, name: str) -> Any:
        if name in STORAGES:
            return STORAGES[name]
        if name in CALLABLES:
            return CALLABLES[name]
        if INERT.fullmatch(name):
            return Inert
        if self.scripted and name.startswith("__torch__."):
            return Script
        raise ValueError(f"it asks for {name[:200]}; only tensors and dictionaries are read, no code is run")

    def call(self, target: Any, arguments: Any) -> Any:
        if target not in (Script, Inert) and target not in CALLABLES.values():
            raise ValueError("it calls something that is not a function")
        return target(*_as(tuple, arguments))

    def build(self, target: Any, state: Any) -> Any:
        if isinstance(target, Script):
            target.fields.update(_as(dict, state))
        elif not isinstance(target, dict | Inert):  # an OrderedDict's attributes (PyTorch's _metadata) carry no weight
            raise ValueError("it sets attributes of something that is not a module")
        return target


def _as(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {kind.__name__} was expected, not a {type(value).__name__}")
    return value


def _interpret(machine: Machine, file: Any, path: pathlib.Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # Python warns of odd escapes in damaged strings
            return machine.run(file)
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        StopIteration,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        raise WeightsError(f"{path}: refused: {str(error) or type(error).__name__}") from None


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a tree by name: "/" between dictionaries, "." between a script's modules; the rest is dropped."""
    queue, visited = [(value, name)], 0
    while queue:
        value, name = queue.pop()
        visited += 1
        if visited > MAX_LEAVES or len(name) > MAX_NAME:
            raise WeightsError(f"more than {MAX_LEAVES} entries, or a name longer than {MAX_NAME}")
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Script | dict):
            joint = "." if isinstance(value, Script) else "/"
            items = value.fields if isinstance(value, Script) else value
            queue += [(child, f"{name}{joint}{key}" if name else str(key)) for key, child in reversed(items.items())]


def _view(raw: bytes, tensor: Tensor) -> np.ndarray:
    flat = np.frombuffer(raw, tensor.storage.dtype)[tensor.storage.first :][: tensor.storage.count]
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, flat.dtype)
    strides = tuple(step * flat.itemsize for step in tensor.stride)
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides))


def _records(tree: Any, raw: Callable[[str], bytes], path: pathlib.Path) -> dict[str, Record]:
    records: dict[str, Record] = {}
    try:
        tensors = list(_tensors(tree))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    for key, tensor in tensors:
        if key in records:
            raise WeightsError(f"{path}: the key {key} stands twice")

        def read(tensor: Tensor = tensor) -> np.ndarray:
            return _view(raw(tensor.storage.key), tensor).reshape(tensor.shape)

        records[key] = Record(tensor.shape, tensor.storage.dtype, read)
    return records


# ----------------------------------------------------------------------------------------------------------- containers


def read_torch(path: pathlib.Path) -> dict[str, Record]:
    """The tensors of a PyTorch file by key. Raises WeightsError, naming the file and an unknown global."""
    with path.open("rb") as file:
        head = file.read(4)
    if head[:2] == b"PK":
        try:
            with zipfile.ZipFile(path) as archive:
                return _read_zip(archive, path)
        except ZIP_ERRORS as error:
            raise WeightsError(f"{path}: not a PyTorch file, or cut: {error}") from None
    if head[:1] == b"\x80":
        return _read_legacy(path)
    raise WeightsError(f"{path}: not a PyTorch file: it begins with {head!r}")


def _read_zip(archive: zipfile.ZipFile, path: pathlib.Path) -> dict[str, Record]:
    members = {member.filename: member for member in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise WeightsError(f"{path}: a name stands twice in its archive")
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError(f"{path}: not a PyTorch file: its archive has no single data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
        raise WeightsError(f"{path}: was written on a big-endian machine")
    for name, member in members.items():
        if member.compress_type != zipfile.ZIP_STORED and not name.startswith(f"{root}code/"):
            raise WeightsError(f"{path}: {name} is compressed, which PyTorch never does: perhaps a bomb")
    if members[pickles[0]].file_size > MAX_PICKLE:
        raise WeightsError(f"{path}: its data.pkl is larger than {MAX_PICKLE} bytes")

    def storage(arguments: Any) -> Storage:
        _, dtype, key, _, count = _as(tuple, arguments)[:5]
        member = members.get(f"{root}data/{_as(str, key)}")
        if member is None:
            raise ValueError(f"the storage data/{key[:80]} is not there")
        if not isinstance(dtype, np.dtype) or not _natural(count) or count * dtype.itemsize != member.file_size:
            raise ValueError(f"the storage data/{key} has {member.file_size} bytes, unlike its tensors")
        return Storage(member.filename, dtype, count)

    def raw(name: str) -> bytes:
        try:
            with zipfile.ZipFile(path) as fresh:
                return fresh.read(name)
        except ZIP_ERRORS as error:
            raise WeightsError(f"{path}: {name} is cut or damaged: {error}") from None

    machine = Machine(storage, scripted=f"{root}constants.pkl" in members)
    return _records(_interpret(machine, io.BytesIO(archive.read(pickles[0])), path), raw, path)


def _read_legacy(path: pathlib.Path) -> dict[str, Record]:
    """PyTorch < 1.6: five pickles (magic, version, system, object, storage keys), then the storages."""

    def storage(arguments: Any) -> Storage:
        _, dtype, key, _, count, *view = _as(tuple, arguments)
        first, length = (0, count) if not view or view[0] is None else _as(tuple, view[0])[1:3]
        if (
            not isinstance(dtype, np.dtype)
            or not isinstance(key, str)
            or not all(map(_natural, (first, length, count)))
        ):
            raise ValueError("a storage without name or size")
        if first + length > count:
            raise ValueError(f"a view outside the storage {key[:80]}")
        sizes[key] = (dtype, count)
        return Storage(key, dtype, length, first)

    def no_storage(arguments: Any) -> Storage:
        raise ValueError("a storage before the object")

    sizes: dict[str, tuple[np.dtype, int]] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if _interpret(Machine(no_storage), data, path) != LEGACY_MAGIC:
            raise WeightsError(f"{path}: not a PyTorch file: a pickle without PyTorch's magic number")
        _interpret(Machine(no_storage), data, path)
        system = _interpret(Machine(no_storage), data, path)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise WeightsError(f"{path}: was written on a big-endian machine")
        tree = _interpret(Machine(storage), data, path)
        keys = _interpret(Machine(no_storage), data, path)
        spans = _legacy_spans(keys, sizes, data.tell(), len(data), path)

    def raw(key: str) -> bytes:
        with path.open("rb") as file:
            file.seek(spans[key][0])
            return file.read(spans[key][1])

    return _records(tree, raw, path)


def _legacy_spans(
    keys: Any, sizes: Mapping[str, tuple[np.dtype, int]], start: int, end: int, path: pathlib.Path
) -> dict[str, tuple[int, int]]:
    """{storage: (offset, bytes)}."""
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(sizes):
        raise WeightsError(f"{path}: its list of storages does not fit its tensors")
    spans = {}
    with path.open("rb") as file:
        for key in keys:
            dtype, count = sizes[key]
            file.seek(start)
            if int.from_bytes(file.read(8), "little") != count or start + 8 + count * dtype.itemsize > end:
                raise WeightsError(f"{path}: the storage {key[:80]} is cut or has another size than its tensors")
            spans[key] = (start + 8, count * dtype.itemsize)
            start += 8 + count * dtype.itemsize
    return spans
