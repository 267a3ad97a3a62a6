"""Reading and writing weight files: .safetensors, sharded .safetensors, .npz and PyTorch's own formats.

A weight file comes from a stranger. Nothing in it is ever executed, every size in it is checked against the bytes that
are there before anything is allocated, and every error names the file and the key. Arrays are read one at a time, on
access.
"""

import itertools
import json
import math
import os
import pathlib
import secrets
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mmjax.weights.records import ZIP_ERRORS, Arrays, Record, Weights, check_downloaded
from mmjax.weights.table import Shape, WeightsError
from mmjax.weights.torch_file import read_torch

# The format's own cap is 100 MB. 8 MiB suffices for 60,000 tensors, and bounds the memory of a hostile header.
MAX_HEADER = 2**23

SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


def read_weights(path: str | os.PathLike[str], *, allow_nan: bool = False) -> Weights:
    """Opens a weight file; the format follows from its name and is checked against its first bytes.

    path: .safetensors, .safetensors.index.json (or .bin.index.json), .npz, or a PyTorch file (.pt, .pth, .bin, .tar):
    zip, TorchScript archive or the format before PyTorch 1.6. Dictionaries within a PyTorch file are joined with "/":
    {"state_dict": {"fc.bias": ...}} has the key "state_dict/fc.bias".
    allow_nan: admit arrays with NaN or infinity, which are otherwise refused when read.
    Raises WeightsError: a file that is cut, lies about its sizes, repeats a key, or contains code.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    check_downloaded(path)
    metadata: Mapping[str, str] = {}
    if path.name.endswith(".index.json"):
        records = _read_index(path)
    elif path.suffix == ".safetensors":
        records, metadata = _read_safetensors(path)
    elif path.suffix == ".npz":
        records = _read_npz(path)
    elif path.suffix in (".pt", ".pth", ".bin", ".tar"):
        records = read_torch(path)
    else:
        raise WeightsError(
            f"{path}: weights are read from .safetensors, .index.json, .npz, .pt, .pth, .bin and .tar files, "
            f"not from {path.suffix or 'a file without suffix'}"
        )
    shapes = {key: record.shape for key, record in records.items()}
    dtypes = {key: record.dtype for key, record in records.items()}
    return Weights(Arrays(records, str(path), allow_nan), shapes, dtypes, str(path), metadata)


# ---------------------------------------------------------------------------------------------------------- safetensors


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, Record], dict[str, str]]:
    """Validates the whole header: https://huggingface.co/docs/safetensors, "Format"."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise WeightsError(
                f"{path}: not a safetensors file, or cut: its header should be {length} bytes, it has {size}"
            )
        if length > MAX_HEADER:
            raise WeightsError(f"{path}: a header of {length} bytes; at most {MAX_HEADER} are read")
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise WeightsError(f"{path}: not a safetensors file: its header does not begin with '{{'")
    header = parse_json(raw, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path}: __metadata__ should map strings to strings")
    spans = {key: _span(entry, f"{path}: {key}") for key, entry in header.items()}
    start = 8 + length
    _check_cover(spans, size - start, path)
    records = {key: _stored(path, start + begin, shape, dtype) for key, (shape, dtype, begin, _) in spans.items()}
    return records, metadata


def parse_json(raw: bytes, path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file, refusing repeated keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise WeightsError(f"{path}: the key {repeated[:200]} stands twice in its JSON")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except WeightsError:
        raise
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its JSON cannot be read: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: its JSON should be an object, it is a {type(value).__name__}")
    return value


def _span(entry: Any, name: str) -> tuple[Shape, np.dtype, int, int]:
    """(shape, dtype, begin, end) of one header line."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{name}: its header line should hold dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > 32:
        raise WeightsError(f"{name}: shape and data_offsets should be lists of whole numbers")
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise WeightsError(f"{name}: dtype {str(entry['dtype'])[:40]} is not one of {', '.join(SAFETENSORS_DTYPES)}")
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise WeightsError(
            f"{name}: {entry['dtype']} {shape} needs {size} bytes, data_offsets {offsets} hold "
            f"{offsets[1] - offsets[0]}"
        )
    return tuple(shape), dtype, offsets[0], offsets[1]


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_cover(spans: Mapping[str, tuple[Shape, np.dtype, int, int]], size: int, path: pathlib.Path) -> None:
    """The arrays lie end to end and fill the file: no gap, no overlap, nothing behind."""
    position = 0
    for key, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != position:
            problem = "overlaps the array before it" if begin < position else "leaves a gap before it"
            raise WeightsError(f"{path}: {key} {problem} (begins at byte {begin}, expected {position})")
        if end > size:
            raise WeightsError(f"{path}: {key} ends at byte {end} of the data, the file has {size}: it is cut")
        position = end
    if position != size:
        raise WeightsError(f"{path}: {size - position} bytes after the last array belong to no key")


def _stored(path: pathlib.Path, offset: int, shape: Shape, dtype: np.dtype) -> Record:
    def read() -> np.ndarray:
        with path.open("rb") as file:
            file.seek(offset)
            raw = file.read(math.prod(shape) * dtype.itemsize)
        return np.frombuffer(raw, dtype).reshape(shape)

    return Record(shape, dtype, read)


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays as one .safetensors file, whole or not at all: into a temporary file beside it, synced, renamed."""
    path = pathlib.Path(path)
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    # The widest elements come first, so that every array is aligned to its own elements.
    for key, array in sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if array.dtype not in names:
            raise WeightsError(f"{path}: {key} is {array.dtype}, which safetensors cannot hold")
        offsets = [position, position + array.nbytes]
        header[key] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        position = offsets[1]
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    chunks = (arrays[key].tobytes() for key in header if key != "__metadata__")
    write_atomically(path, itertools.chain([len(raw).to_bytes(8, "little"), raw], chunks))


def write_atomically(path: pathlib.Path, chunks: Iterable[bytes]) -> None:
    """Replaces a file by the chunks, or leaves it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- shards and npz


def _read_index(path: pathlib.Path) -> dict[str, Record]:
    """Hugging Face's index of shards: {"weight_map": {key: file name}}; shards lie beside the index."""
    weight_map = parse_json(path.read_bytes(), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path}: it should hold a weight_map from keys to file names")
    for key, name in weight_map.items():
        plain = isinstance(name, str) and pathlib.PureWindowsPath(name).name == name and name not in ("", ".", "..")
        if not plain or not name.endswith((".safetensors", ".bin")):
            raise WeightsError(
                f"{path}: {key} is said to be in {str(name)[:200]!r}; a shard is a .safetensors or .bin file beside it"
            )
    records: dict[str, Record] = {}
    for name in sorted(set(weight_map.values())):
        shard = path.with_name(name)
        if not shard.is_file():
            raise WeightsError(f"{path}: the shard {name} is not there")
        check_downloaded(shard)
        inside = _read_safetensors(shard)[0] if name.endswith(".safetensors") else read_torch(shard)
        expected = {key for key, file in weight_map.items() if file == name}
        if missing := sorted(expected - inside.keys()):
            raise WeightsError(f"{shard} does not fit {path.name}: it lacks {', '.join(missing)}")
        # Savers leave buffers in shards that the index does not list, and the index is what decides.
        records.update({key: inside[key] for key in expected})
    return records


def _read_npz(path: pathlib.Path) -> dict[str, Record]:
    """NumPy's zip of .npy members; pickled members are refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            repeated = {name for name in names if names.count(name) > 1}
            if repeated:
                raise WeightsError(f"{path}: {sorted(repeated)[0]} stands twice in the archive")
            return {
                member.filename.removesuffix(".npy"): _npy_record(path, archive, member)
                for member in members
                if member.filename.endswith(".npy")
            }
    except ZIP_ERRORS as error:
        raise WeightsError(f"{path}: not a .npz file, or cut: {error}") from None


def _npy_record(path: pathlib.Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Record:
    name = f"{path}: {member.filename}"
    try:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = reader(file)
            start = file.tell()
    except (ValueError, SyntaxError) as error:
        raise WeightsError(f"{name} is not an array: {error}") from None
    if dtype.hasobject:
        raise WeightsError(f"{name} holds pickled objects, which are never loaded")
    if dtype == np.dtype("V2"):  # NumPy stores bfloat16 as bytes without a type
        dtype = np.dtype(ml_dtypes.bfloat16)
    elif dtype.kind == "V":
        raise WeightsError(f"{name}: {dtype}, bytes without a type")
    if member.file_size - start != math.prod(shape) * dtype.itemsize:
        raise WeightsError(f"{name}: {dtype} {list(shape)} does not fit its {member.file_size - start} bytes")

    def read() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as fresh:
                raw = fresh.read(member.filename)[start:]
        except ZIP_ERRORS as error:
            raise WeightsError(f"{name} is cut or damaged: {error}") from None
        return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")

    return Record(tuple(shape), dtype, read)
