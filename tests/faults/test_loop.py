"""Runs that are killed, stopped or have bad data, and how they resume.

The requirement: the last checkpoint's manifest (SHA-256 of every leaf, data position, counters) equals that of
an uninterrupted run.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from warm import Warm

STEPS = 60


class Runner:
    """Runs of the toy experiment, forked from one process."""

    def __init__(self, repository, folder):
        environment = os.environ | {
            "PYTHONPATH": os.fspath(repository) + os.pathsep + os.environ.get("PYTHONPATH", ""),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONUNBUFFERED": "1",
        }
        self.warm = Warm(environment, folder)

    def start(self, workdir, *flags, **environment):
        return self.warm.start([os.fspath(workdir), *map(str, flags)], environment)

    def run(self, workdir, *flags, code=0, **environment):
        run = self.start(workdir, *flags, **environment)
        output = run.communicate(timeout=100)[0]
        assert run.returncode == code, output[-3000:]
        return output


@pytest.fixture(scope="module")
def runner(repository, tmp_path_factory):
    runner = Runner(repository, tmp_path_factory.mktemp("outputs"))
    yield runner
    runner.warm.close()


def manifest(workdir, step=STEPS):
    return (workdir / "checkpoints" / str(step) / "manifest.json").read_text()


def devices(count):
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def wait_for(run, condition):
    """Polls until the condition holds; False if the run ended first."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():
            return True
        if run.poll() is not None:
            return False
        time.sleep(0.002)
    run.kill()
    raise AssertionError(run.communicate()[0][-3000:])


@pytest.fixture(scope="module")
def clean(runner, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("clean")
    output = runner.run(workdir)
    assert "trainable" in output
    return workdir


def test_workdir_of_a_clean_run(clean, runner):
    assert sorted(os.listdir(clean / "checkpoints"), key=int) == ["56", "60"]
    assert (clean / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((clean / "config.json").read_text())
    assert (config["system"], config["model"], config["experiment"]["steps"]) == ("toy", {"width": 5}, STEPS)
    values = losses(clean)
    assert sorted(values) == [10, 20, 30, 40, 50, 60]
    assert values[60] < values[10]
    lines = [json.loads(line) for line in (clean / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/norm" in line] == [20, 40, 60]
    rates = [line for line in lines if "perf/images_per_second" in line]
    for line in rates:
        np.testing.assert_allclose(line["perf/images_per_second"], 8 * line["perf/steps_per_second"], rtol=1e-6)
    assert len(rates) >= 5
    before = manifest(clean)
    output = runner.run(clean)
    assert "is finished (60 of 60 steps): only evaluating" in output
    assert manifest(clean) == before
    assert [json.loads(line) for line in (clean / "metrics.jsonl").read_text().splitlines()] == lines


def test_killed_at_random_times_it_ends_in_the_same_bits(clean, runner, tmp_path):
    rng = random.Random(3)
    kills = 0
    for attempt in range(12):
        run = runner.start(tmp_path, "--delay", 0.01, "--checkpoint-every", 3)
        # Once steps are being taken: anywhere in a step, a save, its rename or its pruning.
        newest = (
            max([int(p) for p in os.listdir(tmp_path / "checkpoints") if p.isdecimal()], default=0) if attempt else 0
        )
        target = min(newest + 3 * rng.randrange(2, 5), STEPS)
        reached = wait_for(run, lambda: (tmp_path / "checkpoints" / str(target)).exists() or run.poll() is not None)  # noqa: B023
        time.sleep(rng.random() * 0.06)
        if reached and run.poll() is None:
            run.send_signal(signal.SIGKILL)
            kills += 1
        output = run.communicate()[0]
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, output[-3000:]
    runner.run(tmp_path, "--delay", 0)
    assert kills >= 4
    assert manifest(tmp_path) == manifest(clean)
    assert losses(tmp_path) == losses(clean)
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if not name.isdecimal()]


@pytest.mark.parametrize("number, times", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 3)])
def test_stopped_by_a_signal_it_saves_and_exits_zero(clean, runner, tmp_path, number, times):
    run = runner.start(tmp_path, "--delay", 0.02, "--checkpoint-every", 0)
    wait_for(run, lambda: 10 in losses(tmp_path) if (tmp_path / "metrics.jsonl").exists() else False)
    for _ in range(times):
        run.send_signal(number)
        time.sleep(0.01)
    output = run.communicate(timeout=20)[0]
    assert run.returncode == 0, output[-3000:]
    assert f"{number.name}: saved step" in output
    (saved,) = os.listdir(tmp_path / "checkpoints")
    assert 10 <= int(saved) < STEPS
    output = runner.run(tmp_path)
    assert f"resumed {tmp_path} at step {saved}" in output
    assert manifest(tmp_path) == manifest(clean)
    assert losses(tmp_path) == losses(clean)


def test_a_workdir_that_was_deleted_is_one_error_and_stays_deleted(runner, tmp_path):
    workdir = tmp_path / "run"
    run = runner.start(workdir, "--delay", 0.02, "--checkpoint-every", 0)
    wait_for(run, lambda: 10 in losses(workdir) if (workdir / "metrics.jsonl").exists() else False)
    shutil.rmtree(workdir)
    run.send_signal(signal.SIGTERM)
    output = run.communicate(timeout=20)[0]
    assert run.returncode == 1, output[-3000:]
    assert re.search(rf"error: step \d+ was not saved: {re.escape(str(workdir))} was deleted during the run", output)
    assert output.count("error:") == 1 and "Traceback" not in output and not workdir.exists(), output[-3000:]


def test_resume_on_other_devices_and_another_lift(clean, runner, tmp_path):
    runner.run(tmp_path, "--nan-from", 10**8, "--steps", 30, "--log-every", 10)
    flags = ("--lift", "pmap", "--steps", 40, "--log-every", 10)
    output = runner.run(tmp_path, *flags, XLA_FLAGS=devices(4))
    assert "devices was 1 cpu, is 4 cpu; lift was jit, is pmap" in output
    output = runner.run(tmp_path, "--lift", "mesh", XLA_FLAGS=devices(2))
    assert "lift was pmap, is mesh" in output
    resumed, expected = losses(tmp_path), losses(clean)
    assert resumed.keys() == expected.keys()
    np.testing.assert_allclose([resumed[k] for k in resumed], [expected[k] for k in resumed], rtol=1e-5)
    assert json.loads(manifest(tmp_path))["data"] == json.loads(manifest(clean))["data"]


def test_non_finite_updates_are_counted_and_three_in_a_row_stop(runner, tmp_path):
    output = runner.run(tmp_path, "--nan-from", 20, code=1)
    assert "step 23: 3 updates in a row were not finite" in output
    assert "parameters are those of step 20" in output


def test_too_many_bad_records_save_first(runner, tmp_path):
    output = runner.run(tmp_path, "--bad-from", 25, code=1)
    assert "rows.txt: 9 of 20 records are bad" in output
    assert sorted(os.listdir(tmp_path / "checkpoints"), key=int) == ["21", "25"]


def test_newest_checkpoint_damaged_resumes_from_the_one_before(clean, runner, tmp_path):
    runner.run(tmp_path, "--steps", 58)
    data = tmp_path / "checkpoints/58/arrays/params.stem.kernel/0.0"
    data.write_bytes(data.read_bytes()[:-1])
    output = runner.run(tmp_path)
    assert output.count("warning: falling back to step 56") == 1
    assert manifest(tmp_path) == manifest(clean)


def test_second_run_is_refused_with_the_pid(runner, tmp_path):
    run = runner.start(tmp_path, "--delay", 0.2)
    wait_for(run, lambda: (tmp_path / "config.json").exists())
    output = runner.run(tmp_path, code=1)
    assert f"in use by another run: pid {run.pid} on" in output
    run.kill()
    run.communicate()


def test_init_from_takes_what_fits_and_refuses_what_does_not(clean, runner, tmp_path):
    output = runner.run(tmp_path / "a", "--init-from", clean, "--steps", 1)
    assert f"initialised from {clean}: 4 arrays" in output
    (tmp_path / "not").mkdir()
    output = runner.run(tmp_path / "b", "--init-from", tmp_path / "not", "--steps", 1, code=1)
    assert "not holds no checkpoint" in output or str(tmp_path / "not") in output


def cluster(runner, workdir, *flags):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [runner.start(workdir, *flags, TOY_CLUSTER=f"localhost:{port} 2 {index}") for index in range(2)]


def finish(runs, code=0):
    output = [run.communicate(timeout=100)[0] for run in runs]
    assert [run.returncode for run in runs] == [code] * len(runs), "\n".join(output)[-4000:]
    return output


def test_two_processes_stop_at_one_step_and_resume_in_the_same_bits(runner, tmp_path):
    """A signal to either process stops both: SIGTERM to the first, then Ctrl-C to the second in the resumed run."""
    flags = ("--lift", "mesh", "--checkpoint-every", 25)
    clean = cluster(runner, tmp_path / "clean", *flags)
    begun = 0
    for target, number in ((0, signal.SIGTERM), (1, signal.SIGINT)):
        runs = cluster(runner, tmp_path / "run", *flags, "--delay", 0.02)
        assert wait_for(runs[0], lambda: last_logged(tmp_path / "run") > begun)  # noqa: B023
        runs[target].send_signal(number)
        first, second = finish(runs)
        assert "SIGTERM: saved step" in first, first
        assert "saved step" not in second
        step = max(map(int, os.listdir(tmp_path / "run/checkpoints")))
        assert begun < step < STEPS
        begun = step
    finish(clean)
    finish(cluster(runner, tmp_path / "run", *flags))
    assert manifest(tmp_path / "run") == manifest(tmp_path / "clean")
    assert len(json.loads(manifest(tmp_path / "run"))["data"]) == 2


def last_logged(workdir):
    return max(losses(workdir), default=0) if (workdir / "metrics.jsonl").exists() else 0
