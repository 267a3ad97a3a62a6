"""Probes: scikit-learn's optimum, PyTorch's SGD, the choice of a penalty, degenerate input."""

import jax
import numpy as np
import pytest
from flax import struct

from mmjax.errors import MmjaxError
from mmjax.evaluation.linear_probe import (
    LinearProbeEvaluation,
    SGDConfig,
    logistic_regression,
    sgd_probe,
    swept_probe,
)
from mmjax.training.scores import metrics


@struct.dataclass
class State:
    step: int


def blobs(n, classes, seed, d=7, spread=1.5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(99).standard_normal((classes, d))
    return (centres[labels] + spread * rng.standard_normal((n, d))).astype(np.float32), labels


def objective(kernel, bias, features, labels, l2):
    logits = features.astype(np.float64) @ kernel + bias
    logits -= logits.max(1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    return losses.mean() + l2 / 2 * np.sum(np.asarray(kernel, np.float64) ** 2)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_same_optimum_as_scikit_learn(classes, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs(211, classes, 0)
    test, truth = blobs(503, classes, 1)
    probe = logistic_regression(features, labels, l2)
    reference = linear_model.LogisticRegression(C=1 / (l2 * 211), tol=1e-8, max_iter=10_000).fit(features, labels)
    # With two classes scikit-learn has one vector w, equal to a kernel of (-w/2, w/2): the penalty is half as large.
    if classes == 2:
        reference = linear_model.LogisticRegression(C=2 / (l2 * 211), tol=1e-8, max_iter=10_000).fit(features, labels)
        kernel = np.concatenate([-reference.coef_, reference.coef_]).T / 2
        bias = np.concatenate([-reference.intercept_, reference.intercept_]) / 2
    else:
        kernel, bias = reference.coef_.T, reference.intercept_
    best = objective(kernel, bias, features, labels, l2)
    assert float(probe.loss) == pytest.approx(best, rel=2e-6)
    assert objective(probe.kernel, probe.bias, features, labels, l2) == pytest.approx(best, rel=2e-6)
    np.testing.assert_allclose(probe.kernel, kernel, atol=3e-3 * np.abs(kernel).max())
    assert float(probe.gradient) < 2e-5
    agree = np.mean(probe.predict(test) == reference.predict(test))
    assert agree >= 1 - 1 / 503 and abs(probe.scores(test, truth)[1].value - 100 * reference.score(test, truth)) < 0.3


def test_standardised_probe_is_invariant_to_scales():
    features, labels = blobs(211, 5, 2)
    scaled = features * np.array([1e3, 1e-3, 1, 10, 1, 1, 5], np.float32) + np.float32(7)
    constant = np.concatenate([scaled, np.full((211, 1), 0.1, np.float32)], 1)
    one = logistic_regression(features, labels, 1e-2, standardise=True)
    two = logistic_regression(constant, labels, 1e-2, standardise=True)
    # 7 in a column of deviation 1e-3 costs it three digits.
    np.testing.assert_allclose(two.logits(constant), one.logits(features), atol=1e-2)
    assert float(two.loss) == pytest.approx(float(one.loss), rel=1e-4)
    assert float(two.scale[7]) == 1


def test_sweep_chooses_on_its_validation_part():
    # Many features of noise: without a penalty the probe learns the noise.
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 401)
    features = rng.standard_normal((401, 97)).astype(np.float32)
    features[:, 0] += 2 * labels
    sweep = swept_probe(features, labels, l2s=(1e-6, 1.0))
    assert sweep.l2 == 1 and sweep.l2s == (1.0, 1e-6)
    assert sweep.accuracies[0] > sweep.accuracies[1] + 5
    refitted = logistic_regression(features, labels, 1.0, standardise=True)
    np.testing.assert_allclose(sweep.probe.kernel, refitted.kernel, atol=1e-6)
    right = np.array(sweep.accuracies) * 80 / 100  # of the 80 rows, a fifth, that chose
    np.testing.assert_allclose(right, np.round(right), atol=1e-3)


def test_sweep_standardises_by_the_fitted_items_only():
    """Its accuracies and its choice again by hand: moments, optimum and choice, each on its items."""
    features, labels = blobs(101, 3, 17, spread=2.5)
    validation = np.random.default_rng(5).permutation(101)[:30]
    fitted = np.setdiff1d(np.arange(101), validation)
    # Three outliers among what is judged, in three columns: moments that looked at them would press those columns flat.
    features[validation[:3], :3] *= 300
    sweep = swept_probe(features, labels, l2s=(1e-3, 0.1, 1.0), validation=30 / 101, seed=5)
    mean, deviation = features[fitted].mean(0), features[fitted].std(0)
    whole = (features.mean(0), features.std(0))
    losses, shares, wrong = [], [], []
    for l2 in sweep.l2s:
        probe = logistic_regression((features[fitted] - mean) / deviation, labels[fitted], l2)
        losses.append(
            objective(probe.kernel, probe.bias, (features[validation] - mean) / deviation, labels[validation], 0)
        )
        shares.append(100 * np.mean(probe.predict((features[validation] - mean) / deviation) == labels[validation]))
        mixed = logistic_regression((features[fitted] - whole[0]) / whole[1], labels[fitted], l2)
        wrong.append(100 * np.mean(mixed.predict((features[validation] - whole[0]) / whole[1]) == labels[validation]))
    np.testing.assert_allclose(sweep.accuracies, shares, atol=1e-3)
    assert np.abs(np.array(wrong) - shares).max() > 3
    assert sweep.l2 == sweep.l2s[min(range(3), key=lambda i: (-shares[i], losses[i]))]
    # The returned layer is fitted, and standardised, on all rows.
    np.testing.assert_allclose(sweep.probe.mean, whole[0], rtol=1e-5)
    np.testing.assert_allclose(sweep.probe.scale, whole[1], rtol=1e-5)


def test_a_sweep_decides_ties_by_cross_entropy():
    """Far apart classes: every penalty is right, and the weakest is the most confident."""
    features, labels = blobs(101, 2, 18, spread=0.05)
    sweep = swept_probe(features, labels, l2s=(1.0, 1e-2, 1e-4))
    assert sweep.accuracies == (100.0, 100.0, 100.0) and sweep.l2 == 1e-4


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_sgd_by_hand_over_short_batches_passes_and_standardised_features(momentum):
    """NumPy, float64: torch's order of decay, buffer and rate; batches of 5, 5 and 3 rows; two passes in turn."""
    features, labels = blobs(13, 3, 19)
    passes = np.stack([features, features[:, ::-1] + 1])
    config = SGDConfig(0.3, momentum, weight_decay=0.02, batch_size=5, epochs=4, schedule="cosine")
    probe = sgd_probe(passes, labels, config, standardise=True, seed=11)
    flat = passes.reshape(-1, 7).astype(np.float64)
    inputs = (passes - flat.mean(0)) / flat.std(0)
    start, order_rng = jax.random.split(jax.random.key(11))
    kernel, bias = 0.01 * np.asarray(jax.random.normal(start, (7, 3)), np.float64), np.zeros(3)
    velocity, last = [np.zeros((7, 3)), np.zeros(3)], 0.0
    for epoch in range(4):
        rate, last = 0.3 * 0.5 * (1 + np.cos(np.pi * epoch / 4)), 0.0
        order = np.asarray(jax.random.permutation(jax.random.fold_in(order_rng, epoch), 13))
        for batch in (order[:5], order[5:10], order[10:]):
            x, y = inputs[epoch % 2][batch], labels[batch]
            last += len(batch) / 13 * objective(kernel, bias, x, y, 0)
            chances = np.exp(x @ kernel + bias)
            error = (chances / chances.sum(1, keepdims=True) - np.eye(3)[y]) / len(batch)
            for i, (leaf, gradient) in enumerate(((kernel, x.T @ error), (bias, error.sum(0)))):
                velocity[i] = momentum * velocity[i] + gradient + 0.02 * leaf
                leaf -= rate * velocity[i]
    np.testing.assert_allclose(probe.kernel, kernel, atol=1e-5)
    np.testing.assert_allclose(probe.bias, bias, atol=1e-5)
    assert float(probe.loss) == pytest.approx(last, rel=1e-5) and int(probe.steps) == 12


@pytest.mark.torch
def test_sgd_equals_pytorch():
    torch = pytest.importorskip("torch")
    features, labels = blobs(31, 3, 4)
    # One batch an epoch: the order does not matter then.
    config = SGDConfig(learning_rate=0.5, weight_decay=1e-3, batch_size=31, epochs=23, milestones=(11, 17))
    probe = sgd_probe(features, labels, config, seed=5)
    start = 0.01 * jax.random.normal(jax.random.split(jax.random.key(5))[0], (7, 3))
    layer = torch.nn.Linear(7, 3)
    layer.weight.data, layer.bias.data = torch.tensor(np.asarray(start).T.copy()), torch.zeros(3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5, momentum=0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [11, 17])
    for _ in range(23):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(layer(torch.tensor(features)), torch.tensor(labels))
        loss.backward()
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(probe.kernel, layer.weight.detach().numpy().T, atol=1e-5)
    np.testing.assert_allclose(probe.bias, layer.bias.detach().numpy(), atol=1e-5)
    assert float(probe.loss) == pytest.approx(float(loss.detach()), rel=1e-5) and int(probe.steps) == 23


def test_sgd_with_a_short_last_batch_uses_every_item():
    # Batches of 8 from 19 rows: 8, 8 and 3. A rate so small that the layer stands still: the loss is the mean of all.
    features, labels = blobs(19, 3, 6)
    probe = sgd_probe(features, labels, SGDConfig(learning_rate=1e-12, batch_size=8, epochs=2), seed=7)
    start = 0.01 * np.asarray(jax.random.normal(jax.random.split(jax.random.key(7))[0], (7, 3)))
    assert float(probe.loss) == pytest.approx(objective(start, 0, features, labels, 0), rel=1e-5)
    assert int(probe.steps) == 6


def test_sgd_uses_passes_in_turn():
    features, labels = blobs(19, 3, 8)
    config = SGDConfig(learning_rate=0.1, batch_size=19, epochs=4)
    passes = np.stack([features, features * 0])
    probe = sgd_probe(passes, labels, config, seed=9)
    # The last epoch used the second pass, of zeros: only the bias separates classes there.
    share = np.bincount(labels) / 19
    assert float(probe.loss) > -np.sum(share * np.log(share)) - 1e-4
    same = sgd_probe(np.stack([features, features]), labels, config, seed=9)
    np.testing.assert_array_equal(same.kernel, sgd_probe(features, labels, config, seed=9).kernel)


def test_schedules():
    step = SGDConfig().learning_rates()
    assert [round(float(step[epoch]), 6) for epoch in (0, 59, 60, 79, 80, 99)] == [30, 30, 3, 3, 0.3, 0.3]
    cosine = SGDConfig(learning_rate=12, epochs=90, schedule="cosine").learning_rates()
    assert (cosine[0], cosine[45]) == (12, pytest.approx(6)) and cosine.shape == (90,)
    assert SGDConfig(epochs=3, milestones=()).learning_rates().shape == (3,)


def test_sgd_protocol_of_moco_solves_an_easy_task():
    features, labels = blobs(307, 3, 10, spread=0.2)
    test, truth = blobs(101, 3, 11, spread=0.2)
    assert sgd_probe(features, labels, SGDConfig(epochs=20, milestones=(12, 16))).scores(test, truth)[1].value > 97


def test_one_class_and_the_best_class_of_few():
    features, _ = blobs(11, 2, 12)
    only = logistic_regression(features, np.zeros(11, int), 0.1)
    score = only.scores(features, np.zeros(11, int))[1]
    assert (score.value, score.chance) == (100, 100)
    two = logistic_regression(features, np.zeros(11, int), 0.1, classes=2)
    assert (two.predict(features) == 0).all()
    assert list(two.scores(features, np.zeros(11, int))) == [1]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x, y: logistic_regression(x * np.nan, y, 0.1), "features: 133 of 133"),
        (lambda x, y: logistic_regression(x, y[:5], 0.1), "labels"),
        (lambda x, y: logistic_regression(x, y, 0.1, classes=2), "labels"),
        (lambda x, y: logistic_regression(x, y - 1, 0.1), "labels"),
        (lambda x, y: logistic_regression(x, y, -1.0), "l2=-1"),
        (lambda x, y: logistic_regression(x[:1], y[:1], 0.1), "features: 1 row"),
        (lambda x, y: logistic_regression(x, y, 0.1).logits(x[:, :3]), "features"),
        (lambda x, y: swept_probe(x, y, l2s=()), "l2s"),
        (lambda x, y: swept_probe(x, y, validation=0.0), "validation"),
        (lambda x, y: sgd_probe(x[0], y), "features"),
        (lambda x, y: SGDConfig(schedule="none"), "schedule"),
        (lambda x, y: SGDConfig(epochs=0), "epochs=0"),
        (lambda x, y: sgd_probe(x * 1e30, y, SGDConfig(learning_rate=1e30, epochs=5)), "learning_rate"),
    ],
)
def test_bad_input_is_named(call, named):
    features, labels = blobs(19, 3, 13)
    with pytest.raises(MmjaxError, match=named):
        call(features, labels)


def test_evaluation():
    images, labels = blobs(211, 7, 14)
    test, truth = blobs(101, 7, 15)
    traced = []

    def encode(params, state, images):
        traced.append(images.shape)
        return images @ params["kernel"]

    kernel = np.random.default_rng(16).standard_normal((7, 11)).astype(np.float32)
    common = {"encode": encode, "train_labels": labels, "test_images": test, "test_labels": truth, "batch_size": 53}
    made = LinearProbeEvaluation(train_images=images, **common)
    logged = metrics(made.run({"kernel": kernel}, State(1)))
    expected = swept_probe(images @ kernel, labels).probe.scores(test @ kernel, truth)
    assert logged["linear_probe_top1"] == pytest.approx(expected[1].value, abs=100 / 101)
    assert logged["linear_probe_top5"] > logged["linear_probe_top1"] and logged["linear_probe_n"] == 101
    made.run({"kernel": kernel * 2}, State(2))
    assert traced == [(53, 7)]
    config = SGDConfig(learning_rate=0.1, epochs=3)
    passes = LinearProbeEvaluation(train_images=[images, images * 1.1], sgd=config, **common)
    direct = sgd_probe(np.stack([images @ kernel, images @ kernel * np.float32(1.1)]), labels, config)
    np.testing.assert_allclose(passes.probe({"kernel": kernel}).kernel, direct.kernel, atol=1e-5)
    with pytest.raises(MmjaxError, match="several passes"):
        LinearProbeEvaluation(train_images=[images, images], **common)
    # A class that only the test set has is wrong, not an error.
    rare = LinearProbeEvaluation(train_images=images, **common | {"test_labels": np.where(truth == 0, 7, truth)})
    expected_accuracy = np.mean((truth != 0) & (made.probe({"kernel": kernel}).predict(test @ kernel) == truth))
    assert rare.scores({"kernel": kernel})["linear_probe_top1"].value == pytest.approx(100 * expected_accuracy)
