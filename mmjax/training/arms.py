"""Many arms of an ablation as one step: their states stacked along a leading axis, one batch for all of them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.types import Batch, Metrics

ArmLoop = Literal["vmap", "map", "unroll"]

MEASURED: dict[str, ArmLoop] = {"cpu": "unroll", "gpu": "vmap", "tpu": "vmap"}
"""The loop of `over_arms` that `--arms auto` takes; `experiments/benchmarks/ablation_arms.py` measures it.

Four arms of MoCo on a small ResNet, 2 CPU cores, against four single steps: unroll 0.85, map 0.92, vmap 1.37 of their
time (under `vmap` over weights a convolution becomes a grouped one). A whole run of 40 steps to four processes: map
0.44, unroll 0.48, for unroll compiles four times as long. Accelerators, where nothing was measured, get larger kernels
from `vmap`, and a program no longer than one arm's.
"""


def choose(loop: Literal["auto"] | ArmLoop) -> ArmLoop:
    """The loop for this process's backend where `loop` is "auto"."""
    if loop != "auto":
        return loop
    return MEASURED.get(jax.default_backend(), "vmap")


def over_arms(step: Callable[..., tuple[Any, Metrics]], loop: ArmLoop, arms: int) -> Callable[..., tuple[Any, Metrics]]:
    """`step(state, batch, axis_name=None)` for one arm -> the same for `arms` stacked states.

    loop: "vmap" computes the arms side by side, "map" one after another in a compiled loop, "unroll" one after another
        in a program `arms` times as long.
    Returns a function whose state and metrics have a leading axis of `arms`; the batch is shared.
    """

    def stacked(states: Any, batch: Batch, axis_name: str | None = None) -> tuple[Any, Metrics]:
        def one(state: Any) -> tuple[Any, Metrics]:
            return step(state, batch, axis_name)

        if loop == "vmap":
            return jax.vmap(one)(states)
        if loop == "map":
            return jax.lax.map(one, states)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one(take(states, arm)) for arm in range(arms)))

    return stacked


def stack(states: Sequence[Any]) -> Any:
    """Host states of one shape -> one host state whose leaves have a leading arm axis; typed keys stay keys."""

    def join(*leaves: Any) -> Any:
        return jnp.stack(leaves) if jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key) else np.stack(leaves)

    return jax.tree.map(join, *states)


def stacked_shapes(state: Any, arms: int) -> Any:
    """The `jax.eval_shape` of one arm's state -> that of the stack."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((arms, *leaf.shape), leaf.dtype), state)


def take(states: Any, arm: int) -> Any:
    """One arm's state out of the stack."""
    return jax.tree.map(lambda leaf: leaf[arm], states)
