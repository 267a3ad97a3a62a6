"""load, save and export, on a system defined for these tests: one folder of code and one line in SYSTEMS."""

import argparse
import dataclasses
import json
import os
import pathlib
import pickle
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import mmjax
from mmjax import models
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.interface.inputs import PIXELS
from mmjax.interface.model import Model
from mmjax.models import SYSTEMS, System
from mmjax.nn.norm import l2_normalize
from mmjax.training.checkpoint import CheckpointWriter
from mmjax.tree import flatten, tree_hash
from mmjax.weights.files import read_weights, write_safetensors
from mmjax.weights.table import Entry, Layout, WeightsError, linear


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    width: int = 5
    classes: int = 3
    sizes: tuple[int, ...] = (7, 11)
    dtype: str = "float32"


class Toy(nn.Module):
    config: ToyConfig

    @nn.compact
    def __call__(self, pixels):
        x = pixels.mean((1, 2)).astype(self.config.dtype)
        x = nn.Dense(self.config.width, name="body", dtype=self.config.dtype)(x)
        mean = self.variable("batch_stats", "mean", jnp.zeros, (self.config.width,))
        return nn.Dense(self.config.classes, name="head", dtype=self.config.dtype)(jnp.tanh(x - mean.value))


TRACED: list[tuple[int, ...]] = []
"""Shapes that ToyModel's outputs were traced with."""


class ToyModel(Model):
    system = "toy"
    config_class = ToyConfig

    @classmethod
    def build(cls, config):
        return Toy(config)

    @classmethod
    def inputs(cls, config):
        return PIXELS

    @classmethod
    def example(cls, config):
        return {"pixel_values": jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)}

    def outputs(self, variables, inputs):
        TRACED.append(inputs["pixel_values"].shape)
        return {"logits": self.module.apply(variables, inputs["pixel_values"]).astype(jnp.float32)}


def toy_table(config: ToyConfig):
    return (
        Entry("body.weight", "params/body/kernel", linear),
        Entry("body.bias", "params/body/bias"),
        Entry("mean", "stats/mean"),
        Entry("head.weight", "params/head/kernel", linear),
        Entry("head.bias", "params/head/bias"),
    )


def toy_config(shapes, config_json):
    return ToyConfig(width=shapes["body.weight"][0], classes=shapes["head.weight"][0])


LAYOUTS = (
    Layout(
        "hf",
        lambda keys, config_json: "body.weight" in keys,
        toy_config,
        toy_table,
        lambda config: {"model_type": "toy"},
    ),
    Layout("npz", lambda keys, _: "body.weightz" in keys, toy_config, toy_table, file="toy.npz"),
)


@pytest.fixture
def toy(monkeypatch):
    """Registers the system; returns a model with random weights."""
    for name, module in {
        "toy": types.ModuleType("toy"),
        "toy.checkpoint": types.SimpleNamespace(LAYOUTS=LAYOUTS),
        "toy.tasks": types.SimpleNamespace(ToyModel=ToyModel),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(models, "SYSTEMS", (System("toy", "toy", "ToyModel"),))
    config = ToyConfig()
    rng = np.random.default_rng(3)
    arrays = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), ToyModel.shapes(config))
    return ToyModel(config, arrays["params"], arrays["stats"], preprocess=ImagePreprocessing(resize=13, crop=(11, 7)))


def pixels(b: int = 2) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(b, 8, 8, 3)).astype(np.float32)


def same_model(one: Model, other: Model) -> None:
    assert one.config == other.config and one.preprocess == other.preprocess
    assert tree_hash(one.variables) == tree_hash(other.variables)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, toy, dtype):
    mmjax.save(toy, tmp_path / "float32")
    model = mmjax.load(tmp_path / "float32", dtype=dtype)
    mmjax.save(model, tmp_path / "own")
    for source in (tmp_path / "own", str(tmp_path / "own"), tmp_path / "own" / "model.safetensors"):
        same_model(mmjax.load(source), model)
    mmjax.save(mmjax.load(tmp_path / "own"), tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_is_exported_is_loaded_bit_for_bit(tmp_path, toy):
    mmjax.export(toy, tmp_path / "hf", layout="hf")
    assert sorted(os.listdir(tmp_path / "hf")) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    np.testing.assert_array_equal(
        read_weights(tmp_path / "hf" / "model.safetensors").arrays["head.weight"], toy.params["head"]["kernel"].T
    )
    loaded = mmjax.load(tmp_path / "hf")
    same_model(loaded.replace(preprocess=toy.preprocess), toy)
    assert loaded.layout == "hf"
    assert dataclasses.replace(loaded.preprocess, crop_rounding="round") == toy.preprocess
    mmjax.export(toy, tmp_path / "npz", layout="npz")
    np.testing.assert_array_equal(np.load(tmp_path / "npz" / "toy.npz")["mean"], toy.stats["mean"])
    same_model(mmjax.load(tmp_path / "npz", layout="toy/hf"), toy)


def test_dtype_casts_parameters_and_computation(tmp_path, toy):
    mmjax.export(toy, tmp_path)
    model = mmjax.load(tmp_path, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in flatten(model.params).values()} == {"bfloat16"}
    assert model.config.dtype == "bfloat16"
    np.testing.assert_allclose(model.forward(pixels())["logits"], toy.forward(pixels())["logits"], atol=0.05)
    with pytest.raises(MmjaxError, match="dtype='int8'"):
        mmjax.load(tmp_path, dtype="int8")


def test_forward_is_compiled_once_a_shape_and_refuses_what_it_cannot_take(toy, monkeypatch):
    traced, outputs = [], type(toy).outputs

    def counted(self, variables, inputs):
        traced.append(inputs["pixel_values"].shape)
        return outputs(self, variables, inputs)

    monkeypatch.setattr(type(toy), "outputs", counted)
    expected = np.tanh(
        pixels().mean((1, 2)) @ toy.params["body"]["kernel"] + toy.params["body"]["bias"] - toy.stats["mean"]
    )
    expected = expected @ toy.params["head"]["kernel"] + toy.params["head"]["bias"]
    np.testing.assert_allclose(toy.forward(pixels())["logits"], expected, rtol=1e-5)
    toy.forward(pixel_values=jnp.asarray(pixels()))
    toy.forward(pixels(3))
    assert traced == [pixels().shape, pixels(3).shape]
    with pytest.raises(
        MmjaxError, match=r"pixel_values should be floats \[b, height, width, 3\], not uint8 \[2, 8, 8, 3\]"
    ):
        toy.forward(pixels().astype(np.uint8))
    with pytest.raises(MmjaxError, match="does not take input_ids"):
        toy.forward(input_ids=np.arange(3))


def test_a_hub_id_is_downloaded_and_loaded(tmp_path, toy, monkeypatch):
    import huggingface_hub

    mmjax.export(toy, tmp_path)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: os.listdir(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    same_model(mmjax.load("somebody/toy").replace(preprocess=toy.preprocess), toy)


def test_a_workdir_and_its_checkpoints_are_loaded(tmp_path, toy):
    config_json = {
        "system": "toy",
        "model": dataclasses.asdict(toy.config),
        "experiment": {"steps": 3},
        "tokenizer": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    with pytest.raises(MmjaxError, match=r"neither model\.safetensors nor a checkpoint"):
        mmjax.load(tmp_path)
    writer = CheckpointWriter(tmp_path)
    for step in (9, 20):
        params = jax.tree.map(lambda x: np.asarray(x) * step, toy.params)  # noqa: B023
        writer.save({"params": params, "stats": toy.stats, "ema": {}, "step": np.int32(step)}, step)
        writer.wait()
    newest, first = mmjax.load(tmp_path), mmjax.load(tmp_path / "checkpoints" / "9")
    np.testing.assert_array_equal(newest.params["body"]["bias"], toy.params["body"]["bias"] * 20)
    np.testing.assert_array_equal(first.params["body"]["bias"], toy.params["body"]["bias"] * 9)
    np.testing.assert_array_equal(first.stats["mean"], toy.stats["mean"])
    assert newest.config == toy.config
    (tmp_path / "config.json").write_text(json.dumps(config_json | {"model": {"width": 6}}))
    with pytest.raises(WeightsError, match=r"body/kernel \[3, 5\]: gives \[3, 5\], params/body/kernel has \[3, 6\]"):
        mmjax.load(tmp_path)


# ---------------------------------------------------------------------------------------------- wrong things fail well


def changed(folder: pathlib.Path, toy: Model, **arrays) -> pathlib.Path:
    """An export with some arrays replaced, added, or (None) taken away."""
    mmjax.export(toy, folder)
    weights = dict(read_weights(folder / "model.safetensors").arrays) | arrays
    write_safetensors(folder / "model.safetensors", {k: v for k, v in weights.items() if v is not None})
    return folder


def test_missing_unexpected_and_misshapen_keys_are_listed_in_one_error(tmp_path, toy):
    wrong = {"head.bias": None, "extra.weight": np.ones(2, np.float32), "body.bias": np.ones(6, np.float32)}
    with pytest.raises(WeightsError) as caught:
        mmjax.load(changed(tmp_path, toy, **wrong))
    message = str(caught.value)
    assert str(tmp_path / "model.safetensors") in message
    for piece in ("missing (1):\n    head.bias", "unexpected (1):\n    extra.weight", "body.bias [6]: gives [6]"):
        assert piece in message


def test_nan_weights_are_refused(tmp_path, toy):
    """And admitted by the argument that the message names."""
    with pytest.raises(WeightsError, match=r"model\.safetensors: mean holds 1 values"):
        mmjax.load(changed(tmp_path, toy, mean=np.array([1, 2, np.nan, 3, 4], np.float32)))
    assert int(np.isnan(mmjax.load(tmp_path, allow_nan=True).stats["mean"]).sum()) == 1


def test_a_config_that_cannot_be_determined_is_an_error(tmp_path, toy):
    with pytest.raises(WeightsError, match=r"looks like toy in the hf layout, .* KeyError: 'head\.weight'"):
        mmjax.load(changed(tmp_path, toy, **{"head.weight": None}))


def test_an_unknown_architecture_names_file_keys_and_what_is_known(tmp_path, toy):
    write_safetensors(tmp_path / "model.safetensors", {"what.is.this": np.ones(2)})
    (tmp_path / "config.json").write_text('{"architectures": ["MysteryNet"]}')
    with pytest.raises(WeightsError) as caught:
        mmjax.load(tmp_path)
    for piece in (str(tmp_path), "unknown architecture", "MysteryNet", "what.is.this", "toy/hf"):
        assert piece in str(caught.value)


def test_two_layouts_that_fit_need_a_choice(tmp_path, toy, monkeypatch):
    twin = dataclasses.replace(LAYOUTS[0], name="twin")
    monkeypatch.setattr(sys.modules["toy.checkpoint"], "LAYOUTS", (*LAYOUTS, twin))
    mmjax.export(toy, tmp_path)
    with pytest.raises(WeightsError, match=r"more than one layout fits: toy/hf, toy/twin; choose one with layout="):
        mmjax.load(tmp_path)
    assert mmjax.load(tmp_path, layout="twin").layout == "twin"
    with pytest.raises(WeightsError, match="layout='other' fits them"):
        mmjax.load(tmp_path, layout="other")


@pytest.mark.parametrize(
    "wrapped",
    [
        "{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "model_state_dict/{}",
        "state_dict/model.{}",
        "state_dict_ema/{}",
    ],
)
def test_checkpoints_of_training_loops_are_loaded(tmp_path, toy, wrapped):
    mmjax.export(toy, tmp_path / "a")
    arrays = read_weights(tmp_path / "a" / "model.safetensors").arrays
    arrays = {wrapped.format(key): array for key, array in arrays.items()} | {"optimizer/step": np.zeros(1)}
    arrays = arrays if "/" in wrapped else {key: array for key, array in arrays.items() if "/" not in key}
    (tmp_path / "b").mkdir()
    write_safetensors(tmp_path / "b" / "model.safetensors", arrays)
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    assert tree_hash(mmjax.load(tmp_path / "b").params) == tree_hash(toy.params)


def test_weights_at_a_path_are_loaded(tmp_path, toy):
    mmjax.export(toy, tmp_path)
    arrays = read_weights(tmp_path / "model.safetensors").arrays
    both = {f"trainer/student.{key}": array + 1 for key, array in arrays.items()}
    both |= {f"trainer/teacher.{key}": array for key, array in arrays.items()}
    write_safetensors(tmp_path / "model.safetensors", both)
    with pytest.raises(WeightsError, match="unknown architecture"):
        mmjax.load(tmp_path)
    assert tree_hash(mmjax.load(tmp_path, weights_at="trainer/teacher").params) == tree_hash(toy.params)
    with pytest.raises(WeightsError, match="nothing at 'trainer/nobody'; it has trainer"):
        mmjax.load(tmp_path, weights_at="trainer/nobody")


@pytest.mark.torch
def test_settings_beside_the_weights_are_placeholders(tmp_path, toy):
    torch = pytest.importorskip("torch")
    mmjax.export(toy, tmp_path)
    state = {key: torch.tensor(array) for key, array in read_weights(tmp_path / "model.safetensors").arrays.items()}
    settings = argparse.Namespace(lr=0.1, out=pathlib.Path("runs"), names={"a"}, ids=[np.int64(3)])
    loop = {"args": settings, "best": np.float64(0.5), "rng": np.random.get_state(), "device": torch.device("cpu")}
    (tmp_path / "model.safetensors").unlink()
    for legacy in (False, True):
        torch.save(
            {**loop, "model_state_dict": state}, tmp_path / "last.pth", _use_new_zipfile_serialization=not legacy
        )
        assert tree_hash(mmjax.load(tmp_path / "last.pth").params) == tree_hash(toy.params)


def test_a_cut_file_and_a_pickle_with_code_are_refused(tmp_path, toy):
    mmjax.export(toy, tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    for length in (0, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"cut/model\.safetensors"):
            mmjax.load(tmp_path / "cut")

    class Code:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'canary'}",)

    (tmp_path / "model.pth").write_bytes(pickle.dumps(Code()))
    with pytest.raises(WeightsError, match=r"model\.pth: refused: it asks for posix\.system"):
        mmjax.load(tmp_path / "model.pth")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "config_json, message",
    [
        (
            {"system": "toy", "model": {"widht": 5}},
            r"config\.json: model does not fit ToyConfig: unknown fields \['widht'\]",
        ),
        ({"system": "nothing", "model": {}}, r"config\.json: no system is called 'nothing'; there are toy"),
    ],
)
def test_an_invalid_config_of_ours_is_an_error(tmp_path, toy, config_json, message):
    mmjax.save(toy, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    with pytest.raises(MmjaxError, match=message):
        mmjax.load(tmp_path)


def test_sources_that_are_nothing_are_errors(tmp_path, toy):
    with pytest.raises(MmjaxError, match="neither a file nor a folder, nor a hub id"):
        mmjax.load(tmp_path / "nowhere")
    with pytest.raises(MmjaxError, match="holds no weight file"):
        mmjax.load(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        write_safetensors(tmp_path / name, {"x": np.ones(1)})
    with pytest.raises(MmjaxError, match=r"several weight files \(a\.safetensors, b\.safetensors\); name one"):
        mmjax.load(tmp_path)
    with pytest.raises(MmjaxError, match="layout='caffe': toy is exported as hf, npz"):
        mmjax.export(toy, tmp_path / "out", layout="caffe")


# ------------------------------------------------------------------------------------------------------- the odd rest


def test_images_of_every_kind_become_the_same_pixels(tmp_path, toy):
    array = np.random.default_rng(1).integers(0, 256, (17, 23, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "i.png")
    expected = toy.preprocess(array)
    assert expected.shape == (1, 11, 7, 3)
    for images in (Image.fromarray(array), tmp_path / "i.png", [str(tmp_path / "i.png")], array[None]):
        np.testing.assert_array_equal(toy.pixels(images), expected)
    np.testing.assert_array_equal(toy.pixels(expected), expected)
    with pytest.raises(MmjaxError, match=r"this is float32 \[17, 23, 3\]"):
        toy.preprocess(array.astype(np.float32))


def test_unit_vectors_have_length_one():
    np.testing.assert_allclose(jnp.linalg.norm(l2_normalize(jnp.arange(1.0, 11).reshape(2, 5)), axis=-1), 1, rtol=1e-6)


def test_importing_mmjax_imports_neither_jax_nor_numpy():
    code = "import mmjax, mmjax.models, sys; print([m for m in ('jax', 'numpy', 'flax', 'torch') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_registry_names_real_packages():
    root = pathlib.Path(mmjax.__file__).parent.parent
    for system in SYSTEMS:
        assert (root / system.module.replace(".", "/")).is_dir(), system.name
        assert system.model.system == system.name
        assert all(isinstance(layout, Layout) for layout in system.layouts)
