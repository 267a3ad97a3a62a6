"""Files with false headers, truncated files and files with code: each is refused by name, and no code runs."""

import io
import json
import os
import pathlib
import pickle
import struct
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mmjax.weights.files import read_weights, write_safetensors
from mmjax.weights.gguf import read_gguf
from mmjax.weights.table import WeightsError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def safetensors(header: bytes | dict, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


HOSTILE_SAFETENSORS = {
    "empty": (b"", "an empty file"),
    "lying length": (safetensors({"w": F32}, length=2**62), "its header should be 4611686018427387904 bytes"),
    "header too large": (safetensors(b"{" + b" " * (2**23 + 8) + b"}"), "a header of"),
    "not an object": (safetensors(b"[1, 2]"), "does not begin with '{'"),
    "nested without end": (safetensors(b'{"w":' * 200_000), "its JSON cannot be read"),
    "not utf-8": (safetensors(b'{"\xff": 1}'), "its JSON cannot be read"),
    "duplicate key": (safetensors(b'{"w": %s, "w": %s}' % ((json.dumps(F32).encode(),) * 2)), "the key w stands twice"),
    "overlap": (
        safetensors({"w": F32, "v": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"\0" * 12),
        "v overlaps the array before it",
    ),
    "gap": (
        safetensors({"w": F32, "v": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}, b"\0" * 16),
        "v leaves a gap",
    ),
    "cut data": (safetensors({"w": F32}, b"\0" * 5), "w ends at byte 8 of the data, the file has 5"),
    "hidden data": (safetensors({"w": F32}, b"\0" * 999), "991 bytes after the last array"),
    "shape lies": (
        safetensors({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}}),
        "w: F32 [1099511627776] needs 4398046511104 bytes",
    ),
    "shape overflows": (
        safetensors({"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}, b""),
        "w: F32 [4611686018427387904, 4] needs",
    ),
    "negative": (safetensors({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}), "w: shape and"),
    "unknown dtype": (
        safetensors({"w": {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}}),
        "w: dtype PICKLE is not one of",
    ),
    "metadata not text": (safetensors({"__metadata__": {"a": [1]}, "w": F32}), "__metadata__ should map"),
}


@pytest.mark.parametrize("name", HOSTILE_SAFETENSORS)
def test_hostile_safetensors_are_refused_at_once(tmp_path, name):
    content, message = HOSTILE_SAFETENSORS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    assert time.monotonic() - started < 2
    assert str(path) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    "target", ["../outside.safetensors", "/etc/passwd", "..\\outside.safetensors", "sub/x.bin", ".."]
)
def test_an_index_cannot_leave_its_folder(tmp_path, target):
    write_safetensors(tmp_path / "outside.safetensors", {"w": np.ones(2, np.float32)})
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"weight_map": {"w": target}}))
    with pytest.raises(WeightsError) as caught:
        read_weights(index)
    assert str(index) in str(caught.value) and "w is said to be in" in str(caught.value)


def test_an_index_decides_what_its_shards_contain(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"w": np.ones(2), "buffer": np.ones(2), "v": np.zeros(2)})
    write_safetensors(tmp_path / "b.safetensors", {"v": np.full(2, 3.0)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}))
    arrays = read_weights(index).arrays
    assert sorted(arrays) == ["v", "w"] and arrays["v"][0] == 3
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors", "u": "a.safetensors"}}))
    with pytest.raises(WeightsError, match=r"a\.safetensors does not fit model\.safetensors\.index\.json: it lacks u"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": {"w": "gone.safetensors"}}))
    with pytest.raises(WeightsError, match=r"the shard gone\.safetensors is not there"):
        read_weights(index)


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.bin", "w.pth", "w.gguf", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>Access denied</html>", "a web page"),
        (b"", "an empty file"),
    ],
)
def test_what_a_failed_download_leaves_is_named(tmp_path, name, content, message):
    file = tmp_path / ("a.safetensors" if name.endswith(".json") else name)
    file.write_bytes(content)
    if name.endswith(".json"):
        (tmp_path / name).write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    read = read_gguf if name.endswith(".gguf") else read_weights
    with pytest.raises(WeightsError, match=message) as caught:
        read(tmp_path / name)
    assert str(file) in str(caught.value)


def test_npz_bfloat16_has_no_type_in_the_file(tmp_path):
    values = np.asarray([[1.5, -2.25]], ml_dtypes.bfloat16)
    np.savez(tmp_path / "w.npz", w=values)
    array = read_weights(tmp_path / "w.npz").arrays["w"]
    assert array.dtype == ml_dtypes.bfloat16 and array.tolist() == values.tolist()
    np.savez(tmp_path / "x.npz", w=np.zeros(2, "V3"))
    with pytest.raises(WeightsError, match="bytes without a type"):
        read_weights(tmp_path / "x.npz")


# -------------------------------------------------------------------------------------------------------------- pickles


class Call:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def torch_zip(path: pathlib.Path, pickled: bytes, storage: bytes = b"\0" * 8, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", storage)


def tensor_pickle(count: int, offset: int, shape: tuple, stride: tuple) -> bytes:
    """{"w": tensor} as torch.save writes it, with any sizes."""

    def number(value: int) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    def numbers(values: tuple) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    persistent = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number(count) + b"tQ"
    arguments = (
        b"(" + persistent + number(offset) + numbers(shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)Rt"
    )
    return b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def hostile_pickles(canary: pathlib.Path) -> dict[str, tuple[bytes, str]]:
    touch = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": (pickle.dumps({"w": Call(os.system, f"touch {canary}")}, 2), "posix.system"),
        "builtins.eval": (pickle.dumps({"w": Call(eval, touch)}, 4), "builtins.eval"),
        "nested": (pickle.dumps([{"a": ({"b": Call(exec, touch)},)}], 4), "builtins.exec"),
        "foreign": (
            b"\x80\x02}X\x01\0\0\0wcnumpy.testing._private.utils\nrunstring\n)Rs.",
            "numpy.testing._private.utils.runstring",
        ),
        "torch but not listed": (b"\x80\x02ctorch.hub\nload\n(X\x01\0\0\0xtR.", "torch.hub.load"),
        "by extension": (b"\x80\x02\x82\x01.", "EXT1"),
        "by instance": (b"\x80\x02(cos\nsystem\nX\x01\0\0\0xo.", "os.system"),
        "inst": (b"(X\x01\0\0\0xios\nsystem\n.", "INST"),
    }


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("name", list(hostile_pickles(pathlib.Path("x"))))
def test_a_pickle_with_code_is_refused_and_never_runs(tmp_path, name, container):
    canary = tmp_path / "canary"
    pickled, message = hostile_pickles(canary)[name]
    path = tmp_path / "model.pth"
    if container == "zip":
        torch_zip(path, pickled)
    else:
        header = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in header) + pickled + pickle.dumps([], 2))
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    assert not canary.exists()
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_bare_pickle_is_refused(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "model.bin").write_bytes(pickle.dumps(Call(os.system, f"touch {canary}")))
    with pytest.raises(WeightsError, match=r"model\.bin: refused: it asks for posix\.system"):
        read_weights(tmp_path / "model.bin")
    assert not canary.exists()


@pytest.mark.parametrize(
    "count, offset, shape, stride, message",
    [
        (2, 0, (3,), (1,), "outside its 2 elements"),
        (2, 1, (2,), (1,), "outside its 2 elements"),
        (2, 0, (2,), (2**60,), "outside its 2 elements"),
        (2, 0, (10**9, 10**9), (0, 0), "outside its 2 elements"),
        (2, 0, (2,), (-1,), "not tuples of whole numbers"),
        (2**40, 0, (2,), (1,), "the storage data/0 has 8 bytes"),
        (2, 0, (2, 2), (1,), "refused"),
    ],
)
def test_a_tensor_stays_inside_its_storage(tmp_path, count, offset, shape, stride, message):
    torch_zip(tmp_path / "m.pt", tensor_pickle(count, offset, shape, stride))
    with pytest.raises(WeightsError) as caught:
        read_weights(tmp_path / "m.pt")
    assert message in str(caught.value)


def test_the_hand_made_pickle_is_readable(tmp_path):
    torch_zip(tmp_path / "m.pt", tensor_pickle(2, 1, (1,), (1,)), np.array([3, 5], np.float32).tobytes())
    np.testing.assert_array_equal(read_weights(tmp_path / "m.pt").arrays["w"], [5])


def test_a_deflated_archive_is_refused(tmp_path):
    torch_zip(tmp_path / "m.pt", tensor_pickle(2, 0, (2,), (1,)), b"\0" * 10**7, zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match=r"archive/data\.pkl is compressed"):
        read_weights(tmp_path / "m.pt")


def test_dictionaries_that_share_and_nest_do_not_explode(tmp_path):
    value: dict = {}
    for _ in range(64):
        value = {"a": value, "b": value}
    torch_zip(tmp_path / "m.pt", pickle.dumps(value, 2))
    with pytest.raises(WeightsError, match="more than 1000000 entries"):
        read_weights(tmp_path / "m.pt")


def test_pickled_members_of_an_npz_are_refused(tmp_path):
    canary = tmp_path / "canary"
    np.savez(tmp_path / "w.npz", w=np.array([Call(os.system, f"touch {canary}")], object), allow_pickle=True)
    with pytest.raises(WeightsError, match=r"w\.npy holds pickled objects"):
        read_weights(tmp_path / "w.npz")
    assert not canary.exists()


def test_a_lying_npy_header_is_refused(tmp_path):
    raw = io.BytesIO()
    np.lib.format.write_array_header_1_0(raw, {"descr": "<f4", "fortran_order": False, "shape": (2**40,)})
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("w.npy", raw.getvalue() + b"\0" * 8)
    with pytest.raises(WeightsError, match=r"w\.npy: float32 \[1099511627776\] does not fit its 8 bytes"):
        read_weights(tmp_path / "w.npz")


def read_all(path: pathlib.Path) -> None:
    for array in read_weights(path).arrays.values():
        assert array.size >= 0


def samples(folder: pathlib.Path) -> dict[str, bytes]:
    """One good file a format."""
    arrays = {"alpha.w": np.arange(6, dtype=np.float32).reshape(2, 3), "beta": np.arange(3)}
    write_safetensors(folder / "g.safetensors", arrays, {"format": "pt"})
    np.savez(folder / "g.npz", **arrays)
    torch_zip(folder / "g.pt", tensor_pickle(2, 0, (2,), (1,)))
    legacy = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    content = b"".join(pickle.dumps(part, 2) for part in legacy) + tensor_pickle(2, 0, (2,), (1,))
    (folder / "g.bin").write_bytes(content + pickle.dumps(["0"], 2) + struct.pack("<q", 2) + b"\0" * 8)
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".bin"])
def test_cut_and_mutated_files_raise_nothing_but_our_error(tmp_path, suffix):
    good = samples(tmp_path)[suffix]
    rng = np.random.default_rng(13)
    path = tmp_path / f"mutant{suffix}"
    path.write_bytes(good)
    read_all(path)
    refused = 0
    for trial in range(600):
        mutant = bytearray(good)
        if trial % 3 == 0:
            mutant = mutant[: rng.integers(len(good))]
        for _ in range(rng.integers(1, 4) if trial % 3 else 0):
            mutant[rng.integers(len(mutant))] = rng.integers(256)
        path.write_bytes(mutant)
        try:
            read_all(path)
        except WeightsError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 250
