"""jit, pmap and mesh are the same step: on one device, on 8 virtual ones, and on two processes."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.training.lift import JitLift, MeshConfig, MeshLift, PmapLift, create_lift


def children(repository, tmp_path, lifts, devices, processes=1):
    """Runs lifts_child.py and returns the results of its first process."""
    out = tmp_path / "out.json"
    environment = os.environ | {
        "PYTHONPATH": os.fspath(repository),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = [sys.executable, "-W", "error", os.path.join(os.path.dirname(__file__), "lifts_child.py"), str(out), lifts]
    clusters = [[]] if processes == 1 else [[str(i), str(processes), str(port)] for i in range(processes)]
    runs = [
        subprocess.Popen([*script, *cluster], env=environment, stderr=subprocess.PIPE, text=True)
        for cluster in clusters
    ]
    try:
        for run in runs:
            log = run.communicate(timeout=120)[1]
            assert run.returncode == 0, log[-3000:]
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def one_device():
    """Losses and leaves after 5 steps of the plain function, without any lift."""
    state, data, losses = toy.init(), toy.Data(16), []
    step = jax.jit(toy.step)
    for _ in range(5):
        batch = next(data)
        state, metrics = step(state, {"x": batch["x"], "y": batch["y"]})
        losses.append(float(metrics["loss"]))
    return losses, state


def assert_same(result, one_device):
    losses, state = one_device
    np.testing.assert_allclose(result["losses"], losses, rtol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        if key == "rng":
            continue
        expected = np.asarray(leaf, np.float64).ravel()
        scale = max(np.abs(expected).max(), 1e-12)
        assert np.abs(np.array(result["leaves"][key]) - expected).max() <= 1e-5 * scale, key
    assert result["compiles"] == 1
    assert result["same_after_placing"]
    assert len({item["hash"] for item in result["hashes"]}) == 1


def test_lifts_agree_on_eight_devices(repository, tmp_path, one_device):
    results = children(repository, tmp_path, "jit,pmap,mesh,cut,fsdp", devices=8)
    for result in results.values():
        assert_same(result, one_device)
    assert {name: result["cut"] for name, result in results.items()} == {
        "jit": 0,
        "pmap": 3,
        "mesh": 0,
        "cut": 3,
        "fsdp": 3,
    }


def test_lifts_agree_on_two_processes(repository, tmp_path, one_device):
    results = children(repository, tmp_path, "pmap,mesh,fsdp", devices=2, processes=2)
    for result in results.values():
        assert_same(result, one_device)
        assert [item["position"] for item in result["hashes"]] == [0, 1]


def test_one_compile_a_shape():
    lift = JitLift(toy.step)
    state, data, fewer = lift.place(toy.init()), toy.Data(8), toy.Data(4)
    for source in (data, data, fewer, data, fewer):
        state, _ = lift.step(state, lift.place_batch(next(source)))
    assert lift.compiles == 2


def test_placed_state_is_donated_and_its_source_is_not():
    lift = JitLift(toy.step)
    source = toy.init()
    before = tree.tree_hash(source)
    placed = lift.place(source)
    lift.step(placed, lift.place_batch(next(toy.Data(8))))
    assert placed.params["stem"]["kernel"].is_deleted()
    assert tree.tree_hash(source) == before


def test_fetched_state_outlives_donation():
    lift = JitLift(toy.step)
    state = lift.place(toy.init())
    host = lift.fetch(state)
    before = tree.tree_hash(host)
    lift.step(state, lift.place_batch(next(toy.Data(8))))
    assert tree.tree_hash(host) == before


def test_fsdp_cuts_the_largest_divisible_axis():
    lift = MeshLift.__new__(MeshLift)
    lift.config = MeshConfig(min_size=30, rules=(("**/out/kernel", (None, "tensor")),))
    lift.mesh = jax.sharding.AbstractMesh((2, 3, 5), ("data", "fsdp", "tensor"))
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, np.float32)  # noqa: E731
    assert tuple(lift.spec("params/a", shape(6, 9, 7))) == (None, "fsdp", None)
    assert tuple(lift.spec("params/a", shape(7, 11))) == ()
    assert tuple(lift.spec("params/a", shape(3, 9))) == ()
    assert tuple(lift.spec("opt_state/0/mu/out/kernel", shape(3, 20))) == (None, "tensor")
    with pytest.raises(MmjaxError, match="cannot be cut in 5"):
        lift.spec("params/out/kernel", shape(3, 7))
    with pytest.raises(MmjaxError, match="does not fit"):
        lift.spec("params/out/kernel", shape(20))


def test_bad_arguments_are_refused():
    with pytest.raises(MmjaxError, match="lift='tpu'"):
        create_lift("tpu", toy.step)  # type: ignore[arg-type]
    with pytest.raises(MmjaxError, match="does not use"):
        MeshLift(toy.step, MeshConfig(data=7, fsdp=11))
    lift = PmapLift(toy.step)
    lift._local = 3
    with pytest.raises(MmjaxError, match=r"batch\['x'\] has 8 examples"):
        lift.place_batch(next(toy.Data(8)))
    with pytest.raises(MmjaxError, match="beyond 32 bits"):
        JitLift(toy.step).place_batch({"index": np.array([2**40])})
