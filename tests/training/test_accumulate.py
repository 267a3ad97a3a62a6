"""Micro-batches and devices: one division, one enqueue and one count a batch; the cost; and the schedules' step."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax.errors import MmjaxError
from mmjax.training.accumulate import batch_gradient
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer, adamw
from mmjax.training.queue import create_queue, enqueue
from mmjax.training.state import Carry, create_state
from mmjax.training.step import train_step
from mmjax.types import Mean

SIZE, WIDTH, LENGTH = 8, 7, 24


@dataclasses.dataclass(frozen=True)
class Toy(Method):
    """Contrast with a queue of momentum keys (a mean over examples) and a loss of tokens (uneven counts)."""

    width: int = WIDTH
    size: int = SIZE
    length: int = LENGTH

    def init(self, rng: Any, batch: Any) -> Any:
        params = {
            name: jax.random.normal(jax.random.fold_in(rng, i), (self.width, self.width)) * self.width**-0.5
            for i, name in enumerate(("up", "down"))
        }
        queues = {"keys": create_queue(rng, self.length, self.width, self.size)}
        extra = {"batches": jnp.int32(0)}
        return params, Carry(dict(params), queues, {"passes": jnp.int32(0)}, {"momentum": 0.9}, extra)

    def loss(self, params: Any, carry: Any, batch: Any, rng: Any, step: Any, axis_name: str | None = None) -> Any:
        def encode(params: Any) -> Any:
            return jnp.tanh(batch["x"] @ params["up"]) @ params["down"]

        query, keys = encode(params), jax.lax.stop_gradient(encode(carry.ema))
        logits = jnp.concatenate([jnp.sum(query * keys, 1, keepdims=True), query @ carry.queues["keys"].keys.T], 1)
        contrast = jnp.mean(jax.nn.logsumexp(logits, 1) - logits[:, 0])
        if axis_name is not None:
            keys = jax.lax.all_gather(keys, axis_name, tiled=True)
        after = dataclasses.replace(
            carry,
            queues={"keys": enqueue(carry.queues["keys"], keys)},
            stats={"passes": carry.stats["passes"] + 1},
            extra={"batches": carry.extra["batches"] + 1},
        )
        tokens = Mean.of(jnp.sum(jnp.square(query), 1), batch["counted"])
        return {"contrast": contrast, "tokens": tokens}, (
            after,
            {"mean_x": Mean.of(batch["x"][:, 0], batch["counted"])},
        )


def batch(size: int = SIZE, width: int = WIDTH, counted: Any = None) -> dict[str, Any]:
    """By default the first of four micro-batches has no counted tokens."""
    x = np.random.default_rng(0).normal(size=(size, width)).astype(np.float32)
    counted = [0, 1, 0, 3, 0, 0.5, 2, 1] if counted is None else counted
    return {"x": x, "counted": np.broadcast_to(np.asarray(counted, np.float32), (size,))}


def started(method: Method, optimizer: Optimizer, examples: Any) -> Any:
    return jax.jit(functools.partial(create_state, method, optimizer))(jax.random.key(0), examples)


def test_any_cut_is_the_same_step():
    """Parameters, metrics, queue, momentum parameters and counters of batches; statistics count passes."""
    optimizer, examples = Optimizer(optax.sgd(0.5)), batch()
    state = started(Toy(), optimizer, examples)
    one, metrics = jax.jit(functools.partial(train_step, Toy(), optimizer))(state, examples)
    assert metrics.keys() == {"loss", "contrast", "tokens", "mean_x", "gradient_norm", "skipped_updates"}
    np.testing.assert_allclose(metrics["loss"], metrics["contrast"] + metrics["tokens"], rtol=1e-6)
    counted = examples["counted"]
    np.testing.assert_allclose(metrics["mean_x"], np.sum(counted * examples["x"][:, 0]) / counted.sum(), rtol=1e-5)
    assert int(one.queues["keys"].cursor) == SIZE and one.queues["keys"].incoming is None

    def over_devices(state: Any, examples: Any) -> Any:
        halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), examples)
        step = functools.partial(train_step, Toy(), optimizer, axis_name="data", accumulate=2)
        return jax.tree.map(lambda leaf: leaf[0], jax.vmap(step, (None, 0), axis_name="data")(state, halves))

    steps = {n: functools.partial(train_step, Toy(), optimizer, accumulate=n) for n in (2, 4)} | {-2: over_devices}
    for parts, step in steps.items():
        other, other_metrics = jax.jit(step)(state, examples)
        for name, value in metrics.items():
            np.testing.assert_allclose(other_metrics[name], value, rtol=1e-5, err_msg=name)
        for field in ("params", "ema", "queues", "extra"):
            for a, b in zip(jax.tree.leaves(getattr(other, field)), jax.tree.leaves(getattr(one, field)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=field)
        assert int(other.extra["batches"]) == 1 and int(other.stats["passes"]) == abs(parts)


def test_a_batch_of_which_nothing_is_counted_is_refused():
    optimizer = Optimizer(optax.sgd(0.5))
    for parts in (1, 2):
        examples = batch(counted=0)
        state = started(Toy(), optimizer, examples)
        new, metrics = jax.jit(functools.partial(train_step, Toy(), optimizer, accumulate=parts))(state, examples)
        assert np.isnan(metrics["loss"]) and int(new.skipped.total) == 1
        assert int(new.extra["batches"]) == 0 and int(new.queues["keys"].cursor) == 0
        np.testing.assert_array_equal(new.queues["keys"].keys, state.queues["keys"].keys)


def test_a_loss_is_a_scalar_a_mean_or_named_ones():
    class Bare(Toy):
        def loss(self, params: Any, *rest: Any) -> Any:
            return jnp.sum(params["up"]) * jnp.ones(3), (Carry(), {})

    state = started(Toy(), Optimizer(optax.sgd(0.5)), batch())
    with pytest.raises(TypeError, match=r"loss.*3"):
        batch_gradient(lambda *a: Bare().loss(*a, 0), state.params, state.carry, batch(), jax.random.key(0))
    with pytest.raises(MmjaxError, match=r"batch\['counted'\] has 8 rows, not a multiple of accumulate=3"):
        jax.eval_shape(functools.partial(train_step, Toy(), Optimizer(optax.sgd(0.5)), accumulate=3), state, batch())


def compiled(method: Toy, parts: int) -> Any:
    optimizer, examples = Optimizer(optax.sgd(0.5)), batch(method.size, method.width, counted=1)
    state = jax.eval_shape(functools.partial(create_state, method, optimizer), jax.random.key(0), examples)
    step = functools.partial(train_step, method, optimizer, accumulate=parts)
    return jax.jit(step, donate_argnums=0).lower(state, examples).compile()


def test_counts_cost_no_pass_through_the_network():
    """A step has as many matrix products with micro-batches as without."""
    products = [len(re.findall(r" dot\(", compiled(Toy(61, 16, 96), parts).as_text())) for parts in (1, 4)]
    assert products[0] == products[1] > 4


def test_queues_are_updated_in_place():
    for parts in (1, 4):
        text = compiled(Toy(61, 16, 4096), parts).as_text()
        assert "f32[4096,61]" in text and not re.findall(r"= f32\[4096,61\]\S* copy\(", text)


def test_momentum_parameters_are_stored_once():
    """Beside much larger activations the step's peak is that of a step whose teacher does not move, to less than half
    of the momentum parameters."""

    class Unmoved(Toy):
        def init(self, rng: Any, batch: Any) -> Any:
            params, carry = super().init(rng, batch)
            return params, dataclasses.replace(carry, ema={}, extra={"batches": jnp.int32(0), "teacher": carry.ema})

        def loss(self, params: Any, carry: Any, *rest: Any) -> Any:
            loss, (after, metrics) = super().loss(params, dataclasses.replace(carry, ema=carry.extra["teacher"]), *rest)
            return loss, (dataclasses.replace(after, extra=carry.extra), metrics)

    moved, unmoved = (compiled(kind(256, 2048, 2048), 1).memory_analysis() for kind in (Toy, Unmoved))
    assert moved.temp_size_in_bytes - unmoved.temp_size_in_bytes < 2 * 256 * 256 * 4 / 2


def test_one_clock_for_every_schedule():
    """After a refused update the rate is that of the step, not of the updates; Adam's correction counts updates."""
    rates = []

    @dataclasses.dataclass(frozen=True)
    class Ramp(Toy):
        def momentum(self, hparams: Any, step: Any) -> Any:
            return 1 - step / 10

    optimizer = Optimizer(optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(lambda step: 0.1 * step)))
    state = started(Ramp(), optimizer, batch())
    step = jax.jit(functools.partial(train_step, Ramp(), optimizer))
    for examples in (batch(), batch(counted=0), batch()):
        before, (state, _) = state, step(state, examples)
        rates.append(float(jnp.abs(state.params["up"] - before.params["up"]).max()))
    # Adam's first update is of rate * sign(gradient), the second one nearly so.
    assert rates[:2] == [0, 0] and abs(rates[2] - 0.2) < 0.01
    expected = 0.8 * np.asarray(before.ema["up"]) + 0.2 * np.asarray(before.params["up"])
    np.testing.assert_allclose(state.ema["up"], expected, rtol=1e-5, atol=1e-7)
    counts = {
        jax.tree_util.keystr(path): int(leaf)
        for path, leaf in jax.tree.leaves_with_path(state.opt_state)
        if "count" in jax.tree_util.keystr(path)
    }
    assert sorted(counts.values()) == [2, 2] or sorted(counts.values()) == [2, 3]


def test_schedules_inside_our_optimizers_follow_the_step():
    optimizer = Optimizer(adamw(lambda step: jnp.where(step == 5, 0.25, 0.0)), clip_norm=1.0)
    params = {"kernel": jnp.ones((2, 3))}
    state = optimizer.init(params)
    sizes = [
        float(jnp.abs(optimizer.update(params, state, params, {}, jnp.int32(step))[0]["kernel"]).max())
        for step in (0, 5, 6)
    ]
    assert sizes[0] == sizes[2] == 0 and sizes[1] == pytest.approx(0.25, rel=1e-3)
