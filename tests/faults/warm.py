"""Starts runs of the toy experiment by forking a process that has imported everything: in milliseconds, not seconds.

`python warm.py` reads one JSON request a line ({"arguments", "environment", "output"}), forks, and prints the pid of
the run. The run writes to the file `output`; its exit status follows in a file beside it, .code, once it has ended.
"""

import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

SUFFIX = ".code"


class Run:
    """A forked run, with the methods of subprocess.Popen that the tests use."""

    def __init__(self, pid: int, output: pathlib.Path):
        self.pid, self.output, self.returncode = pid, output, None

    def poll(self) -> int | None:
        code = self.output.with_suffix(SUFFIX)
        if self.returncode is None and code.exists():
            self.returncode = int(code.read_text())
        return self.returncode

    def communicate(self, timeout: float = 100) -> tuple[str, None]:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"run {self.pid}", timeout, self.output.read_text())
            time.sleep(0.005)
        return self.output.read_text(), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Warm:
    """The process that runs are forked from; `folder` takes their outputs."""

    def __init__(self, environment: Mapping[str, str], folder: pathlib.Path):
        command = [sys.executable, "-W", "error", "-W", "ignore:optax.global_norm", os.fspath(pathlib.Path(__file__))]
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Run:
        self.count += 1
        output = self.folder / f"{self.count}.txt"
        request = {"arguments": list(arguments), "environment": dict(environment), "output": os.fspath(output)}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return Run(int(self.process.stdout.readline()), output)

    def close(self) -> None:
        self.process.communicate(timeout=100)


def serve() -> list[str]:
    """Forks a run for each request; returns its arguments, in the run alone. Leaves when the requests end."""
    outputs: dict[int, pathlib.Path] = {}
    while True:
        # One request at a time: the next is sent when the pid of this one was read, so nothing waits in the buffer.
        if select.select([sys.stdin], [], [], 0.01)[0]:
            line = sys.stdin.readline()
            if not line:
                sys.exit()
            request = json.loads(line)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python 3.12 counts the threads of OpenBLAS, which survives a fork
                pid = os.fork()
            if pid == 0:
                become(request)
                return request["arguments"]
            outputs[pid] = pathlib.Path(request["output"])
            print(pid, flush=True)
        while outputs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            output = outputs.pop(pid)
            partial = output.with_suffix(".partial")
            partial.write_text(str(os.waitstatus_to_exitcode(status)))
            partial.rename(output.with_suffix(SUFFIX))


def become(request: Mapping[str, Any]) -> None:
    """The environment and the streams of a run."""
    os.environ.update(request["environment"])
    output, nothing = os.open(request["output"], os.O_WRONLY | os.O_CREAT), os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)


if __name__ == "__main__":
    import toy_experiment

    import mmjax.training.loop  # noqa: F401

    toy_experiment.main(serve())
