"""A frozen model of bfloat16 or int8, from loading through training, resuming and damage to export."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
from models.tiny_text import random_params

import mmjax
from mmjax import cli, tree
from mmjax.errors import MmjaxError
from mmjax.models.language.tasks import LanguageModel
from mmjax.nn import int8
from mmjax.training import checkpoint
from mmjax.training.average import average_checkpoints
from mmjax.training.checkpoint_format import DamagedCheckpoint, frozen_keys, state_leaves
from mmjax.training.experiment import load_experiment
from mmjax.training.frozen import FrozenStore, read_frozen
from mmjax.training.loop import train

EXPERIMENT = os.fspath(pathlib.Path(__file__).with_name("small_language.py"))
Config = load_experiment(EXPERIMENT)
OPTIONS = {"bfloat16": {"dtype": "bfloat16"}, "int8": {"weights": "int8"}}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with the model that is frozen."""
    folder = tmp_path_factory.mktemp("start")
    config = Config().network
    mmjax.save(LanguageModel(config, random_params(LanguageModel, config)), folder)
    return folder


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def form(request):
    return request.param


@pytest.fixture(scope="module")
def run(start, form, tmp_path_factory):
    """The workdir of a run of four steps, stopped after two and resumed."""
    workdir = tmp_path_factory.mktemp(form)
    for steps in (2, 4):
        train(Config(frozen=form, init_from=os.fspath(start), steps=steps), workdir, experiment_file=EXPERIMENT)
    return workdir


def manifest(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "manifest.json").read_text())


def hashes(params):
    return {key: tree.leaf_hash(leaf) for key, leaf in state_leaves({"params": params}).items()}


def test_frozen_leaves_keep_their_form_and_their_bits(run, start, form):
    before = hashes(mmjax.load(start, **OPTIONS[form]).params)
    after = hashes(checkpoint.load_params(run)["params"])
    frozen = {key for key in after if not key.startswith("params/head/")}
    assert len(frozen) > 8
    assert {key: after[key] for key in frozen} == {key: before[key] for key in frozen}
    leaves = manifest(run, 4)["leaves"]
    narrow = {leaf["dtype"] for key, leaf in leaves.items() if key in frozen}
    assert narrow == ({"bfloat16"} if form == "bfloat16" else {"int8", "float32"})
    assert leaves["params/head/kernel"]["dtype"] == "float32"  # trained, from int8 too
    moments = {key for key in leaves if key.startswith("opt_state/") and leaves[key]["shape"]}
    assert moments and all("head" in key for key in moments)


def test_a_resumed_run_has_the_bits_of_a_straight_one(run, start, form, tmp_path):
    train(Config(frozen=form, init_from=os.fspath(start)), tmp_path, experiment_file=EXPERIMENT)
    assert manifest(tmp_path, 4) == manifest(run, 4)


def test_two_checkpoints_hold_one_frozen_model(run):
    leaves = {step: manifest(run, step)["leaves"] for step in (2, 4)}
    stored = {key: leaf["file"] for key, leaf in leaves[4].items() if "file" in leaf}
    assert stored == {key: leaf["file"] for key, leaf in leaves[2].items() if "file" in leaf}
    assert stored.keys() == {key for key in leaves[4] if key.startswith("params/") and "/head/" not in f"{key}/"}
    sizes = {f"frozen/{path.name}": path.stat().st_size for path in (run / "frozen").iterdir()}
    assert sizes == {
        leaf["file"]: int(np.prod(leaf["shape"])) * np.dtype(leaf["dtype"]).itemsize
        for leaf in leaves[4].values()
        if "file" in leaf
    }
    for step in (2, 4):
        names = {path.name for path in (run / "checkpoints" / str(step) / "arrays").iterdir()}
        assert not [key for key in stored if key.replace("/", ".") in names]


def test_the_run_is_loaded_evaluated_averaged_and_exported(run, form, tmp_path):
    model = mmjax.load(run)
    block = model.params["block_0"]["attention"]["q"]["kernel"]
    assert int8.is_int8(block) if form == "int8" else block.dtype == "bfloat16"
    ids = np.arange(6, dtype=np.int32)[None]
    logits = model.forward(input_ids=ids)["logits"]
    assert np.isfinite(logits).all()
    assert hashes(mmjax.load(run / "checkpoints" / "4").params) == hashes(model.params)
    assert cli.main(["evaluate", os.fspath(run)]) == 0
    mean = average_checkpoints(run, 2)
    assert hashes(mean)["params/head/kernel"] != hashes(model.params)["params/head/kernel"]
    still = {key: value for key, value in hashes(mean).items() if "/head/" not in f"{key}/"}
    assert still.items() <= hashes(model.params).items()
    if form == "int8":
        with pytest.raises(MmjaxError, match=r"int8 is not exported.*dtype='float32'"):
            mmjax.export(model, tmp_path / "narrow")
        model = mmjax.load(run, dtype="float32")
        np.testing.assert_allclose(model.forward(input_ids=ids)["logits"], logits, atol=1e-4)
    mmjax.export(model, tmp_path / "hf")
    assert hashes(mmjax.load(tmp_path / "hf", dtype="float32").params) == hashes(
        jax.tree.map(lambda leaf: leaf.astype(np.float32), model.params)
    )


def test_damage_of_the_store_names_file_and_key(run, tmp_path):
    key, leaf = next((key, leaf) for key, leaf in manifest(run, 4)["leaves"].items() if "attention/q/kernel" in key)
    path = run / leaf["file"]
    data = path.read_bytes()
    named = rf"{path} \({key}\)"
    try:
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(DamagedCheckpoint, match=f"{named}: wrong bytes"):
            checkpoint.load_params(run)
        with pytest.raises(DamagedCheckpoint, match=f"no checkpoint in .* is whole(?s:.*){named}"):
            train(Config(**json.loads((run / "config.json").read_text())["experiment"] | {"mesh": Config().mesh}), run)
        path.write_bytes(data[:-1])
        with pytest.raises(DamagedCheckpoint, match=named):
            checkpoint.load_params(run)
        path.unlink()
        with pytest.raises(DamagedCheckpoint, match=f"{named}: FileNotFoundError"):
            checkpoint.load_params(run)
    finally:
        path.write_bytes(data)


def test_the_store_is_repaired_and_pruned(tmp_path):
    params = {"tower": {"kernel": np.arange(6, dtype=np.int8)}, "head": {"kernel": np.ones(3, np.float32)}}
    keys = frozenset({"params/tower/kernel"})
    for step, tower in ((1, 0), (2, 0), (3, 1), (4, 1)):  # in the same workdir, from another model
        writer = checkpoint.CheckpointWriter(tmp_path)
        params["tower"]["kernel"] = np.arange(6, dtype=np.int8) + tower
        writer.save({"params": params}, step, frozen=keys)
        writer.wait()
        assert len(list((tmp_path / "frozen").iterdir())) == (2 if step == 3 else 1)
    (file,) = (tmp_path / "frozen").iterdir()
    file.write_bytes(b"damage")
    writer = checkpoint.CheckpointWriter(tmp_path)
    writer.save({"params": params}, 5, frozen=keys)
    writer.wait()
    np.testing.assert_array_equal(checkpoint.load_params(tmp_path)["params"]["tower"]["kernel"], np.arange(1, 7))
    template = {"params": jax.eval_shape(lambda: {**params, "tower": {"kernel": np.zeros(6, np.float32)}})}
    restored = checkpoint.restore(tmp_path, template, frozen=keys)
    assert restored.state["params"]["tower"]["kernel"].dtype == np.int8
    with pytest.raises(MmjaxError, match=r"params/tower/kernel: want float32\[6\], got int8\[6\]"):
        checkpoint.restore(tmp_path, template)


def test_no_gradient_of_a_frozen_leaf_is_taken(start):
    """The step differentiates what `split` calls trainable. Of int8 there is no gradient: to take it raises."""
    model = mmjax.load(start, weights="int8")
    partition = Config(frozen="int8").optimizer().partition
    trainable, frozen = partition.split(model.params)
    assert trainable.keys() == {"head"} and "head" not in frozen
    keys = state_leaves({"params": model.params}).keys()
    assert frozen_keys(partition, model.params) == {key for key in keys if not key.startswith("params/head/")}
    method, ids = Config().method(), np.arange(8, dtype=np.int32)[None]
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(TypeError, match="int8"):
        jax.grad(lambda params: method.loss(params, None, batch, jax.random.key(0))[0])(frozen | trainable)


def test_a_frozen_scalar_stays_one(tmp_path):
    """ALBEF's text assignment freezes the temperature."""
    key = "params/temperature"
    leaves = FrozenStore(tmp_path).store({key: np.array(0.07, np.float32)})
    assert list(leaves[key]["shape"]) == []
    read = read_frozen(tmp_path, leaves)[key]
    assert read.shape == () and read == np.float32(0.07)
