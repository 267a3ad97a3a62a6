"""ResNet and ViT as classifiers: the same step on one device and on eight, and training on real digits in seconds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lifts import in_eight_devices

from mmjax import tree
from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.models.resnet.supervised import ResNetClassifier
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.models.vit.supervised import ViTClassifier
from mmjax.training.classification import Classification
from mmjax.training.lift import create_lift
from mmjax.training.mixing import Mixing
from mmjax.training.optimizer import Optimizer, adamw, sgd, warmup_cosine
from mmjax.training.state import create_state
from mmjax.training.step import train_step

B, SIDE, C = 16, 9, 5
RESNET = ResNetConfig((1, 1), "basic", "cifar", 5, (5, 7), num_classes=C)
VIT = ViTConfig(14, 2, 2, 13, 3, (SIDE, SIDE), C, drop_path=0.3)
SGD = Optimizer(sgd(0.1, momentum=0.9), clip_norm=1.0)


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = np.kron(rng.integers(0, 256, (B, 3, 3, 3)), np.ones((1, 3, 3, 1))).astype(np.uint8)
    return {"image": image, "label": rng.integers(0, C, B).astype(np.int32)}


def methods() -> dict[str, tuple[Any, int]]:
    """Name -> (method, micro-batches of a step); together the two use every option."""
    half: Any = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    mixing = Mixing(cutmix=1.0)
    resnet = Classification(ResNetClassifier(RESNET), C, mixing=mixing, label_smoothing=0.1, weight_ema=0.8, **half)
    mixing = Mixing(mixup=0.5, keep_larger=True)
    return {
        "resnet": (resnet, 1),
        "vit": (Classification(ViTClassifier(VIT), C, objective="sigmoid", mixing=mixing, **half), 2),
    }


def run_lifts() -> dict[str, Any]:
    """Losses and leaves after 5 steps; run in a process of 8 virtual devices."""
    results: dict[str, Any] = {}
    for system, (method, micro) in methods().items():
        state = jax.jit(lambda method=method: create_state(method, SGD, jax.random.key(0), batch()))()
        for name in ("jit", "pmap", "mesh"):
            lift = create_lift(
                name,  # type: ignore[arg-type]
                lambda state, batch, axis_name=None, method=method, micro=micro: train_step(
                    method, SGD, state, batch, axis_name, micro
                ),
            )
            placed, metrics = lift.place(state), []
            for seed in range(5):
                placed, step_metrics = lift.step(placed, lift.place_batch(batch(seed)))
                metrics.append(lift.fetch_metrics(step_metrics))
            end = lift.fetch(placed)
            parts = {"params": end.params, "ema": end.ema, "stats": end.stats, "queues": end.queues}
            leaves = {path: np.asarray(leaf, np.float64).tolist() for path, leaf in tree.flatten(parts).items()}
            results[f"{system}/{name}"] = {"metrics": metrics, "leaves": leaves, "compiles": lift.compiles}
    return results


@pytest.fixture(scope="module")
def lifted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_eight_devices(run_lifts, tmp_path_factory.mktemp("lifts"))


@pytest.mark.parametrize("system", ["resnet", "vit"])
@pytest.mark.parametrize("lift", ["pmap", "mesh"])
def test_one_device_and_eight_are_the_same_step(lifted: dict[str, Any], system: str, lift: str):
    one, many = lifted[f"{system}/jit"], lifted[f"{system}/{lift}"]
    assert one["compiles"] == many["compiles"] == 1
    for expected, other in zip(one["metrics"], many["metrics"], strict=True):
        np.testing.assert_allclose(other["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(other["accuracy"], expected["accuracy"], atol=1e-6)
        np.testing.assert_allclose(other["gradient_norm"], expected["gradient_norm"], rtol=1e-4)
    assert one["leaves"].keys() == many["leaves"].keys()
    for path, leaf in one["leaves"].items():
        scale = np.abs(leaf).max() or 1.0
        np.testing.assert_allclose(many["leaves"][path], leaf, atol=1e-5 * scale + 1e-7, rtol=0, err_msg=path)


def digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(1,500 training, 297 test) scans of 8 x 8 pixels, written by different people."""
    dataset: Any = pytest.importorskip("sklearn.datasets").load_digits()
    image = np.repeat((dataset.images[..., None] / 16 - 0.3053) / 0.3762, 3, -1).astype(np.float32)
    columns = {"image": image, "label": dataset.target.astype(np.int32)}
    return {k: v[:1500] for k, v in columns.items()}, {k: v[1500:] for k, v in columns.items()}


@pytest.mark.parametrize(
    ("classifier", "transform", "loss", "right"),
    [
        (
            ResNetClassifier(ResNetConfig((1, 1), "basic", "cifar", 8, (8, 16), num_classes=10)),
            sgd(warmup_cosine(0.1, 360, 30), 0.9, 1e-4),
            0.03,
            0.92,
        ),
        (
            ViTClassifier(ViTConfig(32, 2, 4, 64, 2, (8, 8), 10, drop_path=0.1)),
            adamw(warmup_cosine(5e-3, 360, 30)),
            0.25,
            0.78,
        ),
    ],
    ids=["resnet", "vit"],
)
def test_real_digits_are_learned(classifier: Any, transform: Any, loss: float, right: float):
    """Chance: a loss of 2.30 and a tenth of the test digits."""
    train, test = digits()
    method, optimizer = Classification(classifier, 10), Optimizer(transform)
    step = jax.jit(lambda state, batch: train_step(method, optimizer, state, batch), donate_argnums=0)
    rng, losses = np.random.default_rng(0), []
    first = {name: column[:50] for name, column in train.items()}
    state = jax.jit(lambda: create_state(method, optimizer, jax.random.key(0), first))()
    for _ in range(12):
        for indices in rng.permutation(1500).reshape(30, 50):
            state, metrics = step(state, {name: column[indices] for name, column in train.items()})
            losses.append(float(metrics["loss"]))
    assert losses[0] > 2 and np.mean(losses[-30:]) < loss
    logits = jax.jit(method.predict)(state.params, state, test["image"])
    assert np.mean(np.argmax(logits, -1) == test["label"]) > right


def test_evaluation_is_the_network_itself():
    """Evaluation uses the running statistics, is deterministic and changes no state."""
    pixels = jax.random.normal(jax.random.key(1), (3, SIDE, SIDE, 3))
    classifier: Any = ResNetClassifier(RESNET)
    params, stats = jax.jit(classifier.init)(jax.random.key(2), pixels)

    @jax.jit
    def both_logits(params: Any, stats: Any) -> Any:
        actual, same = classifier.logits(params, stats, pixels, train=False)
        assert same is stats
        expected: Any = ResNet(RESNET).apply({"params": params, "batch_stats": stats}, pixels)
        _, moved = classifier.logits(params, stats, pixels, train=True)
        return actual, expected["logits"], moved["stem_bn"]["mean"]

    actual, expected, mean = both_logits(params, stats)
    np.testing.assert_array_equal(actual, expected)
    assert np.abs(mean - stats["stem_bn"]["mean"]).max() > 1e-3

    classifier = ViTClassifier(VIT)
    params, _ = jax.jit(classifier.init)(jax.random.key(2), pixels)
    head = jax.random.normal(jax.random.key(3), (14, C))  # begins at zero
    params = {**params, "head": {"kernel": head, "bias": jnp.zeros(C)}}

    @jax.jit
    def all_three(params: Any) -> Any:
        plain: Any = ViT(VIT).apply({"params": params}, pixels)
        sampled, _ = classifier.logits(params, {}, pixels, train=True, rng=jax.random.key(4))
        return classifier.logits(params, {}, pixels, train=False)[0], plain.logits, sampled

    actual, expected, sampled = all_three(params)
    np.testing.assert_array_equal(actual, expected)
    assert np.abs(sampled - actual).max() > 1e-2
