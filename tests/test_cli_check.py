"""`mmjax check`: bad records, rows without labels and parameters without a gradient, before a run."""

import os
import pathlib

import pytest

from mmjax import cli

EXPERIMENT = os.fspath(pathlib.Path(__file__).parent / "training" / "checked_experiment.py")


def lines_of(capsys, *arguments):
    code = cli.main(["check", EXPERIMENT, *arguments])
    output = capsys.readouterr().out
    return code, output, {line[:13].strip(): line[13:] for line in output.splitlines()}


def test_the_first_batch_and_its_gradient(capsys):
    code, output, lines = lines_of(capsys)
    assert code == 0
    assert lines["read"] == "1 batches of 2 images, 0 bad records"
    assert lines["padding"] == "16.7% of all positions" and lines["labels"] == "2.0 a row, 2 to 2; 0 rows have none"
    assert lines["row 0"] == "'[CLS] what is[[red [SEP]]]'"
    assert lines["no gradient"] == "table/unused"
    table, tower = (next(line for line in output.splitlines() if f" {name} " in line) for name in ("table", "tower"))
    assert [cell.strip() for cell in table.split("│")[2:4]] == ["67", "0"] and "│                3 │" in table
    assert [cell.strip() for cell in tower.split("│")[2:5]] == ["0", "5", ""]


def test_an_epoch_lists_bad_records_and_rows_without_labels(capsys):
    code, _, lines = lines_of(capsys, "--epoch")
    assert code == 1, "one of six records is more than max_bad_fraction"
    assert lines["read"] == "3 batches of 2 images, 1 bad records" and lines[""] == "texts[2] (texts: broken)"
    assert lines_of(capsys, "--epoch", "--max_bad_fraction", "0.5")[0] == 0, "that many are allowed"
    assert lines_of(capsys, "--batches", "2")[2]["labels"] == "1.5 a row, 0 to 2; 1 rows have none"


def test_what_is_not_finite_is_named(capsys):
    code, _, lines = lines_of(capsys, "--scale", "nan")
    assert code == 1 and lines["not finite"] == "table/seen"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--batches", "0"], "--batches 0: at least 1"), (["--batches", "1", "--epoch"], "not allowed with")],
)
def test_faulty_flags(capsys, arguments, message):
    try:
        assert cli.main(["check", EXPERIMENT, *arguments]) == 2
    except SystemExit as stopped:
        assert stopped.code == 2
    assert message in capsys.readouterr().err


def test_data_without_epochs(capsys):
    toy = os.fspath(pathlib.Path(__file__).parent / "faults" / "toy_experiment.py")
    assert cli.main(["check", toy, "--epoch"]) == 2
    assert "--epoch: this experiment's data has no epochs; --batches N reads N" in capsys.readouterr().err
    assert cli.main(["check", toy, "--nan_from", "0"]) == 1
