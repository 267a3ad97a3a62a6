"""The time that one program for many arms saves: against a process an arm, and against single steps.

    python experiments/benchmarks/ablation_arms.py [EXPERIMENT.py] [--over NAME=A,B,C,D] [--steps N] [--field VALUE ...]

Whole runs include start-up and compilation (no compilation cache) and the experiment's evaluations. Steps are timed in
one process, the ways alternating; the ratio is the median over rounds, so that a slow spell of the machine meets all.
"""

import argparse
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import rich
from rich.table import Table

from mmjax.cli.runs import parse_over
from mmjax.training.arms import ArmLoop, over_arms, stack
from mmjax.training.experiment import load_experiment, parse_overrides
from mmjax.training.lift import JitLift, initialise
from mmjax.training.state import create_state
from mmjax.training.step import train_step

DEFAULT = pathlib.Path(__file__).parent.parent / "moco_openmoji.py"
WAYS: tuple[ArmLoop, ...] = ("vmap", "map", "unroll")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("experiment", nargs="?", default=os.fspath(DEFAULT))
    parser.add_argument("--over", default="momentum=0,0.9,0.99,0.999", help="one hyper-parameter and its values")
    parser.add_argument("--steps", type=int, default=60, help="of each whole run, more than its warmup")
    parser.add_argument("--rounds", type=int, default=5, help="of the timed steps")
    parser.add_argument("--only", choices=["runs", "steps"], help="one half alone")
    flags, fields = parser.parse_known_args()
    name, values = next(iter(parse_over([flags.over]).items()))
    table = Table(title=f"{len(values)} arms of {pathlib.Path(flags.experiment).name}", title_justify="left")
    for column in ("what", "one program", f"{len(values)} times one arm", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    if flags.only != "runs":
        for way, joint, separate, ratio, compiled in steps(flags.experiment, name, values, flags.rounds, fields):
            table.add_row(
                f"step, {way} (compiled in {compiled:.0f} s)", f"{joint:.3f} s", f"{separate:.3f} s", f"{ratio:.2f}"
            )
    if flags.only != "steps":
        joint, separate = runs(flags.experiment, name, values, [*fields, "--steps", str(flags.steps)])
        table.add_row(
            f"{flags.steps} steps, whole run", f"{joint:.1f} s", f"{separate:.1f} s", f"{joint / separate:.2f}"
        )
    rich.print(table)


def runs(experiment: str, name: str, values: Sequence[str], fields: Sequence[str]) -> tuple[float, float]:
    """Seconds of one `mmjax ablate` over all values, and of one for each value, one after another."""
    joint = _ablate(experiment, f"{name}={','.join(values)}", fields)
    return joint, sum(_ablate(experiment, f"{name}={value}", fields) for value in values)


def _ablate(experiment: str, over: str, fields: Sequence[str]) -> float:
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "mmjax", "ablate", experiment, "--over", over, "--workdir", workdir, *fields]
        began = time.perf_counter()
        environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        return time.perf_counter() - began


def steps(
    experiment: str, name: str, values: Sequence[str], rounds: int, fields: Sequence[str]
) -> list[tuple[str, float, float, float, float]]:
    """(way, seconds of a step of all arms, of as many single steps, median ratio, seconds to compile) for each way."""
    config: Any = parse_overrides(load_experiment(experiment), fields)
    method, optimizer = config.method(), config.optimizer()
    batch = next(iter(config.train_data()))
    create = functools.partial(create_state, method, optimizer)
    zeros = {key: np.zeros(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)) for key, leaf in batch.items()}
    fresh = initialise(lambda rng: create(rng, zeros), jax.random.key(config.seed))
    states = [fresh.replace(hparams={**fresh.hparams, name: np.float32(value)}) for value in values]
    step = functools.partial(train_step, method, optimizer, accumulate=config.accumulate)
    single, _ = _timer(JitLift(step), states[0], batch)
    timers = {
        way: _timer(JitLift(over_arms(step, way, len(values)), stacked=True), stack(states), batch) for way in WAYS
    }
    separate: list[float] = []
    joint: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        separate.append(sum(single() for _ in values))
        for way, (timed, _) in timers.items():
            joint[way].append(timed())
    ratios = {way: statistics.median(a / b for a, b in zip(joint[way], separate)) for way in WAYS}
    return [
        (way, statistics.median(joint[way]), statistics.median(separate), ratios[way], timers[way][1]) for way in WAYS
    ]


def _timer(lift: JitLift, host: Any, batch: Any) -> tuple[Callable[[], float], float]:
    """A function that runs a step and returns its seconds, warm, and the seconds its program took to compile."""
    state = [lift.place(host)]
    on_device = lift.place_batch(batch)
    began = time.perf_counter()
    lift.compile(state[0], on_device)
    compiled = time.perf_counter() - began

    def timed() -> float:
        began = time.perf_counter()
        state[0], metrics = lift.step(state[0], on_device)
        jax.block_until_ready((state[0], metrics))
        return time.perf_counter() - began

    timed()
    return timed, compiled


if __name__ == "__main__":
    main()
