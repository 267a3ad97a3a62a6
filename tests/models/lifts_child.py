"""Run by test_every_lift.py in a process of eight virtual devices: lifts_child.py OUT CASE ...

Writes {case: {"start": leaves, "frozen": paths, "jit": result, "pmap": result, ...}} or {case: {"error": traceback}}.
A result is {"metrics": of every step, "leaves": of the last state's parameters and carry, "compiles", "cut": leaves of
the parameters that lie on several devices in parts}.
"""

import functools
import json
import pathlib
import sys
import traceback
from typing import Any

import jax
import numpy as np
from lift_cases import CASES, Case

from mmjax import tree
from mmjax.training.lift import create_lift
from mmjax.training.state import create_state
from mmjax.training.step import train_step


def start(case: Case) -> Any:
    """A state with noise on every leaf: a bias that starts at zero is a sum of gradients alone, and rounding is
    relative to the terms of a sum, not to what is left of them."""
    init = functools.partial(create_state, case.method, case.optimizer)
    state = jax.jit(init)(jax.random.key(0), case.batch(0))
    rng = np.random.default_rng(5)
    noisy = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), {"params": state.params, "ema": state.ema}
    )
    return state.replace(**noisy)


def leaves(state: Any) -> dict[str, Any]:
    parts = {name: getattr(state, name) for name in ("params", "ema", "stats", "queues", "extra")}
    flat = jax.tree.leaves_with_path(parts)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64).tolist()
        for path, leaf in flat
    }


def run(case: Case) -> dict[str, Any]:
    state = start(case)
    frozen = tree.flatten({"params": case.optimizer.partition.split(state.params)[1]})
    results: dict[str, Any] = {"start": leaves(state), "frozen": list(frozen)}
    step = functools.partial(train_step, case.method, case.optimizer, accumulate=case.micro_batches)
    for name in ("jit", "pmap", *case.meshes):
        mesh = case.meshes.get(name)
        lift = create_lift("mesh" if mesh else name, step, mesh)  # type: ignore[arg-type]
        placed, metrics = lift.place(state), []
        for seed in range(case.steps):
            placed, step_metrics = lift.step(placed, lift.place_batch(case.batch(seed)))
            metrics.append(lift.fetch_metrics(step_metrics))
        cut = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(placed.params))
        end = leaves(lift.fetch(placed))
        results[name] = {"metrics": metrics, "leaves": end, "compiles": lift.compiles, "cut": cut}
    return results


def main() -> None:
    out, *names = sys.argv[1:]
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = run(CASES[name])
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    pathlib.Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
