"""The mean of a run's last checkpoints (arXiv 1706.03762, section 6.1: of the last 5 for base, 20 for big)."""

import os
from typing import Any

import numpy as np

from mmjax import tree
from mmjax.nn import int8
from mmjax.training.checkpoint import load_params, step_folder, steps
from mmjax.training.checkpoint_format import CheckpointError
from mmjax.types import Params


def average_checkpoints(workdir: str | os.PathLike[str], last: int) -> Params:
    """The arithmetic mean of the newest `last` steps' parameters, summed in float64, in the dtypes they have.

    Frozen int8 matrices, equal in all steps, are copied. A run keeps as many steps as its config's `keep`. Raises
    CheckpointError where there are fewer than `last`, or one is damaged.
    """
    committed = steps(workdir)
    if not 1 <= last <= len(committed):
        raise CheckpointError(
            f"{workdir}: last={last} of {len(committed)} checkpoints (steps {committed}); "
            "`keep` of the config sets their number"
        )
    sums: dict[str, Any] = {}
    dtypes: dict[str, Any] = {}
    matrices: dict[str, Any] = {}
    for step in committed[-last:]:
        for path, leaf in tree.flatten(load_params(step_folder(workdir, step))["params"]).items():
            if int8.is_int8(leaf):
                matrices[path] = leaf
                continue
            sums[path] = sums.get(path, 0) + np.asarray(leaf, np.float64)
            dtypes[path] = leaf.dtype
    means = {path: np.asarray(total / last, dtypes[path]) for path, total in sums.items()}
    return tree.unflatten(means | matrices)
