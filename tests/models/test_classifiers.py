"""ResNet and ViT as classifiers: training on real digits in seconds, and evaluation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.models.resnet.supervised import ResNetClassifier
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.models.vit.supervised import ViTClassifier
from mmjax.training.classification import Classification
from mmjax.training.optimizer import Optimizer, adamw, sgd, warmup_cosine
from mmjax.training.state import create_state
from mmjax.training.step import train_step

SIDE, C = 9, 5
RESNET = ResNetConfig((1, 1), "basic", "cifar", 5, (5, 7), num_classes=C)
VIT = ViTConfig(14, 2, 2, 13, 3, (SIDE, SIDE), C, drop_path=0.3)


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
