"""`--workdir gs://...`: a whole run against an object store in memory, which has neither folders nor renames."""

import os
import pathlib
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from etils import epath
from etils.epath import gpath
from fsspec.implementations.memory import MemoryFileSystem

import mmjax
from mmjax import cli, tree
from mmjax.cli.runs import load_weights
from mmjax.training import checkpoint
from mmjax.training.average import average_checkpoints
from mmjax.training.checkpoint_format import CheckpointError, DamagedCheckpoint
from mmjax.training.metrics import read_metrics
from mmjax.training.workdir import Lock

EXPERIMENT = os.fspath(pathlib.Path(__file__).with_name("small_language.py"))
WORKDIR = "gs://bucket/runs/small"


class Bucket(MemoryFileSystem):
    """What epath takes for Google's store."""

    protocol = ("gcs", "gs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + os.fspath(path).removeprefix("gs://").strip("/")

    def mkdir(self, path, create_parents=True, **_):
        """Folders are names of objects up to a slash: there is nothing to make."""

    def makedirs(self, path, exist_ok=False):
        """As `mkdir`."""

    def mv(self, *_, **__):
        raise AssertionError("an object store cannot rename")

    rename = mv


@pytest.fixture(autouse=True)
def bucket(monkeypatch, tmp_path):
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.chdir(tmp_path)
    yield Bucket.store
    assert list(tmp_path.iterdir()) == []  # nothing in a local folder called gs:


def test_a_whole_run_lives_in_an_object_store(bucket, capsys):
    flags = ["--workdir", WORKDIR, "--tensorboard", "--keep", "3", "--eval_every", "2"]
    assert cli.main(["train", EXPERIMENT, *flags, "--steps", "2"]) == 0
    assert cli.main(["train", EXPERIMENT, *flags]) == 0
    assert "resumed gs://bucket/runs/small at step 2" in capsys.readouterr().out
    names = {name.removeprefix("/bucket/runs/small/") for name in bucket}
    assert {"config.json", "tokenizer.json", "labels.json", "metrics.jsonl", "curves.png"} <= names
    assert {"artifacts/val/picture_2.png", "artifacts/val/text_4.txt"} <= names
    assert {"checkpoints/2/manifest.json", "checkpoints/4/manifest.json"} <= names
    assert len([name for name in names if name.startswith("tensorboard/events")]) == 2
    assert [line["step"] for line in read_metrics(WORKDIR) if "train/loss" in line] == [1, 2, 3, 4]

    model = mmjax.load(WORKDIR)
    assert model.generate("once upon", max_new_tokens=3) is not None
    older = mmjax.load(f"{WORKDIR}/checkpoints/2")
    assert tree.tree_hash(older.params) != tree.tree_hash(model.params)
    assert tree.tree_hash(load_weights(WORKDIR)["params"]) == tree.tree_hash(model.params)
    mean = average_checkpoints(WORKDIR, 2)["head"]["kernel"]
    np.testing.assert_allclose(mean, (model.params["head"]["kernel"] + older.params["head"]["kernel"]) / 2, rtol=1e-6)
    assert cli.main(["evaluate", WORKDIR]) == 0
    assert (epath.Path(WORKDIR) / "evaluations" / "all.json").exists()
    assert cli.main(["generate", WORKDIR, "the sea", "--max_new_tokens", "2"]) == 0
    assert cli.main(["train", EXPERIMENT, "--workdir", "gs://bucket/next", "--init_from", WORKDIR, "--steps", "1"]) == 0

    damaged = next(name for name in bucket if "/4/arrays/params.head.kernel/0" in name)
    data = bytearray(bucket[damaged].getvalue())
    data[-1] ^= 1
    with epath.Path(f"gs:/{damaged}").open("wb") as file:
        file.write(bytes(data))
    with pytest.raises(DamagedCheckpoint, match=r"gs://bucket/runs/small/checkpoints/4/arrays/params\.head\.kernel/0"):
        checkpoint.load_params(WORKDIR)


def test_an_ablation_lives_in_an_object_store():
    flags = ["--over", "learning_rate=0.01,0.02", "--steps", "2", "--arms", "unroll"]
    assert cli.main(["ablate", EXPERIMENT, "--workdir", WORKDIR, *flags]) == 0
    for name in ("ablation.json", "ablation.png", "arms/learning_rate=0.02,seed=0/tokenizer.json"):
        assert (epath.Path(WORKDIR) / name).exists()
    assert checkpoint.latest(f"{WORKDIR}/arms/learning_rate=0.02,seed=0") == 2


def test_an_unknown_scheme_is_refused():
    with pytest.raises(CheckpointError, match="workdir nowhere://run: unknown scheme"):
        Lock("nowhere://run")


def test_frozen_leaves_are_stored_once_in_an_object_store(bucket):
    params = {"tower": {"kernel": np.arange(6, dtype=np.int8)}, "head": {"kernel": np.ones(3, np.float32)}}
    writer = checkpoint.CheckpointWriter(WORKDIR)
    for step in (1, 2):
        writer.save({"params": params}, step, frozen={"params/tower/kernel"})
    writer.wait()
    (name,) = [name for name in bucket if "/frozen/" in name]
    loaded = checkpoint.load_params(WORKDIR)["params"]
    assert tree.tree_hash(loaded) == tree.tree_hash(params)
    with epath.Path(f"gs:/{name}").open("wb") as file:
        file.write(bytes(6))
    with pytest.raises(DamagedCheckpoint, match=rf"gs:/{name} \(params/tower/kernel\): wrong bytes"):
        checkpoint.load_params(WORKDIR)
