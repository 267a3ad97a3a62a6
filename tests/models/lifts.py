"""The same steps under several lifts, in a process with eight virtual devices, for the tests of the systems."""

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmjax import tree
from mmjax.training.lift import create_lift
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer
from mmjax.training.state import create_state
from mmjax.training.step import train_step

HERE = pathlib.Path(__file__).resolve()
Batches = Sequence[Mapping[str, np.ndarray]]


def run_lifts(cases: Mapping[str, tuple[Method, Optimizer, Batches]], names: Sequence[str]) -> dict[str, Any]:
    """ "case/lift" -> metrics of every step; at the end the parameters' leaves, those of momentum parameters, queues
    and statistics ("carry"), and the number of programs.

    Noise is added to every leaf: a bias that starts at zero would hold nothing but sums of gradients, and
    rounding is relative to the terms of a sum.
    """
    results: dict[str, Any] = {}
    for case, (method, optimizer, batches) in cases.items():
        state = jax.jit(functools.partial(create_state, method, optimizer))(jax.random.key(0), batches[0])
        rng = np.random.default_rng(5)
        state = state.replace(
            params=jax.tree.map(lambda x, rng=rng: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), state.params)
        )
        for name in names:
            lift = create_lift(name, functools.partial(train_step, method, optimizer))  # type: ignore[arg-type]
            placed, metrics = lift.place(state), []
            for batch in batches:
                placed, step_metrics = lift.step(placed, lift.place_batch(batch))
                metrics.append(lift.fetch_metrics(step_metrics))
            end = lift.fetch(placed)
            carry, _ = jax.tree.flatten_with_path({"ema": end.ema, "queues": end.queues, "stats": end.stats})
            groups = {
                "leaves": tree.flatten(end.params),
                "carry": {jax.tree_util.keystr(path): leaf for path, leaf in carry},
            }
            arrays = {
                part: {path: np.asarray(leaf, np.float64).tolist() for path, leaf in leaves.items()}
                for part, leaves in groups.items()
            }
            results[f"{case}/{name}"] = {"metrics": metrics, "compiles": lift.compiles, **arrays}
    return results


def in_eight_devices(function: Callable[[], dict[str, Any]], folder: pathlib.Path) -> dict[str, Any]:
    """What `function` of a test module returns, as JSON allows, in a process of its own."""
    out = folder / "out.json"
    paths = (HERE.parents[2], HERE.parents[1], HERE.parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
    }
    module = function.__module__.rpartition(".")[2]
    code = f"""
import json, pathlib, sys, {module} as tests
pathlib.Path(sys.argv[1]).write_text(json.dumps(tests.{function.__name__}()))
"""
    command = [sys.executable, "-W", "error", "-c", code, os.fspath(out)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(out.read_text())
