"""Reading GGUF, llama.cpp's one-file form of a language model: metadata, tokenizer and (quantised) tensors.

The layout is that of the format's specification (ggml, docs/gguf.md). As with every weight file, all sizes are checked
against the bytes that are there before anything is allocated; the package `gguf` does the dequantisation.
"""

import functools
import math
import mmap
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmjax.weights.records import Arrays, Record, Weights, check_downloaded
from mmjax.weights.table import Op, Shape, WeightsError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
ALIGNMENT = 32
"""The alignment of tensors in the file, unless the key general.alignment has another value."""

STRING, ARRAY = 8, 9
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""The types of metadata that are numbers."""


@dataclass(frozen=True)
class GGUF:
    """The content of a GGUF file.

    Attributes:
        metadata: key -> number, string, list of strings or array of numbers: `general.architecture`, `llama.*`,
            `tokenizer.*`.
        weights: tensors under the file's own names, floats dequantised to float32 one at a time when read; a matrix is
            [out, in].
    """

    metadata: Mapping[str, Any]
    weights: Weights


def read_gguf(path: str | os.PathLike[str], *, allow_nan: bool = False) -> GGUF:
    """Opens a GGUF file, version 2 or 3.

    Raises WeightsError naming the file: not GGUF, cut, damaged, big-endian, one part of several; or the package `gguf`
    is missing.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    check_downloaded(path)
    with path.open("rb") as file:
        head = file.read(4)
        if head != MAGIC:
            raise WeightsError(f"{path}: not a GGUF file: it begins with {head!r}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata, records = _read(_Cursor(data, path))
    shapes = {name: record.shape for name, record in records.items()}
    dtypes = {name: record.dtype for name, record in records.items()}
    strings = {key: value for key, value in metadata.items() if isinstance(value, str)}
    return GGUF(metadata, Weights(Arrays(records, str(path), allow_nan), shapes, dtypes, str(path), strings))


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise WeightsError("GGUF files need the package gguf: pip install 'mmjax[gguf]'") from error
    return gguf


# -------------------------------------------------------------------------------------------------------------- header


class _Cursor:
    """A position in the file; it never passes the end."""

    def __init__(self, data: mmap.mmap, path: pathlib.Path):
        self.data, self.path, self.position = data, path, len(MAGIC)

    def error(self, problem: str) -> WeightsError:
        return WeightsError(f"{self.path}: {problem}")

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise self.error(f"cut or damaged: {size} bytes are announced at {self.position}, it has {len(self.data)}")
        self.position += size
        return self.data[self.position - size : self.position]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self) -> str:
        raw = self.take(self.u64())
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"the text at {self.position - len(raw)} is not UTF-8: {error}") from None

    def value(self, kind: int) -> Any:
        """One value of the metadata."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, count = self.u32(), self.u64()
            if item == STRING:
                # Each has its length in front of it, so no more of them than there are bytes.
                return [self.string() for _ in range(count)]
            return np.frombuffer(self.take(count * self.dtype(item).itemsize), self.dtype(item)).copy()
        dtype = self.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def dtype(self, kind: int) -> np.dtype:
        if kind not in NUMBERS:
            raise self.error(f"damaged: metadata of the unknown type {kind} at {self.position}")
        return np.dtype(NUMBERS[kind])


def _read(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Record]]:
    version = cursor.u32()
    if version not in VERSIONS:
        strings = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise cursor.error(f"{strings}; GGUF is read little-endian in versions {VERSIONS}")
    tensors, keys = cursor.u64(), cursor.u64()
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.string()
        if key in metadata:
            raise cursor.error(f"the key {key[:200]} stands twice")
        metadata[key] = cursor.value(cursor.u32())
    if metadata.get("split.count", 1) not in (0, 1):
        raise cursor.error(f"one of {metadata['split.count']} parts; llama.cpp's gguf-split joins them (--merge)")
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment should be a power of two, it is {alignment!r}")
    infos: dict[str, _Info] = {}
    for _ in range(tensors):
        name = cursor.string()
        if name in infos:
            raise cursor.error(f"the tensor {name[:200]} stands twice")
        infos[name] = _tensor_info(cursor, name)
    start = -(-cursor.position // alignment) * alignment
    _check_positions(cursor, infos, len(cursor.data) - start, alignment)
    return metadata, {name: _record(cursor.path, name, info, start + info.offset) for name, info in infos.items()}


@dataclass(frozen=True)
class _Info:
    """The position and format of a tensor: `stored` is the shape of its bytes, rows of blocks."""

    shape: Shape
    stored: Shape
    kind: Any
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.stored)


def _tensor_info(cursor: _Cursor, name: str) -> _Info:
    gguf = _package()
    rank = cursor.u32()
    if not 1 <= rank <= MAX_DIMENSIONS:
        raise cursor.error(f"damaged: {name[:200]} has {rank} dimensions")
    shape = tuple(reversed([cursor.u64() for _ in range(rank)]))
    number, offset = cursor.u32(), cursor.u64()
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise cursor.error(f"{name[:200]} is of the unknown type {number}; a newer gguf may know it") from None
    if shape[-1] % block:
        raise cursor.error(f"damaged: {name[:200]} {list(shape)}: {kind.name} comes in blocks of {block}")
    return _Info(shape, (*shape[:-1], shape[-1] // block * size), kind, offset)


def _check_positions(cursor: _Cursor, infos: Mapping[str, _Info], size: int, alignment: int) -> None:
    """Every tensor lies within the file, aligned, and none on another."""
    end = 0
    for name, info in sorted(infos.items(), key=lambda item: item[1].offset):
        if info.offset % alignment or info.offset < end:
            raise cursor.error(f"damaged: {name[:200]} lies at {info.offset}, misaligned or on another tensor")
        end = info.offset + info.size
        if end > size:
            raise cursor.error(f"{name[:200]} ends at byte {end} of the data, the file has {max(size, 0)}: it is cut")


def _record(path: pathlib.Path, name: str, info: _Info, offset: int) -> Record:
    whole = {"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}.get(info.kind.name)
    dtype = np.dtype(np.float32 if whole is None else whole)

    def read() -> np.ndarray:
        with path.open("rb") as file:
            file.seek(offset)
            raw = np.frombuffer(file.read(info.size), np.uint8)
        if raw.size != info.size:
            raise WeightsError(f"{path}: {name} is cut")
        if whole is not None or info.kind.name == "F64":
            return raw.view(whole or np.float64).astype(dtype).reshape(info.shape)
        try:
            floats = _package().dequantize(raw.reshape(info.stored), info.kind)
        except NotImplementedError:
            raise WeightsError(f"{path}: {name} is {info.kind.name}, which gguf cannot dequantise") from None
        return floats.reshape(info.shape)

    return Record(info.shape, dtype, read)


# ----------------------------------------------------------------------------------------------------- as Hugging Face

ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""The supported architectures, all of one form: a LLaMA; a Qwen2 has biases on q, k and v."""


def unpermute(heads: int) -> Op:
    """Rows of q or k as GGUF and Meta store them <-> as Hugging Face does, for architecture "llama" alone.

    The rotary embedding rotates channels k and k + D/2 together in Hugging Face's form, k and k + 1 in the other:
    [heads, D/2, 2] rows <-> [heads, 2, D/2]. heads: for k those of keys and values.
    """

    def load(x: np.ndarray) -> np.ndarray:
        if x.shape[0] % (2 * heads):
            raise ValueError(f"{x.shape[0]} rows are not {heads} heads of even width")
        return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    def save(x: np.ndarray) -> np.ndarray:
        return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return Op(f"unpermute({heads})", load, save)


def hf_weights(file: GGUF) -> Weights:
    """The tensors under Hugging Face's keys of LlamaForCausalLM (or Qwen2's), q and k un-permuted; read lazily still.

    A tensor without such a key (experts, factors of a scaled rotary embedding) keeps its name, so that the
    model's table reports it. Raises WeightsError: another architecture.
    """
    config = hf_config(file)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    turned = config["model_type"] == "llama"
    records: dict[str, Record] = {}
    for name, shape in file.weights.shapes.items():
        part = name.split(".")[-2] if "." in name else ""
        read = functools.partial(file.weights.arrays.__getitem__, name)
        if turned and part in heads:
            read = functools.partial(_after, unpermute(heads[part]), read, f"{file.weights.file}: {name}")
        records[_hf_key(name)] = Record(shape, file.weights.dtypes[name], read)
    if len(records) < len(file.weights.shapes):
        raise WeightsError(f"{file.weights.file}: two tensors stand for one key")
    shapes = {key: record.shape for key, record in records.items()}
    dtypes = {key: record.dtype for key, record in records.items()}
    arrays = Arrays(records, file.weights.file, allow_nan=True)  # checked when the file was opened
    return Weights(arrays, shapes, dtypes, file.weights.file, file.weights.metadata)


def _after(op: Op, read: Callable[[], np.ndarray], name: str) -> np.ndarray:
    try:
        return op.load(read())
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{name}: {error}") from None


def _hf_key(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block and block[2] in PARTS:
        return f"model.layers.{block[1]}.{PARTS[block[2]]}.{kind}"
    return f"{ENDS[stem]}.{kind}" if stem in ENDS else name


def hf_config(file: GGUF) -> dict[str, Any]:
    """The model's config.json in Hugging Face's format: LlamaForCausalLM, or Qwen2ForCausalLM.

    Raises WeightsError: another architecture, or metadata that a LLaMA needs and the file lacks.
    """
    metadata, shapes, source = file.metadata, file.weights.shapes, file.weights.file
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise WeightsError(f"{source}: general.architecture is {kind!r}; {' and '.join(ARCHITECTURES)} are read")
    get = functools.partial(_number, metadata, kind, source)
    width, heads = get("embedding_length"), get("attention.head_count")
    embeddings = shapes.get("token_embd.weight", (0, 0))
    config = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", get("rope.dimension_count", width // max(heads, 1))),
        "vocab_size": embeddings[0],
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling, "factor": get("rope.scaling.factor", 1.0)}
    tokens = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return config | {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in tokens.items()}


def _number(metadata: Mapping[str, Any], kind: str, source: str, key: str, default: float | None = None) -> Any:
    """A number of the architecture; float32 as the shortest decimal that is it (1e-05, not 9.999999747378752e-06)."""
    value = metadata.get(f"{kind}.{key}", default)
    if type(value) not in (int, float) or value < 0:
        raise WeightsError(f"{source}: {kind}.{key} should be one number, it is {str(value)[:80]}")
    return float(str(np.float32(value))) if isinstance(value, float) else value
