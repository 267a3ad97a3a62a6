"""Classification as a method: values by hand, averaged weights, labels that are no class, and learning real digits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.training.classification import Classification
from mmjax.training.mixing import Mixing
from mmjax.training.optimizer import Optimizer, sgd
from mmjax.training.state import create_state
from mmjax.training.step import train_step

B, H, W, C = 5, 2, 3, 7
RATE = 0.3


@dataclasses.dataclass(frozen=True)
class Linear:
    """logits = pixels @ kernel; its "statistics": the mean pixel, and a count of batches."""

    classes: int = C

    def init(self, rng: Any, pixels: Any) -> Any:
        kernel = jax.random.normal(rng, (pixels[0].size, self.classes))
        return {"kernel": kernel}, {"mean": jnp.zeros(()), "count": jnp.int32(0)}

    def logits(self, params, stats, pixels, *, train, rng=None, bn_groups=1, axis_name=None):
        mean = jnp.mean(pixels)
        if axis_name is not None:
            mean = jax.lax.pmean(mean, axis_name)
        moved = {"mean": 0.9 * stats["mean"] + 0.1 * mean, "count": stats["count"] + 1}
        return pixels.reshape(len(pixels), -1) @ params["kernel"] + stats["mean"], moved if train else stats


def batch(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((B, H, W, 3)).astype(np.float32)
    return {"image": jnp.asarray(image), "label": jnp.asarray(rng.integers(0, C, B), jnp.int32)}


def started(method: Any, examples: Any = None) -> Any:
    return create_state(method, OPTIMIZER, jax.random.key(0), examples or batch())


OPTIMIZER = Optimizer(sgd(RATE, momentum=0.0))


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_loss_and_accuracy_by_hand(objective: Any):
    method = Classification(Linear(), C, objective=objective, label_smoothing=0.1)
    state, examples = started(method), batch()
    value, (carry, metrics) = method.loss(state.params, state.carry, examples, jax.random.key(1), 0)
    logits = np.asarray(examples["image"], np.float64).reshape(B, -1) @ np.asarray(state.params["kernel"], np.float64)
    targets = 0.9 * np.eye(C)[np.asarray(examples["label"])] + 0.1 / C
    if objective == "softmax":
        expected = -(targets * log_softmax(logits)).sum(-1)
    else:
        expected = (targets * np.log1p(np.exp(-logits)) + (1 - targets) * np.log1p(np.exp(logits))).sum(-1)
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(logits.argmax(-1) == np.asarray(examples["label"])))
    np.testing.assert_allclose(carry.stats["mean"], 0.1 * np.mean(examples["image"]), rtol=1e-5)


def test_uint8_images_are_normalised_and_floats_are_not():
    method = Classification(Linear(), C, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    image = np.random.default_rng(0).integers(0, 256, (B, H, W, 3), np.uint8)
    expected = (image / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 2.0])
    np.testing.assert_allclose(method.pixels(jnp.asarray(image)), expected, rtol=1e-5, atol=1e-6)
    floats = batch()["image"]
    assert method.pixels(floats) is floats
    with pytest.raises(MmjaxError, match="need mean and std"):
        Classification(Linear(), C).pixels(jnp.asarray(image))


def test_mixed_labels_carry_the_loss():
    """With shares a and 1 - a, the loss is that of the mixed image against both labels."""
    method = Classification(Linear(), C, mixing=Mixing(mixup=0.7))
    state, examples, rng = started(method), batch(), jax.random.key(3)
    value, _ = method.loss(state.params, state.carry, examples, rng, 0)
    image, label = np.asarray(examples["image"], np.float64), np.asarray(examples["label"])
    # The share from the images themselves.
    recorded: list[Any] = []

    class Watched(Linear):
        def logits(self, params, stats, pixels, **kwargs):
            recorded.append(np.asarray(pixels, np.float64))
            return super().logits(params, stats, pixels, **kwargs)

    dataclasses.replace(method, classifier=Watched()).loss(state.params, state.carry, examples, rng, 0)
    other = np.roll(image, 1, 0)
    share = (recorded[0] - other)[0, 0, 0, 0] / (image - other)[0, 0, 0, 0]
    assert 0.02 < share < 0.98
    np.testing.assert_allclose(recorded[0], share * image + (1 - share) * other, atol=1e-5)
    log_p = log_softmax(recorded[0].reshape(B, -1) @ np.asarray(state.params["kernel"], np.float64))
    rows = np.arange(B)
    expected = -(share * log_p[rows, label] + (1 - share) * log_p[rows, np.roll(label, 1)]).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("label", [-1, C])
@pytest.mark.parametrize("mixing", [Mixing(), Mixing(mixup=0.2)])
def test_a_label_that_is_no_class_is_refused(label: int, mixing: Mixing):
    method = Classification(Linear(), C, mixing=mixing)
    examples = batch() | {"label": batch()["label"].at[2].set(label)}
    state = started(method)
    after, metrics = jax.jit(lambda s, b: train_step(method, OPTIMIZER, s, b))(state, examples)
    assert np.isnan(metrics["loss"]) and after.skipped.total == 1
    np.testing.assert_array_equal(after.params["kernel"], state.params["kernel"])


def test_averaged_weights_follow_and_are_used():
    m = 0.75
    method = Classification(Linear(), C, weight_ema=m)
    state = started(method)
    kernels, means = [np.asarray(state.params["kernel"], np.float64)], [0.0]
    for seed in range(3):
        state, _ = train_step(method, OPTIMIZER, state, batch(seed))
        kernels.append(np.asarray(state.params["kernel"], np.float64))
        means.append(float(state.stats["mean"]))
    # The average is updated before each step, so it includes the parameters before the last step.
    average, stats = kernels[0], 0.0
    for kernel in kernels[:3]:
        average = m * average + (1 - m) * kernel
    for mean in means[1:]:
        stats = m * stats + (1 - m) * mean
    params, averaged = method.variables(state)
    np.testing.assert_allclose(params["kernel"], average, rtol=1e-5)
    np.testing.assert_allclose(averaged["mean"], stats, rtol=1e-5)
    assert averaged["count"] == 3
    logits = method.predict(state.params, state, batch()["image"])
    expected = np.asarray(batch()["image"]).reshape(B, -1) @ average + stats
    np.testing.assert_allclose(logits, expected, rtol=1e-4)
    plain = Classification(Linear(), C)
    np.testing.assert_allclose(
        plain.predict(state.params, state, batch()["image"]),
        np.asarray(batch()["image"]).reshape(B, -1) @ kernels[-1] + means[-1],
        rtol=1e-4,
    )


def test_bad_settings_are_reported_together():
    with pytest.raises(MmjaxError, match=r"classes=0.*label_smoothing=1\.0.*weight_ema=1\.0"):
        Classification(Linear(), 0, label_smoothing=1.0, weight_ema=1.0)
    with pytest.raises(MmjaxError, match="mean and std"):
        Classification(Linear(), C, mean=(0.5, 0.5, 0.5))
    with pytest.raises(MmjaxError, match="head has 7"):
        started(Classification(Linear(), C + 1))
    with pytest.raises(MmjaxError, match=r"wants batch\['label'\].*\['image'\]"):
        started(Classification(Linear(), C), {"image": batch()["image"]})
