"""Segmentation: the mean over classes of intersection over union (mIoU), and the share of right pixels.

>>> truth, predicted = np.array([[0, 0, 1, 255]]), np.array([[0, 1, 1, 1]])
>>> counts = class_counts(truth[None], predicted[None], classes=3)
>>> print(f"{mean_iou(counts.sum(0)):.1f}")  # class 2 is nowhere; classes 0 and 1 have 1/2 each
50.0
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mmjax.data.masks import IGNORED, palette
from mmjax.data.pipeline import Pipeline, batches
from mmjax.evaluation.bootstrap import bootstrap_interval
from mmjax.evaluation.pictures import segmentation_picture
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score
from mmjax.types import Array, ArrayLike, Float, Int, MmjaxError, Params

Predict = Callable[[Params, Any, ArrayLike], Array]
"""(params, state, uint8 images [b, height, width, 3]) -> the class of each pixel, int32; pure."""
EXAMPLES = 6
"""Images in the picture."""
LISTED = 20
"""The maximum of classes whose intersection over union is a score of its own."""


def class_counts(
    truth: Int[np.ndarray, "n height width"], predicted: Int[np.ndarray, "n height width"], classes: int
) -> Int[np.ndarray, "n 3 c"]:
    """Pixels of each class that are right, that are of the class, and that are predicted, an image each.

    Pixels of value IGNORED in `truth` do not count. Raises MmjaxError for other shapes or values.
    """
    if truth.shape != predicted.shape or truth.ndim != 3:
        raise MmjaxError(
            f"truth {list(truth.shape)} and predicted {list(predicted.shape)}: expected [n, height, width]"
        )
    counted = truth != IGNORED
    for name, values in (("truth", truth[counted]), ("predicted", predicted[counted])):
        if values.size and not 0 <= values.min() <= values.max() < classes:
            raise MmjaxError(f"{name}: classes from {values.min()} to {values.max()}, not below {classes}")
    counts = np.zeros((len(truth), 3, classes), np.int64)
    for row, true, guess, use in zip(counts, truth, predicted, counted):
        true, guess = true[use], guess[use]
        for k, values in enumerate((true[true == guess], true, guess)):
            row[k] = np.bincount(values, minlength=classes)
    return counts


def class_ious(counts: Float[np.ndarray, "*n 3 c"]) -> Float[np.ndarray, "*n c"]:
    """Intersection over union in percent; NaN for a class that neither occurs nor is predicted."""
    right, true, predicted = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    union = true + predicted - right
    return np.where(union > 0, 100.0 * right / np.maximum(union, 1), np.nan)


def mean_iou(counts: Float[np.ndarray, "*n 3 c"]) -> Float[np.ndarray, "*n"]:
    """The mean over the classes that occur or are predicted, in percent: of the whole set's counts, not of images."""
    return np.nanmean(class_ious(counts), -1)


def miou_score(counts: Int[np.ndarray, "n 3 c"]) -> Score:
    """`mean_iou` of all images, with an interval that resamples them; chance is the most common class everywhere."""
    total = counts.sum(0)[1]
    return _score(counts, mean_iou, 100.0 * total.max() / total.sum() / int((total > 0).sum()))


def _score(counts: Int[np.ndarray, "n 3 c"], metric: Callable[[np.ndarray], np.ndarray], chance: float | None) -> Score:
    n, _, classes = counts.shape
    low, high = bootstrap_interval(
        counts.reshape(n, -1), lambda sums: metric(sums.reshape(*sums.shape[:-1], 3, classes))
    )
    return Score(float(metric(counts.sum(0))), n, low, high, chance)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SegmentationEvaluation(ScoredEvaluation):
    """`<name>_mIoU`, `<name>_accuracy` (of pixels) and, of at most 20 classes, `<name>_IoU/<class>`.

    Intervals resample images. Chance is that of the most common class everywhere. Masks are at the size of the
    network's images. A picture at the end: images, truth, prediction.

    Attributes:
        predict: see `Predict`.
        data: batches {"image": uint8 [b, height, width, 3], "mask": uint8 [b, height, width]}.
        class_names: of the values.
        attribution: a line at the foot of the picture.
    """

    name: str = "segmentation"
    predict: Predict
    data: Pipeline
    class_names: Sequence[str]
    attribution: str | None = None

    @functools.cached_property
    def _compiled(self) -> Predict:
        return jax.jit(self.predict)

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        classes = len(self.class_names)
        parts, examples = [], []
        for images, truth, predicted in self._predictions(params, state):
            parts.append(class_counts(truth, predicted, classes))
            if len(examples) < EXAMPLES:
                examples += list(zip(images, truth, predicted))
        counts = np.concatenate(parts)
        figures = {}
        if pictures:
            figures[self.name] = segmentation_picture(
                examples[:EXAMPLES], self.class_names, palette(256), self.attribution
            )
        return Outcome(self._scores(counts), {f"{self.name}_n": len(counts)}, figures)

    def _predictions(self, params: Params, state: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(images, masks, predictions) of every record once; the last batch is padded for the device."""
        size = min(self.data.batch_size, len(self.data.source))
        once = self.data.replace(shuffle=False, epochs=1, drop_remainder=False, batch_size=size)
        visited: set[int] = set()
        for batch in batches(once):
            images = batch["image"]
            padded = np.concatenate([images, np.repeat(images[:1], size - len(images), 0)])
            predicted = np.asarray(self._compiled(params, state, padded))[: len(images)]
            # A record that replaces an unreadable one does not count twice.
            new = [i for i, index in enumerate(batch["index"].tolist()) if index not in visited]
            visited.update(batch["index"].tolist())
            yield images[new], batch["mask"][new], predicted[new]

    def _scores(self, counts: Int[np.ndarray, "n 3 c"]) -> dict[str, Score]:
        total, classes = counts.sum(0), counts.shape[-1]
        pixels = total[1].sum()
        if not pixels:
            raise MmjaxError(f"{self.name}: no pixel of {self.data.source.name} has a class")

        scores = {
            f"{self.name}_mIoU": miou_score(counts),
            f"{self.name}_accuracy": _score(
                counts, lambda c: 100.0 * c[..., 0, :].sum(-1) / c[..., 1, :].sum(-1), 100.0 * total[1].max() / pixels
            ),
        }
        if classes <= LISTED:
            for k, name in enumerate(self.class_names):
                if total[1:, k].any():
                    # A resample may lack the class; its interval is then over the others.
                    scores[f"{self.name}_IoU/{name}"] = _score(counts, lambda c, k=k: class_ious(c)[..., k], None)
        return scores
