"""What a run prints on a terminal, in a notebook and into a pipe, and how the time left is measured."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest
import rich.console

from mmjax.training import pace
from mmjax.training.console import RunConsole, duration
from mmjax.training.experiment import ExperimentConfig, load_experiment
from mmjax.training.loop import train
from mmjax.training.pace import Pace
from mmjax.training.scores import Score

TOY = load_experiment(pathlib.Path(__file__).parents[1] / "faults" / "toy_experiment.py")
SCORES = {"top1": Score(71.25, 1300, 68.5, 73.75, 10.0), "rank": Score(3.5, 1300, unit="rank"), "top1_n": 1300}


@dataclasses.dataclass
class Recall:
    name: str = "recall"
    every: int = 0

    def run(self, params, state):
        return SCORES | {"recall_picture": np.zeros((2, 3, 3), np.uint8)}


@dataclasses.dataclass(frozen=True)
class Scored(TOY):
    steps: int = 6
    eval_every: int = 3
    log_every: int = 2
    checkpoint_every: int = 0

    def evaluations(self):
        return (Recall(),)


def plain(text):
    """Without control codes; each state of the bar is a line."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.replace("\r", "\n"))


def check_facts(text, workdir):
    for fact in (
        r"device +\d+ x cpu, jit",
        r"precision +parameters float32",
        r"steps +6 of 8 images, seed 0",
        r"parameters +132, 77 trainable",
        rf"workdir +{re.escape(str(workdir))}\n",
        r"compiling the training step",
        r"compiled; the first step took [\d.:]+ (s|min)",
        rf"checkpoint +{re.escape(str(workdir))}/checkpoints/6\n",
        rf"curves +{re.escape(str(workdir))}/curves.png\n",
        rf"metrics +{re.escape(str(workdir))}/metrics.jsonl\n",
        rf"artifacts +{re.escape(str(workdir))}/artifacts",
    ):
        assert re.search(fact, text), (fact, text)


def test_a_pipe_has_compact_lines(tmp_path, capsys):
    train(Scored(), tmp_path)
    text = capsys.readouterr().out
    check_facts(text, tmp_path)
    assert text.count("step 3/6  top1=71.25  rank=3.5\n") == 1 and text.count("step 6/6  top1=71.25  rank=3.5\n") == 1
    assert re.search(r"step 4/6  loss=[\d.]+  .*images_per_second=", text)
    assert not re.search(r"_low|_high|_chance|picture|skipped|\x1b|┃", text)


def test_a_terminal_has_a_bar_and_the_table_of_evaluate(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "110")
    train(Scored(), tmp_path)
    text = plain(capsys.readouterr().out)
    check_facts(text, tmp_path)
    for step in (3, 6):
        assert f"recall at step {step} of 6" in text
    assert len(re.findall(r"top1 +│ +71.25 │ 68.50 - 73.75 │ 1,300 │ +10.00", text)) == 2
    assert re.search(r"rank +│ 3.50 rank", text)
    assert re.search(r"6/6 .*loss \d", text) and "evaluating recall" in text
    assert not re.search(r"step \d/6  ", text)  # the lines of a pipe


def test_a_notebook_has_lines_and_tables(tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda segments, text: shown.append(text))
    train(Scored(), tmp_path)
    text = capsys.readouterr().out
    check_facts(text, tmp_path)
    assert re.search(r"step 4/6  loss=", text)
    assert len([table for table in shown if "71.25" in table and "68.50 - 73.75" in table]) == 2


def test_time_left_is_of_steady_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    steps = Pace()
    now[0] += 100  # compiles
    steps.restart()
    steps.mark(1)
    assert steps.seconds_left(100) is None
    for step in range(2, 11):
        now[0] += 2
        steps.mark(step)
    assert steps.seconds_left(100) == pytest.approx(180)
    assert steps.since_log(10) == pytest.approx(0.5)
    with steps.pause():
        now[0] += 1000  # evaluates
    for step in range(11, 21):
        now[0] += 2
        steps.mark(step)
    assert steps.seconds_left(100) == pytest.approx(160)
    assert steps.since_log(20) == pytest.approx(0.5)
    for step in range(21, 21 + pace.WINDOW):
        now[0] += 1  # faster from here on
        steps.mark(step)
    assert steps.seconds_left(100) == pytest.approx(100 - 20 - pace.WINDOW)


@pytest.mark.parametrize(
    "seconds, text", [(0.04, "0.04 s"), (9.94, "9.9 s"), (42.4, "42 s"), (245, "4:05 min"), (27060, "7:31 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_precision_names_what_computes(capsys):
    @dataclasses.dataclass(frozen=True)
    class Inner:
        dtype: str = "bfloat16"

    @dataclasses.dataclass(frozen=True)
    class Outer:
        vision: Inner = dataclasses.field(default_factory=Inner)

    @dataclasses.dataclass(frozen=True)
    class Data:
        source: tuple = (0,) * 1200

    params = {"head": {"kernel": np.zeros((3, 5), np.float32)}, "llm": {"kernel": np.zeros((7, 2), np.float16)}}
    labels = {"head/kernel": "trainable", "llm/kernel": "frozen"}
    RunConsole(ExperimentConfig(steps=30, batch_size=80)).start("/runs/x", Data(), Outer(), params, labels)
    text = capsys.readouterr().out
    assert "precision  parameters float32, float16, computation bfloat16\n" in text
    assert "data       1,200 images, 2 epochs\n" in text and "parameters 29, 15 trainable\n" in text
