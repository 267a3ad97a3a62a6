"""The files of a workdir besides checkpoints, and which runs may change them."""

import json
import os
import pathlib
import resource
import signal
import struct

import pytest
from tensorboardX.proto import event_pb2

import mmjax
from mmjax import cli
from mmjax.errors import MmjaxError
from mmjax.training import checkpoint
from mmjax.training.ablate import ablate
from mmjax.training.checkpoint_format import CheckpointError
from mmjax.training.event_file import _checksum
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train
from mmjax.training.metrics import MetricsWriter, read_metrics
from mmjax.training.workdir import Lock

EXPERIMENT = os.fspath(pathlib.Path(__file__).with_name("small_language.py"))
Config = load_experiment(EXPERIMENT)


def contents(workdir):
    """Every file of a workdir with its bytes, but for the lock."""
    files = (path for path in sorted(workdir.rglob("*")) if path.is_file() and path.name != ".lock")
    return {os.fspath(path.relative_to(workdir)): path.read_bytes() for path in files}


def test_a_refused_run_changes_no_file_of_the_workdir(tmp_path):
    """Another width does not fit the checkpoint, another batch size does not fit the method."""
    train(Config(), tmp_path, experiment_file=EXPERIMENT)
    before = contents(tmp_path)
    assert {"config.json", "tokenizer.json", "labels.json"} <= before.keys()
    with pytest.raises(MmjaxError, match=r"params/token_embedding: want float32\[\d+, 24\], got float32\[\d+, 12\]"):
        train(Config(width=24), tmp_path, experiment_file="elsewhere.py")
    with pytest.raises(MmjaxError, match="batch_size=6 is not a multiple of 4"):
        train(Config(batch_size=6), tmp_path)
    with pytest.raises(MmjaxError, match="nowhere"):
        train(Config(init_from="nowhere"), tmp_path / "fresh")
    assert contents(tmp_path / "fresh") == {}
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] == []
    assert mmjax.load(tmp_path).config.width == 12
    assert cli.main(["evaluate", os.fspath(tmp_path)]) == 0


def test_a_resumed_run_may_change_what_fits(tmp_path, capsys):
    train(Config(steps=2), tmp_path)
    train(Config(steps=3, learning_rate=0.02), tmp_path)
    assert "config.json: steps 2 -> 3, learning_rate 0.01 -> 0.02" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["experiment"]["steps"] == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_a_refused_ablation_changes_no_file_of_the_workdir(tmp_path):
    arms = {"learning_rate": ["0.01", "0.02"]}
    ablate(Config, arms, tmp_path, arguments=["--steps", "2"], arms="unroll")
    before = contents(tmp_path)
    with pytest.raises(MmjaxError, match=r"groups/0.* does not fit"):
        ablate(Config, arms, tmp_path, arguments=["--steps", "3", "--width", "24"], arms="unroll")
    assert contents(tmp_path) == before


def test_artifacts_that_cannot_be_written_do_not_end_a_run(tmp_path, capsys):
    """Files in the way of folders and folders in the way of files, and a link to nowhere."""
    (tmp_path / "artifacts").write_text("")
    (tmp_path / "tensorboard").write_text("")
    (tmp_path / "curves.png").mkdir()
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "absent" / "file")
    last = train(Config(tensorboard=True, eval_every=1), tmp_path)
    assert {"train/loss", "val/logit"} <= last.keys()
    printed = capsys.readouterr().out
    for name in ("artifacts", "tensorboard", "curves.png", "metrics.jsonl"):
        assert printed.count(f"warning: {tmp_path / name} is not written") == 1, printed
    assert checkpoint.latest(tmp_path) == 4


def test_lines_that_a_full_disk_refused_are_written_later(tmp_path):
    warned = []
    writer = MetricsWriter(tmp_path, warn=warned.append)
    writer.write(1, {"train/loss": 3.5})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (45, limit[1]))  # a line and a half
        writer.write(2, {"train/loss": 2.5})
        writer.write(3, {"train/loss": float("nan"), "text": "an artifact"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [os.path.basename(text.split(" is not written")[0]) for text in warned] == ["metrics.jsonl", "tensorboard"]
    writer.write(4, {"train/loss": 1.5})
    writer.close()
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [
        (1, 3.5),
        (2, 2.5),
        (3, None),
        (4, 1.5),
    ]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert [(step, value) for step, value in scalars(events) if value == value] == [(1, 3.5), (2, 2.5), (4, 1.5)]


def scalars(path):
    """(step, value) of every scalar of an event file, its checksums checked."""
    data, results = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        record = data[12 : 12 + length]
        assert _checksum(data[:8]) == data[8:12] and _checksum(record) == data[12 + length : 16 + length]
        event = event_pb2.Event.FromString(record)
        results += [(event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return results


def test_a_checkpoint_that_was_not_saved_is_the_error_that_is_raised(tmp_path, monkeypatch):
    """Also where the run ends by another one."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_arrays", full)
    monkeypatch.setattr(Config, "evaluations", lambda self: (Failing(),))
    with pytest.raises(CheckpointError, match=r"(?s)step 2 was not saved .*disk full.* ended by OSError: .*picture"):
        train(Config(steps=2, checkpoint_every=0), tmp_path)


class Failing:
    name, every = "failing", 0

    def run(self, params, state):
        raise OSError(28, "No space left on device", "picture.png")


def test_a_store_without_its_package_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"workdir s3://bucket/run: .*s3fs"):
        Lock("s3://bucket/run")
