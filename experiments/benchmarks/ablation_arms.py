"""What one program for many arms saves: against a process an arm, and a step of all arms against single steps.

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
        for how, together, alone, ratio, compiled in steps(flags.experiment, name, values, flags.rounds, fields):
            table.add_row(
                f"step, {how} (compiled in {compiled:.0f} s)", f"{together:.3f} s", f"{alone:.3f} s", f"{ratio:.2f}"
            )
    if flags.only != "steps":
        together, alone = runs(flags.experiment, name, values, [*fields, "--steps", str(flags.steps)])
        table.add_row(
            f"{flags.steps} steps, whole run", f"{together:.1f} s", f"{alone:.1f} s", f"{together / alone:.2f}"
        )
    rich.print(table)


def runs(experiment: str, name: str, values: Sequence[str], fields: Sequence[str]) -> tuple[float, float]:
    """Seconds of one `mmjax ablate` over all values, and of one for each value, one after another."""
    together = _ablate(experiment, f"{name}={','.join(values)}", fields)
    return together, sum(_ablate(experiment, f"{name}={value}", fields) for value in values)


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
    one = functools.partial(train_step, method, optimizer, accumulate=config.accumulate)
    single, _ = _timer(JitLift(one), states[0], batch)
    timers = {
        how: _timer(JitLift(over_arms(one, how, len(values)), stacked=True), stack(states), batch) for how in WAYS
    }
    alone: list[float] = []
    together: dict[str, list[float]] = {how: [] for how in WAYS}
    for _ in range(rounds):
        alone.append(sum(single() for _ in values))
        for how, (timed, _) in timers.items():
            together[how].append(timed())
    ratios = {how: statistics.median(a / b for a, b in zip(together[how], alone)) for how in WAYS}
    return [
        (how, statistics.median(together[how]), statistics.median(alone), ratios[how], timers[how][1]) for how in WAYS
    ]


def _timer(lift: JitLift, host: Any, batch: Any) -> tuple[Callable[[], float], float]:
    """A function that runs a step and returns its seconds, warm, and the seconds its program took to compile."""
    placed = [lift.place(host)]
    on_device = lift.place_batch(batch)
    began = time.perf_counter()
    lift.compile(placed[0], on_device)
    compiled = time.perf_counter() - began

    def timed() -> float:
        began = time.perf_counter()
        placed[0], metrics = lift.step(placed[0], on_device)
        jax.block_until_ready((placed[0], metrics))
        return time.perf_counter() - began

    timed()
    return timed, compiled


if __name__ == "__main__":
    main()
