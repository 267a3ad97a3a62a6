"""A non-finite step leaves the state unchanged, and the check costs a finite step nothing."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import tree
from mmjax.training.lift import JitLift
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer, adamw
from mmjax.training.partition import Partition
from mmjax.training.queue import create_queue, enqueue
from mmjax.training.state import Carry, create_state
from mmjax.training.step import train_step

WIDTH, OUT = 61, 97


@dataclasses.dataclass(frozen=True)
class Regress(Method):
    """A method with every part of a carry; it constrains parameters to at most 1."""

    def init(self, rng: Any, batch: Any) -> Any:
        params = {"stem": jnp.full((WIDTH,), 0.5), "head": jax.random.normal(rng, (WIDTH, OUT))}
        queue = create_queue(rng, 12, OUT, 4)
        return params, Carry({"head": params["head"]}, {"keys": queue}, {"mean": jnp.zeros(WIDTH)}, {"momentum": 0.9})

    def loss(self, params: Any, carry: Any, batch: Any, rng: Any, step: Any, axis_name: str | None = None) -> Any:
        out = (batch["x"] * params["stem"]) @ params["head"]
        queues = {"keys": enqueue(carry.queues["keys"], out)}
        return jnp.mean(out**2), (dataclasses.replace(carry, queues=queues, stats={"mean": batch["x"].mean(0)}), {})

    def constrain(self, params: Any) -> Any:
        return {name: jnp.minimum(leaf, 1.0) for name, leaf in params.items()}


def rows(seed: int = 0, bad: bool = False) -> dict[str, Any]:
    x = np.random.default_rng(seed).normal(size=(4, WIDTH)).astype(np.float32)
    x[1, 3] = np.nan if bad else x[1, 3]
    return {"x": jnp.asarray(x)}


def started(optimizer: Optimizer) -> Any:
    return create_state(Regress(), optimizer, jax.random.key(0), rows())


def leaves(state: Any) -> dict[str, np.ndarray]:
    parts = {name: getattr(state, name) for name in ("params", "opt_state", "ema", "queues", "stats", "hparams")}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(parts)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_is_not_finite_changes_nothing_but_the_counters(accumulate):
    optimizer = Optimizer(adamw(1e-2, 0.1), clip_norm=1.0)
    step = jax.jit(functools.partial(train_step, Regress(), optimizer, accumulate=accumulate))
    first, _ = step(started(optimizer), rows())
    # A state that `constrain` would change if it were called.
    first = first.replace(params={**first.params, "stem": first.params["stem"] + 2})
    refused, metrics = step(first, rows(1, bad=True))
    assert tree.tree_hash(leaves(refused)) == tree.tree_hash(leaves(first))
    assert (int(refused.step), int(refused.skipped.total), int(refused.skipped.consecutive)) == (2, 1, 1)
    assert float(metrics["skipped_updates"]) == 1 and not np.isfinite(metrics["loss"])
    taken, metrics = step(refused, rows(2))
    assert (int(taken.skipped.total), int(taken.skipped.consecutive)) == (1, 0)
    before, after = leaves(refused), leaves(taken)
    still = {path for path in before if np.array_equal(before[path], after[path])}
    assert still == {"['hparams']['momentum']"}
    assert taken.params["stem"].max() == 1


def test_the_branch_of_a_cpu_and_the_selection_elsewhere_are_the_same():
    """Two arms side by side: under `vmap` a branch becomes a selection."""
    optimizer = Optimizer(adamw(1e-2, 0.1))
    step = functools.partial(train_step, Regress(), optimizer)
    state = started(optimizer)
    batches = [rows(1), rows(1, bad=True)]
    alone = [jax.jit(step)(state, batch)[0] for batch in batches]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    together, _ = jax.jit(jax.vmap(step, (None, 0)))(state, stacked)
    for arm in range(2):
        for path, leaf in leaves(alone[arm]).items():
            np.testing.assert_allclose(leaves(together)[path][arm], leaf, rtol=1e-6, atol=1e-7, err_msg=path)
    assert tree.tree_hash(leaves(alone[1])) == tree.tree_hash(leaves(state))


def test_frozen_leaves_are_not_constrained():
    optimizer = Optimizer(adamw(1e-2), Partition({"stem": "frozen"}))
    state = started(optimizer)
    state = state.replace(params={**state.params, "stem": state.params["stem"] + 2})
    taken, _ = jax.jit(functools.partial(train_step, Regress(), optimizer))(state, rows())
    np.testing.assert_array_equal(taken.params["stem"], state.params["stem"])
    assert taken.params["head"].max() == 1


def test_no_moment_is_copied_on_a_cpu():
    """The update is in-place: the compiled step has no copy of an array of the kernel's shape."""
    optimizer = Optimizer(adamw(1e-2, 0.1))
    lift = JitLift(functools.partial(train_step, Regress(), optimizer))
    state = dataclasses.replace(started(optimizer), ema={})
    text = lift.compile(lift.place(state), lift.place_batch(rows())).as_text()
    assert re.search(rf"f32\[{WIDTH},{OUT}\]", text)
    assert not re.findall(rf"= f32\[{WIDTH},{OUT}\]\S* copy\(", text)
