"""The initial state of a run with `init_from`.

One rule for every system: a fresh state takes from its source, a run of ours or a loaded model,

    params    Every leaf of the source has to be a leaf of the state, of the same shape. Trainable leaves get the
              state's dtype, float32. Frozen ones keep the source's: bfloat16 stays bfloat16, int8 stays int8. What the
              source lacks stays fresh, and is reported. The result is projected into its range (`Method.constrain`), as
              after each update: ALBEF clamps a temperature before it is used.
    stats     The same, in the state's dtype.
    ema       The source's momentum parameters; where it has none, a copy of the parameters.
    averages  Of batch statistics, beside averaged parameters: the source's, else a copy of the statistics.
    queues    Those whose names and shapes fit, keys with their cursor. The others start afresh; both are reported.
    the rest  Step, optimizer, random key, hyper-parameters, counters and other state of a method: always new.

An experiment that starts from another network's weights selects and converts them in `initial_weights`. Where it takes
parts from several sources, `origins` of the weights names the source of each parameter.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.nn import int8
from mmjax.training.classification import AVERAGED
from mmjax.training.partition import FROZEN, Partition
from mmjax.training.state import TrainState
from mmjax.types import Params

LISTED = 8
"""Leaves that a message names."""


def initialize_from(
    state: TrainState,
    weights: Mapping[str, Any],
    source: str,
    partition: Partition | None = None,
    constrain: Callable[[Params], Params] | None = None,
) -> tuple[TrainState, str]:
    """A fresh host state with what it takes from `init_from` (see above), and a sentence that reports it.

    Args:
        state: as `create_state` makes it, on the host; those of `replaced_leaves` may be shapes alone.
        weights: see `LoadWeights`.
        source: the value of `init_from`, or of several such fields, for messages.
        partition: labels the frozen parameters; None: none.
        constrain: `Method.constrain`; frozen parameters stay as they are.

    Raises:
        MmjaxError: leaves of the source that the state does not have, of another shape, or none in common. One message
            lists them; nothing is taken.
    """
    labels = partition.labels(state.params) if partition is not None else {}
    frozen = {path for path, label in labels.items() if label == FROZEN}
    params, fresh = _overlay(state.params, weights["params"], source, frozen)
    stats, _ = _overlay(state.stats, weights.get("stats") or {}, source)
    momentum = tree.flatten(weights.get("ema") or {}) or tree.flatten(params)
    followed = {path: leaf for path, leaf in momentum.items() if path in tree.flatten(state.ema)}
    ema, _ = _overlay(state.ema, tree.unflatten(followed), source)
    extra = dict(state.extra)
    if AVERAGED in extra:
        extra[AVERAGED], _ = _overlay(extra[AVERAGED], weights.get("averaged_stats") or stats, source)
    queues, report = _queues(state.queues, weights.get("queues") or {})
    message = f"initialised from {_summary(origins_of(state.params, weights, source))}"
    if constrain is not None:
        constrained = tree.flatten(jax.tree.map(np.asarray, constrain(params)))
        params = tree.map_with_path(lambda path, leaf: leaf if path in frozen else constrained[path], params)
    if fresh:
        message += f"; fresh: {', '.join(fresh[:LISTED])}{' ...' if len(fresh) > LISTED else ''}"
    taken = {"params": params, "stats": stats, "ema": ema, "queues": queues, "extra": extra}
    return dataclasses.replace(state, **taken), message + report


def replaced_leaves(state: TrainState, weights: Mapping[str, Any]) -> set[str]:
    """Slash paths in a state, or in its shapes, of the leaves that `initialize_from` replaces whatever they hold.

    A fresh state need not draw them: a tower that is loaded in bfloat16 is then at no time there in float32 too.
    """
    params, momentum = tree.flatten(weights["params"]), tree.flatten(weights.get("ema") or {})
    copies = momentum or tree.flatten(state.params)
    replaced = {f"params/{path}" for path in tree.flatten(state.params) if path in params}
    return replaced | {f"ema/{path}" for path in tree.flatten(state.ema) if path in copies}


FRESH = "fresh"
"""The origin of a parameter that no source provides."""


def origins_of(params: Params, weights: Mapping[str, Any], source: str) -> dict[str, str]:
    """path -> the source of the parameter there, or `FRESH`, for a state's `params`."""
    sources, provided = weights.get("origins") or {}, tree.flatten(weights["params"])
    return {path: sources.get(path, source) if path in provided else FRESH for path in tree.flatten(params)}


def _summary(origins: Mapping[str, str]) -> str:
    """ "A: 3 arrays", or with several sources "A: 3 arrays of vision; B: 2 arrays of text"."""
    paths: dict[str, list[str]] = {}
    for path, source in origins.items():
        if source != FRESH:
            paths.setdefault(source, []).append(path)
    parts = {source: ", ".join(dict.fromkeys(path.split("/")[0] for path in of)) for source, of in paths.items()}
    return "; ".join(
        f"{source}: {len(of)} arrays" + (f" of {parts[source]}" if len(paths) > 1 else "")
        for source, of in paths.items()
    )


def _queues(target: Mapping[str, Any], source: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The state's queues, filled by the source's where they fit, and a report of them."""
    queues, fresh = dict(target), []
    for name, queue in target.items():
        leaves = {field: np.asarray(leaf) for field, leaf in dict(source.get(name) or {}).items()}
        values = {field.name: getattr(queue, field.name) for field in dataclasses.fields(queue)}
        shapes = {field: leaf.shape for field, leaf in values.items() if leaf is not None}
        if shapes == {field: leaf.shape for field, leaf in leaves.items()}:
            cast = {field: leaf.astype(values[field].dtype) for field, leaf in leaves.items()}
            queues[name] = dataclasses.replace(queue, **cast)
        else:
            fresh.append(name)
    if not source or not target:
        return queues, ""
    filled = [name for name in queues if name not in fresh]
    report = f"; queues: {', '.join(filled) or 'none'}"
    return queues, report + (f" (fresh, as they do not fit: {', '.join(fresh)})" if fresh else "")


def _overlay(
    target: Any, source: Mapping[str, Any], name: str, frozen: set[str] | frozenset[str] = frozenset()
) -> tuple[dict[str, Any], list[str]]:
    """`target` with the leaves of `source`, and the paths that `source` lacks. frozen: paths that keep their dtype."""
    source_leaves, target_leaves = tree.flatten(source), tree.flatten(target)
    wrong = [
        f"{path}: want {list(leaf.shape)}, got {list(source_leaves[path].shape)}"
        for path, leaf in target_leaves.items()
        if path in source_leaves and tuple(source_leaves[path].shape) != tuple(leaf.shape)
    ]
    unknown = [path for path in source_leaves if path not in target_leaves]
    if unknown:
        more = f" and {len(unknown) - LISTED} more" if len(unknown) > LISTED else ""
        wrong.append(f"not in this experiment's state: {', '.join(unknown[:LISTED])}{more}")
    if wrong:
        hint = "\nThe experiment's `initial_weights` can select and convert what it starts from." if unknown else ""
        raise MmjaxError(f"init_from {name} does not fit:\n  " + "\n  ".join(wrong) + hint)
    merged = {
        path: _taken(source_leaves[path], leaf, path in frozen) if path in source_leaves else leaf
        for path, leaf in target_leaves.items()
    }
    return tree.unflatten(merged), [path for path in target_leaves if path not in source_leaves]


def _taken(leaf: Any, target: Any, frozen: bool) -> Any:
    """A leaf of the source on the host: in its own form if it is frozen, else in the target's dtype."""
    if frozen:
        return jax.tree.map(np.asarray, leaf)
    return np.asarray(int8.dequantize(leaf)).astype(target.dtype)
