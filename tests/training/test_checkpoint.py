"""A checkpoint loads correctly or raises an error that names the cause."""

import json
import os
import random
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from mmjax import tree
from mmjax.training import checkpoint, checkpoint_format, storage
from mmjax.training.checkpoint import CheckpointWriter
from mmjax.training.checkpoint_format import CheckpointError, DamagedCheckpoint
from mmjax.training.workdir import Lock


def save(workdir, *steps, keep=2):
    writer = CheckpointWriter(workdir, keep)
    states = {step: toy.init(seed=step) for step in steps}
    for step, state in states.items():
        writer.save(state, step, data=[{"position": step, "opaque": b"\x00\xff"}], counters={"bad": 3})
    writer.wait()
    return states


def template():
    return jax.eval_shape(toy.init)


def test_round_trip_is_bit_identical(tmp_path):
    state = save(tmp_path, 7)[7]
    restored = checkpoint.restore(tmp_path, template())
    assert tree.tree_hash(restored.state) == tree.tree_hash(state)
    assert restored.state.rng.dtype == state.rng.dtype
    assert (restored.step, restored.data, restored.counters) == (
        7,
        [{"position": 7, "opaque": b"\x00\xff"}],
        {"bad": 3},
    )


def test_leaves_of_every_kind_survive(tmp_path):
    state = {
        "half": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "none": np.zeros((0, 3), np.float32),
        "flag": np.array(True),
        "old_key": jax.random.PRNGKey(5),
        "key": jax.random.key(5, impl="rbg"),
    }
    writer = CheckpointWriter(tmp_path)
    writer.save(state, 1)
    writer.wait()
    restored = checkpoint.restore(tmp_path, jax.eval_shape(lambda: state)).state
    assert tree.tree_hash(restored) == tree.tree_hash(state)
    assert jax.random.key_impl(restored["key"]) == jax.random.key_impl(state["key"])


def test_equal_states_give_equal_manifests(tmp_path):
    save(tmp_path / "a", 3)
    save(tmp_path / "b", 3)
    a, b = ((tmp_path / run / "checkpoints/3/manifest.json").read_bytes() for run in "ab")
    assert a == b


def test_two_newest_are_kept_and_leftovers_swept(tmp_path):
    for name in ("tmp-9", "11"):
        (tmp_path / "checkpoints" / name / "arrays").mkdir(parents=True)
    save(tmp_path, 2, 3, 5, 7)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["5", "7"]
    assert checkpoint.latest(tmp_path) == 7


def test_nothing_to_restore(tmp_path):
    assert checkpoint.restore(tmp_path, template()) is None
    assert checkpoint.latest(tmp_path) is None


def test_every_misfit_is_in_one_message(tmp_path):
    save(tmp_path, 3)
    state = toy.init()
    params = {
        "stem": {"kernel": jnp.zeros((7, 8)), "bias": state.params["stem"]["bias"].astype(jnp.bfloat16)},
        "tail": {"kernel": jnp.zeros((8, 1))},
    }
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(tmp_path, state.replace(params=params))
    message = str(caught.value)
    assert "params/stem/kernel: want float32[7, 8], got float32[5, 8]" in message
    assert "params/stem/bias: want bfloat16[8], got float32[8]" in message
    assert "params/tail/kernel: missing" in message
    assert "params/head/kernel: not in this experiment's state" in message
    assert str(tmp_path) in message
    assert not isinstance(caught.value, DamagedCheckpoint)  # so no older step is taken instead


@pytest.mark.parametrize("field", ["params", "ema", "queues", "opt_state", "rng", "stats"])
def test_dropped_field_is_named(tmp_path, field):
    state = toy.init()
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__ if name != field}
    writer = CheckpointWriter(tmp_path)
    writer.save(fields, 3)
    writer.wait()
    with pytest.raises(CheckpointError, match=f"field {field} is missing"):
        checkpoint.restore(tmp_path, template())


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_bit_flips_never_load_wrong_values(tmp_path):
    state = save(tmp_path, 3)[3]
    whole, folder = tree.tree_hash(state), tmp_path / "checkpoints/3"
    rng = random.Random(0)
    caught = 0
    for path in files(folder):
        clean = path.read_bytes()
        for _ in range(40 if path.name == "manifest.json" else 3):
            if not clean:
                continue
            bad = bytearray(clean)
            offset = rng.randrange(len(bad))
            bad[offset] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            try:
                loaded = checkpoint.load_state(folder, template()).state
            except CheckpointError as error:
                caught += 1
                assert str(folder) in str(error)
            else:
                assert tree.tree_hash(loaded) == whole, (path, offset)
        path.write_bytes(clean)
    assert caught >= 100
    assert tree.tree_hash(checkpoint.load_state(folder, template()).state) == whole


def test_truncations_and_deletions_never_load_wrong_values(tmp_path):
    whole, folder = tree.tree_hash(save(tmp_path, 3)[3]), tmp_path / "checkpoints/3"
    for path in files(folder):
        clean = path.read_bytes()
        for size in (None, 0, len(clean) // 2, len(clean) - 1):
            path.unlink() if size is None else path.write_bytes(clean[: max(size, 0)])
            try:
                loaded = checkpoint.load_state(folder, template()).state
            except CheckpointError as error:
                assert str(folder) in str(error)
            else:
                assert tree.tree_hash(loaded) == whole, (path, size)
            path.write_bytes(clean)


def test_damage_names_file_and_key_and_falls_back_with_one_warning(tmp_path):
    states = save(tmp_path, 3, 5)
    folder = tmp_path / "checkpoints/5"
    expected = np.asarray(states[5].params["stem"]["kernel"])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["leaves"]["params/stem/kernel"]["sha256"] = tree.leaf_hash(expected + 1)
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    (folder / "manifest.json").write_text(json.dumps(body | {"sha256": checkpoint_format._digest(body)}))
    with pytest.raises(DamagedCheckpoint, match=r"checkpoints/5/arrays: wrong bytes in params/stem/kernel"):
        checkpoint.load_state(folder, template())
    data = folder / "arrays" / "params.stem.kernel" / "0.0"
    data.write_bytes(data.read_bytes()[:-4] + bytes(4))
    messages = []
    restored = checkpoint.restore(tmp_path, template(), warn=messages.append)
    assert restored.step == 3
    assert tree.tree_hash(restored.state) == tree.tree_hash(states[3])
    assert len(messages) == 1
    assert "arrays/params.stem.kernel/0.0" in messages[0]
    shutil.rmtree(tmp_path / "checkpoints/3/arrays")
    with pytest.raises(DamagedCheckpoint, match=r"no checkpoint in .* is whole"):
        checkpoint.restore(tmp_path, template())


def test_failed_save_frees_its_space_and_is_reported_once(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path)
    writer.save(toy.init(), 3)
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint, "sync_folder", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        writer.save(toy.init(), 5)
        with pytest.raises(CheckpointError, match=r"step 5 .*disk full.* bytes needed"):
            writer.wait()
    writer.wait()
    assert os.listdir(tmp_path / "checkpoints") == ["3"]
    writer.save(toy.init(), 7)
    writer.wait()
    assert checkpoint.latest(tmp_path) == 7


def test_file_size_limit_is_a_full_disk(tmp_path, repository):
    """RLIMIT_FSIZE in a fresh process: real writes that fail inside Orbax."""
    code = f"""
import resource, signal
import numpy as np
from mmjax.training.checkpoint import CheckpointError, CheckpointWriter, latest
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = CheckpointWriter({os.fspath(tmp_path)!r})
big = {{"params": {{"w": np.random.default_rng(0).standard_normal(300_007).astype(np.float32)}}}}
writer.save(big, 2); writer.wait()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
writer.save(big, 3)
try:
    writer.wait()
except CheckpointError as error:
    print(error)
else:
    raise SystemExit("the save should have failed")
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
assert latest({os.fspath(tmp_path)!r}) == 2
writer.save(big, 4); writer.wait()
"""
    environment = os.environ | {"PYTHONPATH": os.fspath(repository)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert "step 3 was not saved" in done.stdout and "1200028 bytes needed" in done.stdout
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "4"]


def test_second_run_on_a_workdir_is_refused_with_the_pid(tmp_path):
    lock = Lock(tmp_path)
    with pytest.raises(CheckpointError, match=f"in use by another run: pid {os.getpid()} "):
        Lock(tmp_path)
    lock.release()
    Lock(tmp_path).release()


def test_unwritable_workdir_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/run cannot be written"):
        Lock(tmp_path / "file" / "run")


def test_keep_below_two_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="keep=1"):
        CheckpointWriter(tmp_path, keep=1)


def test_load_params_reads_the_model_alone(tmp_path):
    state = save(tmp_path, 3)[3]
    (tmp_path / "config.json").write_text('{"system": "toy"}')
    for path in (tmp_path, tmp_path / "checkpoints/3"):
        loaded = checkpoint.load_params(path)
        assert loaded["config"] == {"system": "toy"}
        for field in ("params", "stats", "ema"):
            assert tree.tree_hash(loaded[field]) == tree.tree_hash(getattr(state, field))


def test_objects_stores_commit_by_the_manifest_alone(tmp_path, monkeypatch):
    """Without a rename: the folder has its name from the start, and counts only with its manifest."""
    for module in (checkpoint, storage):
        monkeypatch.setattr(module, "is_local", lambda _: False)
    state = save(tmp_path, 3, 5, 7)[7]
    assert checkpoint.steps(tmp_path) == [5, 7]
    with warnings.catch_warnings():
        assert tree.tree_hash(checkpoint.restore(tmp_path, template()).state) == tree.tree_hash(state)
    (tmp_path / "checkpoints/7/manifest.json").unlink()
    assert checkpoint.restore(tmp_path, template()).step == 5
    CheckpointWriter(tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["5"]


@pytest.mark.parametrize("point", ["write_arrays", "file_digests", "read_arrays", "sync_folder", "os.rename", "_prune"])
def test_killed_at_every_point_of_a_save(tmp_path, repository, point):
    """The step before is whole, the step itself is whole or absent, and the next start leaves nothing behind."""
    code = f"""
import os
import numpy as np
from mmjax.training import checkpoint
writer = checkpoint.CheckpointWriter({os.fspath(tmp_path)!r})
state = {{"params": {{"w": np.arange(7, dtype=np.float32)}}}}
for step in (2, 3):
    writer.save(state, step); writer.wait()
name = {point!r}
kill = lambda *_: os._exit(9)
if name == "os.rename":
    os.rename = kill
elif name == "_prune":
    checkpoint.CheckpointWriter._prune = kill
else:
    setattr(checkpoint, name, kill)
writer.save(state, 5); writer.wait()
"""
    environment = os.environ | {"PYTHONPATH": os.fspath(repository)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 9, done.stderr
    CheckpointWriter(tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == (["2", "3", "5"] if point == "_prune" else ["2", "3"])
    template = {"params": {"w": jax.ShapeDtypeStruct((7,), np.float32)}}
    restored = checkpoint.restore(tmp_path, template)
    assert restored.step == (5 if point == "_prune" else 3)
    np.testing.assert_array_equal(restored.state["params"]["w"], np.arange(7))
