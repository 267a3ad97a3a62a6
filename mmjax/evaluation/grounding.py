"""Visual grounding as ALBEF scores RefCOCO+: a heat map of an expression against a detector's boxes.

The predicted box is the proposal with the largest sum of the map over the square root of its area; it is right if its
intersection over union with the annotated box is at least a half. Boxes are (x, y, width, height) in pixels.
Source: salesforce/ALBEF, dataset/utils.py (grounding_eval, computeIoU).

    >>> print(f"{intersection_over_union((0, 0, 10, 10), (5, 0, 10, 10)):.3f}")
    0.333
    >>> box_scores(np.eye(4), (4, 4), np.array([[0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 2.0, 2.0]])).tolist()
    [1.0, 0.0]
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmjax.evaluation.features import finite
from mmjax.evaluation.heat_pictures import Box, grounding_picture
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score, clustered_proportion
from mmjax.nn.positions import resize_matrix
from mmjax.types import ArrayLike, Float, MmjaxError, Params, UInt8


@dataclasses.dataclass(frozen=True)
class Referred:
    """A referring expression of a test split. box: the annotated box. proposals: [k, 4], boxes to choose from.

    size: the image's (height, width). split: "val", "testA", "testB". image: its id; intervals resample images.
    """

    box: Box
    proposals: Float[np.ndarray, "k 4"]
    size: tuple[int, int]
    split: str
    image: int | str


def box_scores(
    heat: Float[ArrayLike, "rows columns"], size: tuple[int, int], boxes: Float[ArrayLike, "k 4"]
) -> Float[np.ndarray, " k"]:
    """The map's sum in each box over the square root of the box's area; the map is resized to `size` bicubically.

    Pixels int(y) to int(y + height), within the image. Torch's rule: a = -0.75, no antialiasing. The resized map never
    exists: its sums over a box are two weighted sums of the small map. float64.
    Raises MmjaxError for a map or boxes of another rank, or a box without an area.
    """
    small, proposed = np.asarray(heat, np.float64), np.asarray(boxes, np.float64)
    if small.ndim != 2 or proposed.ndim != 2 or proposed.shape[1:] != (4,):
        raise MmjaxError(
            f"heat {list(small.shape)} and boxes {list(proposed.shape)}: expected [rows, columns] and [k, 4]"
        )
    if not (proposed[:, 2:] > 0).all():
        raise MmjaxError(f"boxes: {proposed[(proposed[:, 2:] <= 0).any(1)][0].tolist()} has no area")
    x, y, width, height = proposed.T
    rows = _sums(small.shape[0], size[0], y, y + height)
    columns = _sums(small.shape[1], size[1], x, x + width)
    return np.einsum("kr,rc,kc->k", rows, small, columns) / np.sqrt(width * height)


def _sums(old: int, new: int, starts: np.ndarray, ends: np.ndarray) -> Float[np.ndarray, "k old"]:
    """The weight of each old point in the sum of the new points from start to end."""
    up_to = np.zeros((new + 1, old))
    np.cumsum(resize_matrix(old, new, "bicubic"), axis=0, dtype=np.float64, out=up_to[1:])
    first, last = (np.clip(edges.astype(int), 0, new) for edges in (starts, ends))
    return up_to[last] - up_to[first]


def resized(heat: Float[ArrayLike, "rows columns"], size: tuple[int, int]) -> Float[np.ndarray, "height width"]:
    """A map at the size (height, width) of its image, bicubic by torch's rule, scaled to [0, 1]; a flat map is zero."""
    rows, columns = (resize_matrix(old, new, "bicubic") for old, new in zip(np.shape(heat), size))
    large = np.matmul(np.matmul(rows, np.asarray(heat, np.float32)), columns.T)
    span = large.max() - large.min()
    return (large - large.min()) / span if span > 0 else np.zeros_like(large)


def densest_box(heat: Float[ArrayLike, "rows columns"], size: tuple[int, int]) -> Box:
    """The box of whole cells with the largest sum of the map over the square root of its area, where nobody proposes
    boxes: ALBEF's score, but of the map less its mean, so that a faint background does not count.

    size: (height, width) of the image that the box is in.
    """
    centred = np.asarray(heat, np.float64)
    centred = centred - centred.mean()
    (height, width), (n, m) = size, centred.shape
    sums = np.pad(centred.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    (top, bottom), (left, right) = (np.triu_indices(length + 1, 1) for length in (n, m))
    strips = sums[bottom] - sums[top]  # [pairs of rows, m + 1]
    scores = (strips[:, right] - strips[:, left]) / np.sqrt((bottom - top)[:, None] * (right - left)[None])
    row, column = np.unravel_index(np.argmax(scores), scores.shape)
    y, x = top[row] * height / n, left[column] * width / m
    return float(x), float(y), float(right[column] * width / m - x), float(bottom[row] * height / n - y)


def intersection_over_union(one: Box, other: Box) -> float:
    """Intersection over union of boxes whose last pixels are x + width - 1 and y + height - 1; 0 where they share at
    most one line of pixels."""
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right = min(one[0] + one[2] - 1, other[0] + other[2] - 1)
    bottom = min(one[1] + one[3] - 1, other[1] + other[3] - 1)
    shared = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0.0
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def chosen_boxes(
    heats: Float[ArrayLike, "n rows columns"], expressions: Sequence[Referred]
) -> tuple[list[Box | None], int]:
    """The predicted box of each expression, and the number of expressions for which no box scored above 0.

    Those reuse the previous expression's box, as in the original, which produced the published figures; None for the
    first ones.
    """
    boxes: list[Box | None] = []
    reused = 0
    for heat, expression in zip(np.asarray(heats), expressions):
        scores = box_scores(heat, expression.size, expression.proposals)
        best = int(np.argmax(scores)) if len(scores) else 0
        if len(scores) and scores[best] > 0:
            x, y, width, height = np.asarray(expression.proposals, np.float64)[best].tolist()
            boxes.append((x, y, width, height))
        else:
            boxes.append(boxes[-1] if boxes else None)
            reused += 1
    return boxes, reused


def grounding_scores(
    heats: Float[ArrayLike, "n rows columns"], expressions: Sequence[Referred]
) -> tuple[dict[str, Score], int]:
    """Accuracy of each split in percent, and the number of boxes reused from the previous expression.

    The original prints fractions, as val_d, testA_d and testB_d. Intervals resample images. Chance: a random proposal.
    Raises MmjaxError if maps and expressions differ in number, there are none, maps are not finite, or boxes invalid.
    """
    if not expressions or len(heats) != len(expressions):
        raise MmjaxError(f"{len(heats)} maps for {len(expressions)} expressions: expected one per expression")
    boxes, reused = chosen_boxes(finite("heats", np.asarray(heats)), expressions)
    right = np.array([box is not None and _right(box, e) for box, e in zip(boxes, expressions)])
    chances = np.array([np.mean([_right(tuple(box), e) for box in e.proposals] or [0.0]) for e in expressions])
    return _by_split(right, chances, expressions), reused


def pointing_scores(heats: Float[ArrayLike, "n rows columns"], expressions: Sequence[Referred]) -> dict[str, Score]:
    """The pointing game of each split, in percent: how often the map's maximum lies in the annotated box.

    The maximum is the centre of the hottest cell; proposals have no effect (Zhang et al. 2016, arXiv 1608.00507,
    without their tolerance of 15 pixels). Intervals resample images. Chance: a random point in the image.
    Raises MmjaxError as `grounding_scores` does.
    """
    maps = finite("heats", np.asarray(heats))
    if not expressions or len(maps) != len(expressions):
        raise MmjaxError(f"{len(maps)} maps for {len(expressions)} expressions: expected one per expression")
    rows, columns = maps.shape[1:]
    hits, chances = np.empty(len(maps), bool), np.empty(len(maps))
    for index, (heat, expression) in enumerate(zip(maps, expressions)):
        row, column = np.unravel_index(np.argmax(heat), heat.shape)
        (height, width), (x, y, box_width, box_height) = expression.size, expression.box
        left, top = (column + 0.5) * width / columns - x, (row + 0.5) * height / rows - y
        hits[index] = 0 <= left < box_width and 0 <= top < box_height
        chances[index] = box_width * box_height / (width * height)
    return _by_split(hits, chances, expressions)


def _by_split(right: np.ndarray, chances: np.ndarray, expressions: Sequence[Referred]) -> dict[str, Score]:
    scores = {}
    for split in dict.fromkeys(expression.split for expression in expressions):
        members = [index for index, expression in enumerate(expressions) if expression.split == split]
        _, images = np.unique([str(expressions[index].image) for index in members], return_inverse=True)
        chance = 100.0 * float(np.mean(chances[members]))
        scores[split] = clustered_proportion(np.bincount(images, right[members]), np.bincount(images), chance)
    return scores


def _right(box: Box, expression: Referred) -> bool:
    return intersection_over_union(box, expression.box) >= 0.5


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GroundingEvaluation(ScoredEvaluation):
    """`grounding_val`, `grounding_testA`, `grounding_testB`, and `grounding_reused`, how often no box scored above 0.

    Attributes:
        heats: (params, state) -> [n, rows, columns], a heat map for each expression.
        expressions: with the boxes proposed for their images.
        pointing: whether `grounding_pointing_val` ... are added, see `pointing_scores`.
        images, texts: of the first expressions, for the picture at the end; (): none. attribution: a line at its foot.
    """

    name: str = "grounding"
    heats: Callable[[Params, Any], ArrayLike]
    expressions: Sequence[Referred]
    pointing: bool = False
    images: Sequence[UInt8[np.ndarray, "height width 3"]] = ()
    texts: Sequence[str] = ()
    attribution: str | None = None

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        heats = self.heats(params, state)
        scores, reused = grounding_scores(heats, self.expressions)
        named = {f"{self.name}_{split}": score for split, score in scores.items()}
        if self.pointing:
            points = pointing_scores(heats, self.expressions)
            named |= {f"{self.name}_pointing_{split}": score for split, score in points.items()}
        counts = {f"{self.name}_n": len(self.expressions), f"{self.name}_reused": reused}
        return Outcome(named, counts, self._pictures(heats) if pictures and self.images else {})

    def _pictures(self, heats: ArrayLike) -> dict[str, np.ndarray]:
        shown = self.expressions[: len(self.images)]
        maps = np.asarray(heats)[: len(shown)]
        large = [resized(heat, expression.size) for heat, expression in zip(maps, shown)]
        boxes = [expression.box for expression in shown]
        predicted = chosen_boxes(maps, shown)[0]
        picture = grounding_picture(self.images, large, self.texts, boxes, predicted, self.attribution)
        return {f"{self.name}_examples": picture}
