"""Where a run starts that does not start from scratch: `init_from`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.training.state import TrainState


def initialize_from(state: TrainState, weights: Mapping[str, Any], source: str) -> tuple[TrainState, str]:
    """A fresh host state with the parameters and statistics of `init_from`, and a sentence on what was not there.

    weights: see `LoadWeights`. Raises MmjaxError, naming the source: shapes differ, or nothing has a name in common.
    """
    params, fresh = _overlay(state.params, weights["params"], source)
    stats, _ = _overlay(state.stats, weights.get("stats") or {}, source)
    flat = tree.flatten(weights.get("ema") or {}) or tree.flatten(params)
    followed = {path: leaf for path, leaf in flat.items() if path in tree.flatten(state.ema)}
    ema, _ = _overlay(state.ema, tree.unflatten(followed), source)
    told = f"; fresh: {', '.join(fresh[:8])}{' ...' if len(fresh) > 8 else ''}" if fresh else ""
    said = f"initialised from {source}: {len(tree.flatten(params)) - len(fresh)} arrays{told}"
    queues = dict(state.queues)
    for name, queue in (weights.get("queues") or {}).items():
        if name in queues and queues[name].keys.shape == queue["keys"].shape:  # of another length it begins afresh
            queues[name] = dataclasses.replace(queues[name], **jax.tree.map(np.asarray, dict(queue)))
    return dataclasses.replace(state, params=params, stats=stats, ema=ema, queues=queues), said


def _overlay(target: Any, source: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
    """`target` with the leaves that `source` has, and the paths that it has not.

    Raises MmjaxError: leaves of other shapes (all are listed), leaves that the target does not know, or none in common.
    """
    have, want = tree.flatten(source), tree.flatten(target)
    wrong = [f"{path}: want {list(leaf.shape)}, got {list(have[path].shape)}" for path, leaf in want.items()
             if path in have and tuple(have[path].shape) != tuple(leaf.shape)]  # fmt: skip
    if wrong or (have and not have.keys() & want.keys()):
        raise MmjaxError(
            f"init_from {name} does not fit:\n  " + "\n  ".join(wrong or ["no parameter has a name in common"])
        )
    merged = {path: np.asarray(have[path]).astype(leaf.dtype) if path in have else leaf for path, leaf in want.items()}
    return tree.unflatten(merged), [path for path in want if path not in have]
