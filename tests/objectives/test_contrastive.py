"""Contrastive losses: by hand, against the plain formula, gradients, in blocks, and over 8 devices."""

import functools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from mmjax.errors import MmjaxError
from mmjax.objectives import contrastive
from mmjax.objectives.contrastive import (
    clip_loss,
    in_batch_accuracy,
    in_batch_nce,
    info_nce,
    info_nce_logits,
    mutual_information_bound,
    nearest_query_loss,
    sigmoid_loss,
)

B, D, Q = 24, 7, 13


def units(seed: int, *shape: int) -> jax.Array:
    x = jax.random.normal(jax.random.key(seed), shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


X, Y, QUEUE = units(0, B, D), units(1, B, D), units(2, Q, D)
S, BIAS = jnp.float32(1.3), jnp.float32(-2.1)


def plain_clip(x, y, s):
    logits = jnp.exp(s) * x @ y.T
    diagonal = jnp.arange(x.shape[0])
    row_terms, column_terms = (jax.nn.log_softmax(logits, axis)[diagonal, diagonal] for axis in (1, 0))
    return -(row_terms.mean() + column_terms.mean()) / 2


def plain_smoothed(x, y, s):
    logits = jnp.exp(s) * x @ y.T
    targets = (1 - SMOOTHING) * jnp.eye(B) + SMOOTHING / B
    return sum(optax.softmax_cross_entropy(each, targets).mean() for each in (logits, logits.T)) / 2


def plain_sigmoid(x, y, s, b):
    logits = jnp.exp(s) * x @ y.T + b
    labels = 2 * jnp.eye(x.shape[0]) - 1
    return -jnp.sum(jax.nn.log_sigmoid(labels * logits)) / x.shape[0]


def plain_nce(x, y, queue, t):
    logits = jnp.concatenate([jnp.sum(x * y, -1, keepdims=True), x @ queue.T], 1) / t
    return -jax.nn.log_softmax(logits)[:, 0].mean()


def plain_in_batch(x, y, t):
    return -jnp.diagonal(jax.nn.log_softmax(x @ y.T / t)).mean()


T = jnp.float32(0.3)
SMOOTHING = 0.15
CASES = {
    "clip": (clip_loss, plain_clip, (X, Y, S)),
    "smoothed": (functools.partial(clip_loss, label_smoothing=SMOOTHING), plain_smoothed, (X, Y, S)),
    "sigmoid": (sigmoid_loss, plain_sigmoid, (X, Y, S, BIAS)),
    "queue": (info_nce, plain_nce, (X, Y, QUEUE, T)),
    "in batch": (in_batch_nce, plain_in_batch, (X, Y, T)),
}


def test_by_hand():
    x, y = jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    # logits 3 3 / 0 0: rows: log 2 twice; columns: log(1 + e^-3) for the first, log(1 + e^3) for the second.
    rows, columns = math.log(2), (math.log1p(math.exp(-3)) + math.log1p(math.exp(3))) / 2
    assert abs(float(clip_loss(x, y, jnp.log(3.0))) - (rows + columns) / 2) < 1e-6
    # logits 2 2 / -1 -1 with labels + - / - +.
    four = [math.log1p(math.exp(value)) for value in (-2, 2, -1, 1)]
    assert abs(float(sigmoid_loss(x, y, jnp.log(3.0), jnp.float32(-1.0))) - sum(four) / 2) < 1e-6
    # One positive 1, negatives 0, 1, at temperature 1/2.
    loss = info_nce(x[:1], y[:1], x[::-1], 0.5)
    assert abs(float(loss) - math.log(1 + math.exp(-2) + 1)) < 1e-6
    np.testing.assert_allclose(info_nce_logits(x[:1], y[:1], x[::-1], 0.5), [[2, 0, 2]])
    assert abs(float(in_batch_nce(x, y, 1 / 3)) - math.log(2)) < 1e-6
    assert abs(float(mutual_information_bound(jnp.float32(0.25), 8)) - (math.log(8) - 0.25)) < 1e-6


def test_accuracy_by_hand():
    key = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0]])
    query = jnp.array([[0.0, 1.0], [0.0, 1.0], [0.8, 0.6], [1.0, 0.0]])
    # Nearest keys: 1 (wrong), 1 (right), 2 (right: .96 before .8), 0 and 3 in a tie (a miss).
    assert float(in_batch_accuracy(query, key)) == 0.5
    assert float(in_batch_accuracy(query, key, blocks=2)) == 0.5
    assert float(in_batch_accuracy(jnp.ones((5, 3)), jnp.ones((5, 3)))) == 0


@pytest.mark.parametrize("blocks", [1, 3, 24])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_match_the_plain_formula(name, blocks):
    loss, plain, arguments = CASES[name]
    each = tuple(range(len(arguments)))
    value, grads = jax.jit(jax.value_and_grad(lambda *a: loss(*a, blocks=blocks), each))(*arguments)
    expected, expected_grads = jax.value_and_grad(plain, each)(*arguments)
    assert abs(float(value - expected)) <= 1e-5 * abs(float(expected))
    for one, other in zip(grads, expected_grads):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
    np.testing.assert_allclose(loss(*arguments, blocks=blocks), value, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_match_finite_differences(name):
    loss, _, arguments = CASES[name]
    check_grads(lambda *a: loss(*a, blocks=2), arguments, order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("blocks", [1, 6])
def test_a_sharp_scale_stays_finite(blocks):
    value, grads = jax.value_and_grad(lambda *a: clip_loss(*a, blocks=blocks), (0, 1, 2))(X, -X, jnp.log(100.0))
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)
    assert abs(float(clip_loss(X, X, jnp.log(1e4)))) < 1e-4


def test_bfloat16_features_give_float32_losses():
    value = clip_loss(X.astype(jnp.bfloat16), Y.astype(jnp.bfloat16), S)
    assert value.dtype == jnp.float32
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (X, Y)]
    np.testing.assert_allclose(value, plain_clip(*rounded, S), rtol=1e-6)


def test_blocks_never_materialise_the_whole_matrix():
    n, blocks = 640, 16
    shapes = [jax.ShapeDtypeStruct((n, D), jnp.float32)] * 2 + [jax.ShapeDtypeStruct((), jnp.float32)]

    def lowered(blocks: int) -> str:
        return jax.jit(jax.grad(lambda *a: clip_loss(*a, blocks=blocks), (0, 1, 2))).lower(*shapes).as_text()

    assert f"{n}x{n}xf32" in lowered(1)
    assert f"{n}x{n}xf32" not in lowered(blocks)
    assert f"{n // blocks}x{n}xf32" in lowered(blocks)


def test_invalid_blocks_are_refused():
    for blocks in (0, 5):
        with pytest.raises(MmjaxError, match=f"blocks={blocks} does not divide a batch of 24 rows"):
            clip_loss(X, Y, S, blocks=blocks)


def over_devices() -> dict[str, float]:
    """Largest relative errors of values and gradients under pmap and on a mesh, on this process's devices."""
    devices = jax.device_count()
    errors = {}
    weight = units(5, D, D)
    for name, blocks in (("clip", 1), ("clip", 3), ("sigmoid", 1), ("in batch", 3), ("accuracy", 1)):
        function, plain, arguments = CASES.get(name, (in_batch_accuracy, lambda x, y: in_batch_accuracy(x, y), (X, Y)))
        scalars = arguments[2:]

        def loss(weight, scalars, x, y, axis_name=None, function=function, blocks=blocks):
            return function(x @ weight, y @ weight, *scalars, axis_name=axis_name, blocks=blocks)

        def whole(weight, scalars, plain=plain):
            return plain(X @ weight, Y @ weight, *scalars)

        def mapped(x, y, scalars=scalars, loss=loss):
            return jax.lax.pmean(jax.value_and_grad(loss, (0, 1))(weight, scalars, x, y, "data"), "data")

        shares = [x.reshape(devices, -1, D) for x in (X, Y)]
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        sharded = [jax.device_put(x, spread) for x in (X, Y)]
        results = {
            "pmap": jax.tree.map(lambda x: x[0], jax.pmap(mapped, axis_name="data")(*shares)),
            "mesh": jax.jit(jax.value_and_grad(loss, (0, 1)))(weight, scalars, *sharded),
        }
        expected = jax.value_and_grad(whole, (0, 1))(weight, scalars)
        for lift, result in results.items():
            pairs = zip(jax.tree.leaves(result), jax.tree.leaves(expected))
            worst = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9)) for a, b in pairs)
            errors[f"{name} {blocks} {lift}"] = worst
    return errors


def test_eight_devices_match_one(repository):
    environment = os.environ | {
        "PYTHONPATH": f"{repository}:{os.path.dirname(__file__)}",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
    }
    script = "import json, test_contrastive as t; print(json.dumps(t.over_devices()))"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr[-3000:]
    errors = json.loads(result.stdout)
    assert len(errors) == 10
    assert all(error <= 1e-5 for error in errors.values()), errors


def plain_nearest_query(image, text, t):
    logits = (image[:, None] * text[None, :, None]).sum(-1).max(-1) / t
    targets = (1 - SMOOTHING) * jnp.eye(B) + SMOOTHING / B
    return sum(optax.softmax_cross_entropy(each, targets).mean() for each in (logits, logits.T)) / 2


def test_the_nearest_query_matches_the_plain_formula():
    loss = functools.partial(nearest_query_loss, label_smoothing=SMOOTHING)
    arguments = (units(3, B, 5, D), Y, T)
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arguments)
    expected, expected_grads = jax.value_and_grad(plain_nearest_query, (0, 1, 2))(*arguments)
    assert abs(float(value - expected)) <= 1e-5 * abs(float(expected))
    for one, other in zip(grads, expected_grads):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


def test_every_loss_is_tested():
    names = {name for name in vars(contrastive) if name.endswith(("_loss", "_nce"))}
    tested = {getattr(case[0], "func", case[0]).__name__ for case in CASES.values()}
    assert names == tested | {nearest_query_loss.__name__}
