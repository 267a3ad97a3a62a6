"""Linear probes of frozen features: MoCo's protocol by SGD, and CLIP's, logistic regression by L-BFGS.

Both train one affine layer on features that were extracted once, in evaluation mode; each is one compiled program.
`sgd_probe` is what MoCo's tables report. `swept_probe` has no learning rate, finds the optimum in seconds and chooses
its one hyper-parameter, the penalty, on a part of the training set.

    >>> features = np.array([[0.0, 1.0], [0.2, 0.9], [1.0, 0.0], [0.9, 0.3]])
    >>> probe = logistic_regression(features, np.array([0, 0, 1, 1]), l2=0.01)
    >>> probe.predict(np.array([[0.1, 1.1], [1.2, 0.1]])).tolist()
    [0, 1]
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from mmjax.evaluation.classification import top_k
from mmjax.evaluation.features import Encode, Extractor, Inputs, checked_features, checked_integers
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score
from mmjax.types import Array, ArrayLike, Bool, Float, Int, MmjaxError, Params, PRNGKeyArray

L2S = tuple(10.0**power for power in range(-7, 2))
"""Penalties tried by default; sklearn's C is 1 / (n l2)."""


@struct.dataclass
class LinearProbe:
    """logits = (features - mean) / scale @ kernel + bias.

    Attributes:
        kernel: [d, c]. bias: [c].
        mean, scale: [d], of the training features; 0 and 1 if they are not standardised.
        loss: the final value of the objective. steps: iterations or updates.
        gradient: the largest entry of the final gradient, 0 at the optimum; not computed by SGD, which returns 0.
    """

    kernel: Float[Array, "d c"]
    bias: Float[Array, " c"]
    mean: Float[Array, " d"]
    scale: Float[Array, " d"]
    loss: Float[Array, ""]
    steps: Int[Array, ""]
    gradient: Float[Array, ""]

    def logits(self, features: Float[ArrayLike, "n d"]) -> Float[Array, "n c"]:
        """Raises MmjaxError for features of another width, or NaN."""
        return _probe_logits(self, checked_features("features", features, len(self.mean)))

    def predict(self, features: Float[ArrayLike, "n d"]) -> Int[np.ndarray, " n"]:
        return np.asarray(self.logits(features)).argmax(1)

    def scores(
        self, features: Float[ArrayLike, "n d"], labels: Int[ArrayLike, " n"], ks: tuple[int, ...] = (1, 5)
    ) -> dict[int, Score]:
        """k -> top-k accuracy."""
        return top_k(self.logits(features), labels, ks)


@jax.jit
def _probe_logits(probe: LinearProbe, features: Float[Array, "n d"]) -> Float[Array, "n c"]:
    return _affine((features - probe.mean) / probe.scale, probe.kernel, probe.bias)


def _affine(features: Float[Array, "n d"], kernel: Float[Array, "d c"], bias: Float[Array, " c"]) -> Array:
    return jnp.matmul(features, kernel, precision="highest") + bias


# ----------------------------------------------------------------------------------------------- logistic regression


def logistic_regression(
    features: Float[ArrayLike, "n d"],
    labels: Int[ArrayLike, " n"],
    l2: float,
    classes: int | None = None,
    standardise: bool = False,
    iterations: int = 1000,
    tolerance: float = 1e-5,
) -> LinearProbe:
    """The minimum of mean cross-entropy + l2/2 |kernel|², by full-batch L-BFGS; the bias is not penalised.

    scikit-learn's LogisticRegression(C) is l2 = 1 / (n C). float32.

    Args:
        standardise: to mean 0 and deviation 1 over the training set; constant features are not scaled.
        iterations: maximum number.
        tolerance: stops when no entry of the gradient is larger.

    Raises MmjaxError, naming the argument: NaN, fewer than two items, labels out of range, l2 below 0.
    """
    x, y, classes = _training_set(features, labels, classes)
    if not 0 <= l2 < math.inf:
        raise MmjaxError(f"l2={l2}: must be finite and at least 0")
    mean, scale = _moments(x, standardise)
    start = (jnp.zeros((x.shape[1], classes)), jnp.zeros(classes))
    (kernel, bias), fit = _lbfgs((x - mean) / scale, y, jnp.ones(len(x)), start, l2, iterations, tolerance)
    return LinearProbe(kernel, bias, mean, scale, fit.loss, fit.steps, fit.gradient)


class Sweep(NamedTuple):
    """A probe and how its penalty was chosen: `accuracies` of `l2s`, in percent, on the validation part."""

    probe: LinearProbe
    l2: float
    l2s: tuple[float, ...]
    accuracies: tuple[float, ...]


def swept_probe(
    features: Float[ArrayLike, "n d"],
    labels: Int[ArrayLike, " n"],
    classes: int | None = None,
    l2s: Sequence[float] = L2S,
    validation: float = 0.2,
    standardise: bool = True,
    iterations: int = 1000,
    seed: int = 0,
) -> Sweep:
    """Logistic regression whose penalty is the best on a validation part of the training set, then refitted on all.

    Ties in accuracy are decided by cross-entropy. The test set is not used. One compilation serves all penalties; each
    starts from the optimum of the next stronger one.

    Args:
        validation: the share of items, sampled by `seed`, on which the penalty is chosen.
    """
    x, y, classes = _training_set(features, labels, classes)
    held_out = round(validation * len(x))
    if not l2s or not all(0 <= l2 < math.inf for l2 in l2s) or not 0 < held_out < len(x):
        raise MmjaxError(f"l2s={l2s}, validation={validation} of {len(x)} rows: need penalties, and rows on both sides")
    validated = np.zeros(len(x), bool)
    validated[np.random.default_rng(seed).permutation(len(x))[:held_out]] = True
    fitted = jnp.asarray(~validated, jnp.float32)
    mean, scale = _moments(x, standardise, fitted)
    inputs = (x - mean) / scale
    ordered = sorted(set(l2s), reverse=True)
    start: Any = (jnp.zeros((x.shape[1], classes)), jnp.zeros(classes))
    tried = []
    for l2 in ordered:
        start, _ = _lbfgs(inputs, y, fitted, start, l2, iterations, 1e-5)
        tried.append(_validation_scores(inputs, y, jnp.asarray(validated), start))
    right, loss = (np.array([float(pair[i]) for pair in tried]) for i in range(2))
    best = ordered[int(np.lexsort((loss, -right))[0])]
    probe = logistic_regression(x, y, best, classes, standardise, iterations)
    return Sweep(probe, best, tuple(ordered), tuple((100.0 * right).tolist()))


class _Fit(NamedTuple):
    loss: Float[Array, ""]
    steps: Int[Array, ""]
    gradient: Float[Array, ""]


@functools.partial(jax.jit, static_argnames="iterations")
def _lbfgs(
    features: Float[Array, "n d"],
    labels: Int[Array, " n"],
    weights: Float[Array, " n"],
    start: tuple[Float[Array, "d c"], Float[Array, " c"]],
    l2: Float[Array, ""] | float,
    iterations: int,
    tolerance: Float[Array, ""] | float,
) -> tuple[tuple[Float[Array, "d c"], Float[Array, " c"]], _Fit]:
    """From `start` to the optimum on the items with weight 1; those with weight 0 are ignored."""

    def objective(weights_and_bias: Any) -> Float[Array, ""]:
        kernel, bias = weights_and_bias
        losses = optax.softmax_cross_entropy_with_integer_labels(_affine(features, kernel, bias), labels)
        return jnp.sum(weights * losses) / jnp.sum(weights) + l2 / 2 * jnp.sum(kernel**2)

    solver = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(objective)

    def improve(carry: Any) -> Any:
        params, state, steps, _, stalled = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = solver.update(gradient, state, params, value=value, grad=gradient, value_fn=objective)
        moved = optax.apply_updates(params, updates)
        # The line search left the value and gradient of the new point in the state.
        after, largest = optax.tree.get(state, "value"), _largest(optax.tree.get(state, "grad"))
        # Near the optimum a float32 loss only changes in its last bits: several such steps in a row end the search.
        stalled = jnp.where(after < value - 1e-7 * jnp.abs(value), 0, stalled + 1)
        return moved, state, steps + 1, largest, stalled

    def unfinished(carry: Any) -> Bool[Array, ""]:
        _, _, steps, largest, stalled = carry
        return (steps < iterations) & (largest > tolerance) & (stalled < 10)

    first = (start, solver.init(start), jnp.zeros((), jnp.int32), jnp.float32(jnp.inf), jnp.zeros((), jnp.int32))
    params, _, steps, largest, _ = jax.lax.while_loop(unfinished, improve, first)
    return params, _Fit(objective(params), steps, largest)


def _largest(gradient: Any) -> Float[Array, ""]:
    return jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(gradient)]).max()


@jax.jit
def _validation_scores(
    features: Float[Array, "n d"], labels: Int[Array, " n"], mask: Bool[Array, " n"], layer: Any
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(accuracy, mean cross-entropy) over the items in `mask`."""
    logits = _affine(features, *layer)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(jnp.argmax(logits, 1) == labels, where=mask), jnp.mean(losses, where=mask)


def _moments(
    features: Float[Array, "n d"], standardise: bool, weights: Float[Array, " n"] | None = None
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    if not standardise:
        return jnp.zeros(features.shape[1]), jnp.ones(features.shape[1])
    share = jnp.ones((len(features), 1)) if weights is None else weights[:, None]
    mean = jnp.sum(share * features, 0) / jnp.sum(share)
    deviation = jnp.sqrt(jnp.sum(share * (features - mean) ** 2, 0) / jnp.sum(share))
    # The deviation of a constant feature is rounding error, which must not be amplified.
    return mean, jnp.where(deviation > 1e-6 * (1e-6 + jnp.abs(mean)), deviation, 1.0)


def _training_set(features: ArrayLike, labels: ArrayLike, classes: int | None) -> tuple[Array, Array, int]:
    x = checked_features("features", features)
    if len(x) < 2:
        raise MmjaxError(f"features: {len(x)} row is too few to fit")
    y = checked_integers("labels", labels, len(x), classes)
    return x, jnp.asarray(y), classes or int(y.max()) + 1


# ------------------------------------------------------------------------------------------------------------- SGD


@dataclasses.dataclass(frozen=True)
class SGDConfig:
    """MoCo's `main_lincls.py` (v1, v2). v3: learning_rate 0.4 (ResNet-50) or 12 (ViT), batch 1024, 90 epochs, cosine.

    schedule: step multiplies by 0.1 at each of `milestones`; cosine goes to 0; both change once an epoch.
    """

    learning_rate: float = 30.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 256
    epochs: int = 100
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[int, ...] = (60, 80)

    def __post_init__(self) -> None:
        if self.schedule not in ("step", "cosine"):
            raise MmjaxError(f"schedule={self.schedule!r} (step or cosine)")
        if self.epochs < 1 or self.batch_size < 1:
            raise MmjaxError(f"epochs={self.epochs}, batch_size={self.batch_size}: at least 1")

    def learning_rates(self) -> Float[np.ndarray, " epochs"]:
        """The learning rate of each epoch."""
        epoch = np.arange(self.epochs)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + np.cos(np.pi * epoch / self.epochs))
        return self.learning_rate * 0.1 ** np.searchsorted(np.sort(self.milestones), epoch, side="right")


def sgd_probe(
    features: Float[ArrayLike, "... n d"],
    labels: Int[ArrayLike, " n"],
    config: SGDConfig = SGDConfig(),
    classes: int | None = None,
    standardise: bool = False,
    seed: int = 0,
) -> LinearProbe:
    """A probe by SGD with momentum as PyTorch's: the kernel starts at N(0, 0.01²), the bias at 0.

    Args:
        features: [n, d], or [passes, n, d]: differently augmented passes over the images, which epochs use in turn.
        seed: of the kernel and of the order, which differs each epoch; an epoch's last batch may be shorter.

    Returns the last epoch's probe; main_lincls.py reports the best epoch on the test set, which is slightly higher.
    Raises MmjaxError, naming the argument; also when the loss is not finite at the end.
    """
    if np.ndim(features) not in (2, 3):
        raise MmjaxError(f"features: need [n, d] or [passes, n, d], not {list(np.shape(features))}")
    passes = jnp.asarray(features, jnp.float32).reshape(-1, *np.shape(features)[-2:])
    flat, _, classes = _training_set(
        passes.reshape(-1, passes.shape[-1]), np.tile(np.asarray(labels), len(passes)), classes
    )
    mean, scale = _moments(flat, standardise)
    rates = jnp.asarray(config.learning_rates(), jnp.float32)
    y = jnp.asarray(np.asarray(labels), jnp.int32)
    static = (config.batch_size, classes)
    hyper = (jnp.float32(config.momentum), jnp.float32(config.weight_decay))
    (kernel, bias), loss = _sgd((passes - mean) / scale, y, rates, hyper, jax.random.key(seed), static)
    if not bool(jnp.isfinite(loss)):
        raise MmjaxError(f"learning_rate={config.learning_rate}: the probe's loss became {float(loss)}")
    steps = config.epochs * math.ceil(passes.shape[1] / config.batch_size)
    return LinearProbe(kernel, bias, mean, scale, loss, jnp.int32(steps), jnp.float32(0))


@functools.partial(jax.jit, static_argnames="static")
def _sgd(
    passes: Float[Array, "p n d"],
    labels: Int[Array, " n"],
    rates: Float[Array, " epochs"],
    hyper: tuple[Float[Array, ""], Float[Array, ""]],
    rng: PRNGKeyArray,
    static: tuple[int, int],
) -> tuple[tuple[Float[Array, "d c"], Float[Array, " c"]], Float[Array, ""]]:
    """The layer after the last epoch, and the mean loss during that epoch."""
    (batch_size, classes), (momentum, decay) = static, hyper
    count, n, d = passes.shape
    steps = -(-n // batch_size)
    start_rng, order_rng = jax.random.split(rng)
    layer = (0.01 * jax.random.normal(start_rng, (d, classes)), jnp.zeros(classes))

    def loss_of(layer: Any, x: Array, y: Array, real: Array) -> Float[Array, ""]:
        losses = optax.softmax_cross_entropy_with_integer_labels(_affine(x, *layer), y)
        return jnp.mean(losses, where=real)

    def epoch(carry: Any, number: Array) -> Any:
        order = jax.random.permutation(jax.random.fold_in(order_rng, number), n)
        padded = jnp.concatenate([order, jnp.full(steps * batch_size - n, -1, order.dtype)])
        features, rate = passes[number % count], rates[number]

        def step(carry: Any, batch: Array) -> Any:
            layer, velocity = carry
            loss, gradient = jax.value_and_grad(loss_of)(layer, features[batch], labels[batch], batch >= 0)
            gradient = jax.tree.map(lambda g, w: g + decay * w, gradient, layer)
            velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, gradient)
            layer = jax.tree.map(lambda w, v: w - rate * v, layer, velocity)
            return (layer, velocity), loss * jnp.sum(batch >= 0)

        carry, losses = jax.lax.scan(step, carry, padded.reshape(steps, batch_size))
        return carry, jnp.sum(losses) / n

    first = (layer, jax.tree.map(jnp.zeros_like, layer))
    (layer, _), losses = jax.lax.scan(epoch, first, jnp.arange(len(rates)))
    return layer, losses[-1]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LinearProbeEvaluation(ScoredEvaluation):
    """`linear_probe_top1` (and top5, with more than five classes) of an encoder's frozen features.

    Attributes:
        encode: (params, state, images [b, ...]) -> features [b, d], in evaluation mode, not normalised.
        train_images, train_labels: an array [n, ...] and int [n], or a pipeline, which contains labels. For `sgd` also
            a list of either: differently augmented passes over the same images, which epochs use in turn.
        test_images, test_labels: an array or a pipeline.
        sgd: None: logistic regression, its penalty chosen on a part of the training set; else MoCo's protocol.
        standardise: features to mean 0 and deviation 1; MoCo's protocol does not.
    """

    name: str = "linear_probe"
    encode: Encode
    train_images: Inputs | Sequence[Inputs]
    train_labels: Int[ArrayLike, " n"] | None = None
    test_images: Inputs
    test_labels: Int[ArrayLike, " m"] | None = None
    sgd: SGDConfig | None = None
    l2s: tuple[float, ...] = L2S
    standardise: bool | None = None
    ks: tuple[int, ...] = (1, 5)
    seed: int = 0
    batch_size: int = 256

    @functools.cached_property
    def _extractor(self) -> Extractor:
        return Extractor(self.encode, self.batch_size)

    def __post_init__(self) -> None:
        if isinstance(self.train_images, list | tuple) and self.sgd is None:
            # The passes of an image would be on both sides of the sweep's split.
            raise MmjaxError("train_images: several passes are for the SGD protocol: set sgd")

    def probe(self, params: Params, state: Any = None) -> LinearProbe:
        """The layer, trained on the features of the training images."""
        passes: Any = self.train_images if isinstance(self.train_images, list | tuple) else [self.train_images]
        extract = self._extractor.labelled
        extracted = [extract(params, state, images, self.train_labels, "train_images") for images in passes]
        features, labels = np.stack([features for features, _ in extracted]), extracted[0][1]
        if any(not np.array_equal(other, labels) for _, other in extracted):
            raise MmjaxError("train_images: the passes are not over the same images in the same order")
        if self.sgd is not None:
            return sgd_probe(features, labels, self.sgd, standardise=bool(self.standardise), seed=self.seed)
        standardise = self.standardise is not False
        return swept_probe(features[0], labels, l2s=self.l2s, standardise=standardise, seed=self.seed).probe

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        features, truth = self._extractor.labelled(params, state, self.test_images, self.test_labels, "test_images")
        probe = self.probe(params, state)
        logits = np.asarray(probe.logits(features))
        # Classes missing from the training set cannot be predicted: they count as wrong, not as an error.
        unseen = max(0, int(truth.max()) + 1 - logits.shape[1])
        scores_by_k = top_k(np.pad(logits, ((0, 0), (0, unseen)), constant_values=-np.inf), truth, self.ks)
        scores = {f"{self.name}_top{k}": score for k, score in scores_by_k.items()}
        return Outcome(scores, {f"{self.name}_n": len(features)})
