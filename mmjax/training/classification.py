"""Supervised classification, a method like the others: cross-entropy of any network that returns logits.

    method = Classification(ResNetClassifier(ResNetConfig.r50()), classes=1000, label_smoothing=0.1)
    method = Augmented(method, one_view(View.supervised(224)))

Each system's `supervised.py` has its `Classifier`, the logits of its network in training; all else is here.
"""

import abc
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.objectives.classification import hits, sigmoid_cross_entropy, soft_labels, softmax_cross_entropy
from mmjax.training.ema import update_ema
from mmjax.training.method import Loss, Method
from mmjax.training.mixing import Mixing
from mmjax.training.rng import named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Means, Params, PRNGKeyArray

RGB: TypeAlias = tuple[float, float, float]
LABEL_SMOOTHING, MOMENTUM = "label_smoothing", "momentum"
"""Hyper-parameters: can be ablated without a recompile."""
AVERAGED = "averaged_stats"
"""In `Carry.extra`: the running average of batch statistics that belongs to the averaged parameters."""


class Classifier(Protocol):
    """A network with a head, as a pure function of its variables; implementations are frozen dataclasses."""

    def init(self, rng: PRNGKeyArray, pixels: Float[Array, "b height width 3"]) -> tuple[Params, Params]:
        """(parameters, batch statistics; {} where there are none); uses only the shape of `pixels`."""
        ...

    def logits(
        self,
        params: Params,
        stats: Params,
        pixels: Float[Array, "b height width 3"],
        *,
        train: bool,
        rng: PRNGKeyArray | None = None,
        bn_groups: int = 1,
        axis_name: str | None = None,
    ) -> tuple[Float[Array, "b classes"], Params]:
        """(float32 logits, statistics after this batch).

        train: with dropout, stochastic depth and the batch's own statistics; needs `rng`, the same on every device.
        bn_groups: parts of the global batch that are normalised separately.
        axis_name: the mapped axis over which the batch is cut.
        """
        ...


@dataclass(frozen=True)
class LinenClassifier(abc.ABC):
    """A `Classifier` around a module that is called as (pixels, train, bn_groups) and returns {"logits"}.
    The module may have "batch_stats"; it uses no random numbers."""

    @abc.abstractmethod
    def network(self, axis_name: str | None = None) -> nn.Module:
        """The module. axis_name: the mapped axis over which the batch is cut."""

    def init(self, rng: PRNGKeyArray, pixels: Float[Array, "b height width 3"]) -> tuple[Params, Params]:
        variables: Any = self.network().init(rng, jnp.zeros(pixels.shape, jnp.float32))
        return variables["params"], variables.get("batch_stats", {})

    def logits(
        self,
        params: Params,
        stats: Params,
        pixels: Float[Array, "b height width 3"],
        *,
        train: bool,
        rng: PRNGKeyArray | None = None,
        bn_groups: int = 1,
        axis_name: str | None = None,
    ) -> tuple[Float[Array, "b classes"], Params]:
        del rng
        variables = {"params": params} | ({"batch_stats": stats} if stats else {})
        result: Any = self.network(axis_name).apply(
            variables, pixels, train, bn_groups, mutable=["batch_stats"] if train else []
        )
        outputs, new = result
        return outputs["logits"], new.get("batch_stats", stats)


@dataclass(frozen=True)
class Classification(Method):
    """Batches are {"image": [b, height, width, 3], "label": int [b]}. Metrics: accuracy.

    A label outside [0, classes) makes the loss NaN, so that the step refuses the update; `check_labels` of
    mmjax.data.labels finds it before the run. With mixing, accuracy is of the larger share's label, on mixed images.

    hparams: label_smoothing and, where they are on, mixup, cutmix (alphas) and momentum (`weight_ema`).

    Attributes:
        classes: outputs of the classifier's head.
        objective: cross-entropy of a softmax over classes, or "sigmoid": a binary one of each class, summed over them
            (big_vision's ImageNet recipes).
        label_smoothing: share of each label that is spread evenly over all classes.
        mixing: mixup and CutMix, of normalised pixels.
        bn_groups: groups of batch normalisation.
        mean, std: of the channels in [0, 1]: uint8 images are normalised by them on the device. Floats count as
            normalised already, as views of `mmjax.training.augment` are.
        weight_ema: share of the averaged parameters that each step keeps; None: no averaging. The average is
            `state.ema`, that of the batch statistics `state.extra["averaged_stats"]`; see `variables`.
    """

    classifier: Classifier
    classes: int
    _: dataclasses.KW_ONLY
    objective: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0
    mixing: Mixing = dataclasses.field(default_factory=Mixing)
    bn_groups: int = 1
    mean: RGB | None = None
    std: RGB | None = None
    weight_ema: float | None = None

    def __post_init__(self) -> None:
        """Raises MmjaxError listing every field that is out of range."""
        wrong = []
        if self.classes < 1:
            wrong.append(f"classes={self.classes} (at least 1)")
        if self.objective not in ("softmax", "sigmoid"):
            wrong.append(f"objective={self.objective!r} (softmax or sigmoid)")
        if not 0 <= self.label_smoothing < 1:
            wrong.append(f"label_smoothing={self.label_smoothing} (from 0 to below 1)")
        if self.weight_ema is not None and not 0 <= self.weight_ema < 1:
            wrong.append(f"weight_ema={self.weight_ema} (from 0 to below 1, or None)")
        if (self.mean is None) != (self.std is None):
            wrong.append("mean and std come together")
        if wrong:
            raise MmjaxError("classification: " + "; ".join(wrong))

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Raises MmjaxError for a batch without "image" or "label", or a head with another number of classes."""
        shape = jax.eval_shape(self.pixels, _column(batch, "image")).shape
        _column(batch, "label")
        pixels = jnp.zeros((1, *shape[1:]), jnp.float32)
        params, stats = self.classifier.init(rng, pixels)
        outputs = jax.eval_shape(lambda: self.classifier.logits(params, stats, pixels, train=False)[0]).shape[-1]
        if outputs != self.classes:
            raise MmjaxError(f"classes={self.classes}: the classifier's head has {outputs}")
        hparams: dict[str, Any] = {LABEL_SMOOTHING: jnp.float32(self.label_smoothing), **self.mixing.hparams}
        ema: Params = {}
        extra: dict[str, Any] = {}
        if self.weight_ema is not None:
            hparams[MOMENTUM] = jnp.float32(self.weight_ema)
            # Copies: the state is donated, and one buffer cannot be donated twice.
            ema, extra = jax.tree.map(jnp.copy, (params, {AVERAGED: stats} if stats else {}))
        return params, Carry(ema, {}, stats, hparams, extra)

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        images, labels = self.pixels(_column(batch, "image")), _column(batch, "label")
        targets = labels
        if self.mixing:
            whole = soft_labels(labels, self.classes)
            images, targets = self.mixing(named(rng, "mixing"), images, whole, carry.hparams, axis_name)
        logits, stats = self.classifier.logits(
            params,
            carry.stats,
            images,
            train=True,
            rng=named(rng, "dropout"),
            bn_groups=self.bn_groups,
            axis_name=axis_name,
        )
        entropy = softmax_cross_entropy if self.objective == "softmax" else sigmoid_cross_entropy
        value = jnp.mean(entropy(logits, targets, carry.hparams[LABEL_SMOOTHING]))
        value = jnp.where(jnp.all((labels >= 0) & (labels < self.classes)), value, jnp.nan)
        accuracy = jnp.mean(hits(jax.lax.stop_gradient(logits), targets))
        extra = carry.extra
        if AVERAGED in extra:
            extra = {**extra, AVERAGED: _follow(extra[AVERAGED], stats, carry.hparams[MOMENTUM])}
        return value, (dataclasses.replace(carry, stats=stats, extra=extra), {"accuracy": accuracy})

    def pixels(self, images: Array) -> Float[Array, "b height width 3"]:
        """uint8 images -> normalised float32, floats as they are. Raises MmjaxError for uint8 without mean and std."""
        if images.dtype != jnp.uint8:
            return images
        if self.mean is None or self.std is None:
            raise MmjaxError("uint8 images need mean and std; floats are taken as normalised")
        return (images.astype(jnp.float32) / 255 - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def variables(self, state: Any) -> tuple[Params, Params]:
        """(parameters, batch statistics) of a TrainState to evaluate with: the averaged ones if there are any."""
        if self.weight_ema is None:
            return state.params, state.stats
        return state.ema, state.extra.get(AVERAGED, state.stats)

    def predict(self, params: Params, state: Any, images: Array) -> Float[Array, "b classes"]:
        """Logits in evaluation, an `mmjax.evaluation.features.Encode`: of the averaged variables if there are any.

        params: those of `state`; the protocols pass them separately.
        """
        averaged, stats = self.variables(state)
        chosen = params if self.weight_ema is None else averaged
        return self.classifier.logits(chosen, stats, self.pixels(images), train=False)[0]


def _follow(average: Params, stats: Params, momentum: Float[Array, ""]) -> Params:
    """The average after a step; counts of batches are copied."""
    moved = update_ema(average, stats, momentum)
    return jax.tree.map(
        lambda new, current: new if jnp.issubdtype(current.dtype, jnp.floating) else current, moved, dict(stats)
    )


def _column(batch: Batch, name: str) -> Array:
    if name not in batch:
        raise MmjaxError(f"classification wants batch[{name!r}]; the batch has {sorted(batch)}")
    return batch[name]
