"""CLIP's whole training step: the same over lifts, with rematerialisation, and in chunks."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from lifts import in_eight_devices

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.clip.network import CLIPConfig, CLIPTextConfig
from mmjax.models.clip.pretrain import CLIP
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.training.lift import MeshConfig, create_lift
from mmjax.training.optimizer import Optimizer, sgd
from mmjax.training.state import create_state
from mmjax.training.step import train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Widths that two devices can share; all else is prime.
TEXT = CLIPTextConfig(context_length=13, vocab_size=541, width=6, depth=2, heads=3, hidden=10)
VIT = CLIPConfig(ViTConfig.clip(22, 11, 14, 2, 2, 26), TEXT, 7)
RESNET = ResNetConfig.clip(32, (1, 1, 1, 1), 4, 2, 7)
METHODS = {
    "vit": CLIP(VIT, loss_blocks=2),
    "modified": CLIP(CLIPConfig(RESNET, dataclasses.replace(TEXT, depth=1), 7, init_temperature=0.5)),
}
RATES = {"vit": 0.1, "modified": 0.01}
"""The rate of SGD. With a larger one, or CLIP's temperature, batch normalisation amplifies rounding at every step."""
MESHES = {"data": MeshConfig(data=8), "fsdp": MeshConfig(data=4, fsdp=2, min_size=8)}
LIFTS = [("vit", "pmap"), ("vit", "data"), ("vit", "fsdp"), ("modified", "pmap"), ("modified", "data")]
SIZE, STEPS = 16, 5


def batch(config: CLIPConfig, seed: int = 3) -> dict[str, np.ndarray]:
    rng, side = np.random.default_rng(seed), config.image_size
    ids = rng.integers(0, 530, (SIZE, 13))
    ids[:, 0], ids[np.arange(SIZE), rng.integers(2, 13, SIZE)] = 539, 540
    return {
        "image": rng.integers(0, 256, (SIZE, side, side, 3)).astype(np.uint8),
        "text": ids.astype(np.int32),
    }


def is_blind(path: str) -> bool:
    """Biases of keys add the same value to all of a query's scores; a softmax is invariant to it: their gradient is 0
    but for rounding."""
    return path.endswith(("attention/k/bias", "attention_pool/k/bias"))


def near(actual: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """By path: within `tolerance` of each array's own largest value."""
    assert actual.keys() == expected.keys()
    for path in expected:
        one, other = np.asarray(actual[path], np.float64), np.asarray(expected[path], np.float64)
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max(), path


# --------------------------------------------------------------------------------------------------------------- lifts


def started(method: CLIP, optimizer: Optimizer) -> Any:
    """A state without a leaf of zeros: a bias that starts at zero is only a sum of gradients, and
    rounding is relative to the terms of a sum, not to what is left of them."""
    state = jax.jit(lambda: create_state(method, optimizer, jax.random.key(0), batch(method.config)))()
    rng = np.random.default_rng(5)

    def draw(path: str, leaf: Any) -> Any:
        return leaf + np.asarray(0.1 * rng.normal(size=leaf.shape), np.float32)

    return state.replace(params=tree.map_with_path(draw, state.params))


def flat(state: Any) -> dict[str, Any]:
    leaves = tree.flatten({"params": state.params, "stats": state.stats})
    return {path: np.asarray(leaf, np.float64).tolist() for path, leaf in leaves.items()}


def run_lifts() -> dict[str, Any]:
    """Metrics and leaves after some steps of each method under each lift; run in a process of 8 virtual devices.

    With SGD: Adam divides each gradient by its own size and turns rounding errors into full steps.
    """
    results: dict[str, Any] = {}
    for name, method in METHODS.items():
        optimizer = Optimizer(sgd(RATES[name], 0.9))
        step = functools.partial(train_step, method, optimizer)
        state = started(method, optimizer)
        results[f"{name}/start"] = {"leaves": flat(state)}
        for kind in ("jit", *(kind for method, kind in LIFTS if method == name)):
            lift = create_lift("mesh" if kind in MESHES else kind, step, MESHES.get(kind))  # type: ignore[arg-type]
            placed, metrics = lift.place(state), []
            for seed in range(STEPS):
                placed, step_metrics = lift.step(placed, lift.place_batch(batch(method.config, seed)))
                metrics.append(lift.fetch_metrics(step_metrics))
            cut = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(placed.params))
            results[f"{name}/{kind}"] = {"metrics": metrics, "leaves": flat(lift.fetch(placed)), "cut": cut}
    return results


@pytest.fixture(scope="module")
def lifted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_eight_devices(run_lifts, tmp_path_factory.mktemp("lifts"))


@pytest.mark.parametrize(("name", "lift"), LIFTS)
def test_every_lift_is_the_same_step(lifted: dict[str, Any], name: str, lift: str):
    one, many = lifted[f"{name}/jit"], lifted[f"{name}/{lift}"]
    for expected, other in zip(one["metrics"], many["metrics"], strict=True):
        assert expected.keys() == other.keys()
        np.testing.assert_allclose(other["loss"], expected["loss"], rtol=1e-5)
        for metric in expected:
            # The bound is a difference, log N - loss, near zero at the start.
            np.testing.assert_allclose(other[metric], expected[metric], rtol=1e-4, atol=1e-5, err_msg=metric)
    near(many["leaves"], one["leaves"])
    assert (many["cut"] > 10) == (lift != "data")


@pytest.mark.parametrize(("name", "lift"), [("vit", "jit"), ("modified", "jit"), *LIFTS])
def test_every_leaf_moves_far_and_as_far_under_every_lift(lifted: dict[str, Any], name: str, lift: str):
    """The changes of five steps are compared, not only the leaves."""

    def moves(kind: str) -> dict[str, np.ndarray]:
        start, end = (lifted[f"{name}/{which}"]["leaves"] for which in ("start", kind))
        return {path: np.asarray(end[path]) - np.asarray(leaf) for path, leaf in start.items()}

    actual, expected = moves(lift), moves("jit")
    blind = {path for path in expected if is_blind(path)}
    assert len(blind) == {"vit": 4, "modified": 2}[name]
    assert all(np.abs(actual.pop(path)).max() < 1e-6 and expected.pop(path) is not None for path in blind)
    assert min(np.abs(move).max() for move in expected.values()) > 1e-5
    near(actual, expected, 1e-3)


# ------------------------------------------------------------------------------------------------- remat, chunks


@functools.cache
def beginning(config: CLIPConfig) -> tuple[Any, Any]:
    """(parameters, carry) of a config, shared by all ways to compute it."""
    return jax.jit(lambda: CLIP(config).init(jax.random.key(0), batch(config)))()


def begun(method: CLIP) -> tuple[Any, Any]:
    return beginning(dataclasses.replace(method.config, remat=False))


@functools.cache
def gradient(method: CLIP) -> tuple[Any, dict[str, np.ndarray]]:
    """((loss, metrics), gradients by path) of one batch."""
    examples = batch(method.config)
    params, carry = begun(method)

    def loss(params: Any) -> Any:
        value, (_, metrics) = method.loss(params, carry, examples, jax.random.key(1), 0)
        return value, metrics

    outputs, grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return outputs, {path: np.asarray(leaf) for path, leaf in tree.flatten(grads).items()}


@functools.cache
def loss_of_a_quarter(method: CLIP) -> float:
    params, carry = begun(method)
    quarter = {name: leaf[::4] for name, leaf in batch(method.config).items()}
    return float(jax.jit(lambda p: method.loss(p, carry, quarter, jax.random.key(1), 0)[0])(params))


def near_gradients(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for grads in (actual, expected):
        assert max(np.abs(grads[path]).max() for path in expected if is_blind(path)) < 1e-6
    near(*({path: leaf for path, leaf in grads.items() if not is_blind(path)} for grads in (actual, expected)))


def stored_bytes(method: CLIP) -> int:
    """Bytes of the forward pass that are stored for the backward pass, parameters included; from shapes alone."""
    examples = batch(method.config)
    params, carry = begun(method)
    residuals = jax.eval_shape(
        lambda p: jax.vjp(lambda q: method.loss(q, carry, examples, jax.random.key(1), 0)[0], p)[1], params
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))


@pytest.mark.parametrize("name", ["vit", "modified"])
def test_remat_changes_stored_bytes_and_no_value(name: str):
    plain = METHODS[name]
    remat = dataclasses.replace(plain, config=dataclasses.replace(plain.config, remat=True))
    (value, _), grads = gradient(plain)
    (again, _), same = gradient(remat)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    near_gradients(same, grads)
    assert stored_bytes(remat) < 0.7 * stored_bytes(plain)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("blocks", [1, 4])
def test_chunks_give_the_gradient_of_the_whole_batch(blocks: int, remat: bool):
    plain = CLIP(dataclasses.replace(VIT, remat=remat))
    (value, metrics), grads = gradient(plain)
    (chunked, chunked_metrics), same = gradient(dataclasses.replace(plain, chunks=4, loss_blocks=blocks))
    np.testing.assert_allclose(chunked, value, rtol=1e-5)
    for name, metric in metrics.items():
        np.testing.assert_allclose(chunked_metrics[name], metric, rtol=1e-5, atol=1e-6, err_msg=name)
    near_gradients(same, grads)
    # Differs from the loss of the parts of a batch alone.
    assert abs(loss_of_a_quarter(plain) - float(value)) > 0.1


@pytest.mark.parametrize(
    ("fields", "smoothing", "named"), [({}, 1.0, "=1.0 .from 0"), ({"init_bias": -10.0}, 0.1, "SigLIP")]
)
def test_smoothing_that_would_mean_nothing_is_refused(fields, smoothing, named):
    with pytest.raises(MmjaxError, match=f"label_smoothing.*{named}"):
        CLIP(dataclasses.replace(VIT, **fields), label_smoothing=smoothing)
