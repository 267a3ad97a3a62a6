"""What a workdir holds beside checkpoints, and who may change it."""

import json
import os
import pathlib

import pytest

import mmjax
from mmjax import cli
from mmjax.errors import MmjaxError
from mmjax.training.ablate import ablate
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_compilation")
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
