"""The command line: what each command does, its errors, and that `--help` does not import jax."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from mmjax import cli, hub
from mmjax.cli.runs import load_weights, parse_over
from mmjax.errors import MmjaxError
from mmjax.evaluation.report import from_json

TOY = os.fspath(pathlib.Path(__file__).parent / "faults" / "toy_experiment.py")
COLOURS = {"red": (230, 20, 30), "green": (10, 200, 40), "blue": (30, 20, 220)}


class TwoTowers:
    """Image features are mean colours; text features are those of the named colour."""

    system, layout, classified, labels, notes = "toy", "hf", "image", (), ()

    def encode_image(self, images):
        return np.stack([np.asarray(image, np.float32).mean((0, 1)) for image in images])

    def classify(self, images, labels):
        logits = np.stack([self.encode_image(images) @ self.encode_text([label])[0] / 9999 for label in labels], 1)
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return [sorted(zip(labels, row), key=lambda pair: -pair[1]) for row in shares]

    def encode_text(self, texts):
        return np.stack([next(np.float32(rgb) for name, rgb in COLOURS.items() if name in text) for text in texts])


@pytest.fixture
def towers(monkeypatch):
    monkeypatch.setattr(hub, "load", lambda source, **_: TwoTowers())


@pytest.fixture
def pictures(tmp_path):
    """Seven images of each colour, and one file that is no image."""
    rng = np.random.default_rng(3)
    for name, rgb in COLOURS.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(7):
            pixels = np.clip(rng.normal(rgb, 9, (11, 13, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    (tmp_path / "images" / "red" / "broken.png").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The workdir of a run made by `mmjax train`."""
    workdir = tmp_path_factory.mktemp("run")
    flags = ["--steps", "5", "--log_every", "1", "--optimizer_config.learning_rate", "0.02"]
    assert cli.main(["train", TOY, "--workdir", os.fspath(workdir), *flags]) == 0
    return workdir


def test_help_imports_no_jax(repository):
    code = "import sys; sys.argv = ['mmjax', '--help']\ntry:\n    from mmjax.cli import main; main()\n"
    code += (
        "except SystemExit: pass\nassert not {'jax', 'numpy', 'flax', 'tyro'} & set(sys.modules), sys.modules.keys()"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    for verb in (
        *("train", "ablate", "plan", "evaluate", "classify", "retrieve", "match", "answer", "ground", "caption"),
        *("convert", "tokenizer", "models"),
    ):
        assert f"\n    {verb}" in process.stdout


def test_train_writes_a_workdir_with_its_fields(run_dir):
    config = json.loads((run_dir / "config.json").read_text())
    assert config["experiment_file"] == TOY
    assert config["experiment"]["optimizer_config"] == {"learning_rate": 0.02}
    assert (run_dir / "checkpoints" / "5" / "manifest.json").is_file()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5]


def test_default_workdir_and_module(repository, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "mmjax", "train", TOY, "--steps", "2"]
    environment = os.environ | {"PYTHONPATH": os.fspath(repository)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "workdirs" / "toy_experiment" / "checkpoints" / "2").is_dir()


def test_sigterm_is_a_success(tmp_path, monkeypatch, capsys):
    from mmjax.training.in_flight import InFlight

    add = InFlight.add

    def stopped(self, step, metrics):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return add(self, step, metrics)

    monkeypatch.setattr(InFlight, "add", stopped)
    assert cli.main(["train", TOY, "--workdir", os.fspath(tmp_path)]) == 0
    assert "SIGTERM: saved step" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] in (["3"], ["4"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "nowhere.py"], "mmjax train: nowhere.py: no such experiment file"),
        (["evaluate", "nowhere", "--task", "knn"], "mmjax evaluate: nowhere/config.json is missing"),
        (["convert", "nowhere", "out", "--layout", "hf"], "mmjax convert: nowhere: neither a file nor a folder"),
        (["ablate", TOY], "mmjax ablate: --over NAME=VALUE"),
        (["ablate", TOY, "--over", "momentum"], "--over momentum: want NAME=VALUE"),
        (["ablate", TOY, "--over", "momentum=0,0.9", "--seeds", "x"], "--seeds: 'x' is not a whole number"),
        (["plan", TOY], "mmjax plan: --topology"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", TOY, "--stepz", "3"], "stepz"),
        (["ablate", TOY, "--over", "momentum=0,1", "--steps", "many"], "steps"),
        (["models", "--loud"], "unrecognized arguments: --loud"),
        (["fly"], "invalid choice"),
    ],
)
def test_wrong_flags_exit_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_of_an_experiment_lists_its_fields(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", TOY, "--help"])
    assert caught.value.code == 0
    assert "learning-rate" in capsys.readouterr().out.replace("_", "-")
    assert cli.main(["train", "--help"]) == 0
    assert "EXPERIMENT.py" in capsys.readouterr().out
    assert cli.main(["train"]) == 2


def test_interrupt_is_130(monkeypatch, capsys):
    monkeypatch.setattr("mmjax.cli.runs.train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["train", TOY]) == 130
    assert capsys.readouterr().err == "mmjax train: interrupted\n"


def test_over():
    assert parse_over(["momentum=0, 0.9", "t=0.07,0.2"]) == {"momentum": ["0", "0.9"], "t": ["0.07", "0.2"]}
    for wrong in (["momentum=0,0"], ["momentum="], ["=0"], ["m=0", "m=1"], []):
        with pytest.raises(MmjaxError, match="--over"):
            parse_over(wrong)


def test_ablate_through_the_command_line(tmp_path, capsys):
    flags = ["--over", "momentum=0,0.99", "--workdir", os.fspath(tmp_path), "--steps", "3", "--arms", "unroll"]
    assert cli.main(["ablate", TOY, *flags]) == 0
    report = json.loads((tmp_path / "ablation.json").read_text())
    assert (report["arms"], report["compiles"], len(report["results"])) == ("unroll", 1, 2)
    out = capsys.readouterr().out
    assert "one program (unroll)" in out and "after 3 steps" in out


def test_evaluate_restores_the_run(run_dir, capsys):
    assert cli.main(["evaluate", os.fspath(run_dir)]) == 0
    written = from_json((run_dir / "evaluations" / "all.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = {name: value for line in lines for name, value in line.items() if name.startswith("val/")}
    assert {f"val/{name}": score.value for name, score in written.items()} == pytest.approx(logged)
    assert "momentum_norm" in capsys.readouterr().out
    assert cli.main(["evaluate", os.fspath(run_dir), "--task", "knn"]) == 2
    assert "the experiment's evaluations are norm" in capsys.readouterr().err


def test_init_from_takes_runs_and_public_weights(run_dir, tmp_path, monkeypatch, capsys):
    kernel = np.full((5, 11), 0.25, np.float32)
    weights = {"params": {"stem": {"kernel": kernel}}, "stats": {}}
    model = types.SimpleNamespace(weights=lambda: weights)
    monkeypatch.setattr(hub, "load", lambda source: model)
    np.testing.assert_array_equal(load_weights("owner/name")["params"]["stem"]["kernel"], kernel)
    assert load_weights(os.fspath(run_dir))["params"]["stem"]["kernel"].shape == (5, 11)
    start = ["train", TOY, "--steps", "1", "--init_from", "owner/name", "--workdir"]
    assert cli.main([*start, os.fspath(tmp_path / "a")]) == 0
    assert "initialised from owner/name: 1 arrays; fresh: " in capsys.readouterr().out
    weights["params"]["stem"]["kernel"] = kernel[:, :7]
    assert cli.main([*start, os.fspath(tmp_path / "b")]) == 2
    assert "stem/kernel: want [5, 11], got [5, 7]" in capsys.readouterr().err


@pytest.mark.parametrize("task, n", [("zero_shot", 21), ("knn", 21), ("linear_probe", 3)])
def test_evaluate_on_a_folder(towers, pictures, tmp_path, monkeypatch, capsys, task, n):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "owner/name", "--task", task, "--data", os.fspath(pictures)]) == 0
    scores = from_json((tmp_path / "evaluations" / f"{task}.json").read_text())
    first = next(iter(scores.values()))
    assert (first.value, first.n) == (100.0, n)
    assert first.low is not None and first.low < 100
    assert "1 of 22 images are unreadable" in capsys.readouterr().out


def test_evaluate_on_train_and_test_folders(towers, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "split"
    root.mkdir()
    pictures.rename(root / "train")
    for name in COLOURS:
        (root / "test" / name).mkdir(parents=True)
        (root / "train" / name / "0.png").rename(root / "test" / name / "0.png")
    # One test image lies in the wrong class: two of three are right.
    (root / "test" / "red" / "0.png").write_bytes((root / "test" / "blue" / "0.png").read_bytes())
    for task in ("zero_shot", "knn", "linear_probe"):
        assert cli.main(["evaluate", "owner/name", "--task", task, "--data", os.fspath(root)]) == 0
        first = next(iter(from_json((tmp_path / "evaluations" / f"{task}.json").read_text()).values()))
        assert (first.value, first.n) == (pytest.approx(200 / 3), 3), task


def test_classify(towers, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    image = os.fspath(pictures / "green" / "3.png")
    assert cli.main(["classify", "owner/name", image, "--labels", "red,green,blue"]) == 0
    cells = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [cell.strip() for cell in cells[0][:2]] == [image, "green"] and float(cells[0][2].rstrip(" %")) > 50
    assert {row[1].strip() for row in cells} == {"red", "green", "blue"}
    assert sum(float(row[2].rstrip(" %")) for row in cells) == pytest.approx(100, abs=0.2)
    assert cli.main(["classify", "owner/name", image]) == 2
    assert "no labels.json" in capsys.readouterr().err
    monkeypatch.setattr(TwoTowers, "labels", ("blue", "green"))
    assert cli.main(["classify", os.fspath(tmp_path), image]) == 0
    assert "green" in capsys.readouterr().out
    assert cli.main(["classify", "owner/name", "nowhere.png", "--labels", "a,b"]) == 2
    assert "nowhere.png: no such image" in capsys.readouterr().err


def test_a_long_name_is_printed_literally(towers, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    image = os.fspath(shutil.copy(pictures / "green" / "3.png", tmp_path / "a[b] :cat: 3.png"))
    assert cli.main(["classify", "owner/name", image, "--labels", "red,green"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    name = "".join(line.split("│")[1].strip() for line in lines)
    assert name.replace(" ", "") == image.replace(" ", "") and len(lines) > 2


def test_retrieve(towers, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    picture = tmp_path / "nearest.png"
    for query in (["--text", "a blue thing"], ["--image", os.fspath(pictures / "blue" / "1.png")]):
        flags = ["--folder", os.fspath(pictures), "-k", "7", "--picture", os.fspath(picture)]
        assert cli.main(["retrieve", "owner/name", *query, *flags]) == 0
        out = capsys.readouterr().out
        rows = [line.split("│")[2:4] for line in out.splitlines() if line.startswith("│")]
        assert {name.strip() for name, _ in rows} == {str(pictures / "blue" / f"{index}.png") for index in range(7)}
        cosines = [float(cosine) for _, cosine in rows]
        assert cosines == sorted(cosines, reverse=True) and cosines[-1] > 0.9
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["retrieve", "owner/name", "--text", "red", "--folder", os.fspath(pictures), "-k", "0"]) == 2


def test_convert_and_models(tmp_path, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(hub, "load", lambda source, layout: done.append((source, layout)) or TwoTowers())
    monkeypatch.setattr(hub, "save", lambda model, target: done.append(target))
    monkeypatch.setattr(hub, "export", lambda model, target, layout, lossy: done.append((target, layout)) or ())
    assert cli.main(["convert", "a", "b", "--layout", "openai", "--from", "hf"]) == 0
    assert cli.main(["convert", "a", "b", "--layout", "mmjax"]) == 0
    assert done == [("a", "hf"), ("b", "openai"), ("a", None), "b"]
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    from mmjax.models import SYSTEMS

    assert "a (hf) -> b (openai)" in out and all(system.name in out for system in SYSTEMS)
