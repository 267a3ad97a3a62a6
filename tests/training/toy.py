"""A method small enough to compile in a second, with every kind of state: momentum parameters, queue, statistics."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

WIDTH, HIDDEN, LENGTH = 5, 8, 32


@struct.dataclass
class Ring:
    keys: Any
    cursor: Any


@struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any
    ema: Any
    queues: Any
    stats: Any
    hparams: Any
    extra: Any
    rng: Any
    skipped: Any


OPTIMIZER = optax.adam(1e-2)


def init(seed: int = 0) -> State:
    key = jax.random.key(seed)
    params = {
        "stem": {"kernel": jax.random.normal(key, (WIDTH, HIDDEN)), "bias": jnp.zeros(HIDDEN)},
        "head": {"kernel": jax.random.normal(jax.random.fold_in(key, 1), (HIDDEN, 1)) * 0.1},
    }
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=OPTIMIZER.init(params),
        ema={"stem": jax.tree.map(jnp.copy, params["stem"])},
        queues={"image": Ring(jnp.zeros((LENGTH, HIDDEN)), jnp.zeros((), jnp.int32))},
        stats={"mean": jnp.zeros(WIDTH)},
        hparams={"momentum": jnp.float32(0.9)},
        extra={"averaged_stats": {"mean": jnp.ones(WIDTH)}, "batches": jnp.int32(seed)},
        rng=jax.random.key(seed + 1),
        skipped=jnp.zeros((), jnp.int32),
    )


def step(state: State, batch: Any, axis_name: str | None = None) -> tuple[State, dict[str, Any]]:
    """Regression, momentum copy and a queue of hidden features; the same numbers for any split of the batch."""

    def loss(params: Any) -> Any:
        hidden = jnp.tanh(batch["x"] @ params["stem"]["kernel"] + params["stem"]["bias"])
        return jnp.mean((hidden @ params["head"]["kernel"] - batch["y"]) ** 2), hidden

    (value, hidden), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    mean = batch["x"].mean(0)
    if axis_name is not None:
        value, grads, mean = jax.lax.pmean((value, grads, mean), axis_name)
        hidden = jax.lax.all_gather(hidden, axis_name, tiled=True)
    noise = jax.random.normal(jax.random.fold_in(state.rng, state.step), ())
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    m = state.hparams["momentum"]
    queue = state.queues["image"]
    keys = jax.lax.dynamic_update_slice(queue.keys, hidden, (queue.cursor, jnp.int32(0)))
    new = state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema={"stem": jax.tree.map(lambda a, b: m * a + (1 - m) * b, state.ema["stem"], params["stem"])},
        queues={"image": Ring(keys, (queue.cursor + hidden.shape[0]) % LENGTH)},
        stats={"mean": 0.9 * state.stats["mean"] + 0.1 * mean + 1e-3 * noise},
    )
    return new, {"loss": value, "skipped_updates": jnp.zeros(())}


@dataclasses.dataclass
class Data:
    """Endless rows that are a function of (seed, position) alone."""

    batch_size: int = 8
    seed: int = 0
    position: int = 0

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, self.position))
        self.position += 1
        x = rng.standard_normal((self.batch_size, WIDTH)).astype(np.float32)
        return {"x": x, "y": np.sin(x.sum(1, keepdims=True)), "index": np.arange(self.batch_size, dtype=np.int64)}
