"""Reading and writing valid weight files; the hostile ones are in test_hostile.py."""

import json
import os

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from mmjax.weights.files import read_weights, write_safetensors
from mmjax.weights.table import WeightsError

RNG = np.random.default_rng(11)


def arrays() -> dict[str, np.ndarray]:
    return {
        "b.float": RNG.normal(size=(3, 5)).astype(np.float32),
        "a.half": RNG.normal(size=(7,)).astype(np.float16),
        "brain": RNG.normal(size=(2, 3)).astype(bfloat16),
        "count": np.array(2**40, np.int64),
        "mask": np.array([True, False, True]),
        "empty": np.zeros((0, 3), np.float32),
        "ключ": np.arange(5, dtype=np.uint8),
    }


def same(one, other) -> None:
    assert set(one) == set(other)
    for key in other:
        assert one[key].dtype == other[key].dtype and one[key].shape == other[key].shape, key
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_what_we_write_the_reference_library_reads_and_so_do_we(tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = arrays()
    write_safetensors(path, tensors, {"format": "pt"})
    same(load_file(path), tensors)
    weights = read_weights(path)
    same(weights.arrays, tensors)
    assert weights.metadata == {"format": "pt"}
    assert weights.shapes == {key: array.shape for key, array in tensors.items()}
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_what_the_reference_library_writes_we_read(tmp_path):
    save_file(arrays := {"x": np.arange(6.0).reshape(2, 3), "y": np.arange(3)}, tmp_path / "w.safetensors")
    same(read_weights(tmp_path / "w.safetensors").arrays, arrays)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"x": np.arange(3)})
    before = path.read_bytes()

    class Fails(np.ndarray):
        def tobytes(self, order=None):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_safetensors(path, {"x": np.arange(5).view(Fails)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_a_dtype_that_the_format_lacks_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"w\.safetensors: x is complex64"):
        write_safetensors(tmp_path / "w.safetensors", {"x": np.zeros(2, np.complex64)})


def test_shards_are_joined(tmp_path):
    tensors = arrays()
    shards = {}
    for i, key in enumerate(tensors):
        shards[key] = f"model-{i % 2}.safetensors"
    for name in set(shards.values()):
        write_safetensors(tmp_path / name, {key: tensors[key] for key in tensors if shards[key] == name})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shards}))
    same(read_weights(index).arrays, tensors)


def test_npz_is_read_by_key_with_slashes_and_in_fortran_order(tmp_path):
    tensors = {
        "Transformer/encoder_norm/scale": RNG.normal(size=5).astype(np.float32),
        "head/kernel": np.asfortranarray(RNG.normal(size=(3, 5)).astype(np.float32)),
        "step": np.array(3),
    }
    for name, save in (("a.npz", np.savez), ("b.npz", np.savez_compressed)):
        save(tmp_path / name, **tensors)
        same(read_weights(tmp_path / name).arrays, tensors)


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files_are_read_with_their_views_and_dtypes(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    base = torch.randn(5, 7)
    network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    content = {
        "state_dict": network.state_dict(),
        "epoch": 3,
        "view": base.t()[1:, ::2],
        "brain": base.bfloat16(),
        "half": base.half(),
        "parameter": torch.nn.Parameter(base),
        "ids": torch.arange(5).expand((1, -1)),
        "optimizer": torch.optim.AdamW(network.parameters()).state_dict(),
    }
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    weights = read_weights(tmp_path / "c.pt")
    expected = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    expected |= {f"state_dict/{key}": value for key, value in network.state_dict().items()}
    assert set(weights.arrays) == set(expected)
    for key, tensor in expected.items():
        array = weights.arrays[key]
        assert str(tensor.dtype) == f"torch.{array.dtype}" and array.shape == tuple(tensor.shape), key
        np.testing.assert_array_equal(array.astype(np.float64), tensor.detach().double().numpy(), err_msg=key)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated; its archives, OpenAI's CLIP among them, are not gone
def test_a_torchscript_archive_is_read_as_its_state_dict(tmp_path):
    torch = pytest.importorskip("torch")

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = torch.nn.Linear(3, 5)
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(5, 5) for _ in range(2)])
            self.logit_scale = torch.nn.Parameter(torch.tensor(2.5))
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x):
            for block in self.blocks:
                x = block(self.visual(x)) if x.shape[-1] == 3 else block(x)
            return x

    network = Network().half()
    torch.jit.trace(network, torch.ones(1, 3).half()).save(str(tmp_path / "clip.pt"))
    weights = read_weights(tmp_path / "clip.pt")
    state = {key: value.numpy() for key, value in network.state_dict().items()}
    same({key: weights.arrays[key] for key in state}, state)
    assert set(weights.arrays) == set(state)


def test_nan_is_refused_unless_allowed(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", {"bad": np.array([1, np.nan, np.inf], np.float32), "ok": np.ones(2)})
    weights = read_weights(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(weights.arrays["ok"], np.ones(2))
    with pytest.raises(WeightsError, match=r"w\.safetensors: bad holds 2 values that are NaN or infinite"):
        weights.arrays["bad"]
    assert np.isnan(read_weights(tmp_path / "w.safetensors", allow_nan=True).arrays["bad"][1])


def test_unknown_files_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"nowhere\.npz: there is no such file"):
        read_weights(tmp_path / "nowhere.npz")
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"weights\.h5: weights are read from \.safetensors"):
        read_weights(tmp_path / "weights.h5")
