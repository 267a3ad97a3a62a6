"""Comparison of forms of one computation that differ in memory: each runs in a separate process."""

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

PROBES = 4096
"""The number of values of each result that are compared, spread evenly over it."""


def forget_peak() -> None:
    """The peak of the resident set is reset to the current size (Linux; making the inputs takes more)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def resident(peak: bool) -> float:
    """MiB."""
    name = "VmHWM" if peak else "VmRSS"
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def answer(function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """A side: runs `function`, prints memory and results on a line, then times a call for each line on stdin."""
    import jax

    compiled = jax.jit(function).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    forget_peak()
    before = resident(peak=False)
    results = jax.block_until_ready(compiled(*arguments))
    result = {"temporary_mib": memory.temp_size_in_bytes / 2**20, "resident_mib": resident(peak=True) - before}
    leaves = (np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(results))
    probes = [leaf[:: max(leaf.size // PROBES, 1)].tolist() for leaf in leaves]
    print(json.dumps(result | {"probes": probes}), flush=True)
    del results, leaves
    for _ in sys.stdin:
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


def compare(sides: Mapping[str, Sequence[str]], rounds: int) -> None:
    """Runs the sides, each the arguments of this program that make it `answer`, and prints a row a side.

    Differences are relative to the largest value of the first side's. Timed calls alternate; the best is printed.
    """
    children, results = {}, {}
    for name, arguments in sides.items():  # one after another: memory is measured with nobody else at work
        command = [sys.executable, "-m", sys.modules["__main__"].__spec__.name, *arguments]  # type: ignore[union-attr]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise SystemExit(f"the side {name!r} died: {child.wait()}")
        children[name], results[name] = child, json.loads(line) | {"seconds": []}
    for _ in range(rounds):
        for name, child in children.items():
            print(file=child.stdin, flush=True)
            results[name]["seconds"].append(json.loads(child.stdout.readline())["seconds"])
    for child in children.values():
        child.communicate()
    first = next(iter(results.values()))["probes"]
    width = max(map(len, results))
    print(f"{'':{width}s}   XLA temporaries   resident set grew by   seconds (best)   largest difference")
    for name, result in results.items():
        error = max(float(np.abs(np.subtract(a, b)).max() / np.abs(b).max()) for a, b in zip(result["probes"], first))
        print(
            f"{name:{width}s}   {result['temporary_mib']:11.0f} MiB   {result['resident_mib']:16.0f} MiB   "
            f"{min(result['seconds']):14.2f}   {error:18.1e}"
        )
