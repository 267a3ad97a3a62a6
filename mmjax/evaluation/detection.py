"""Detection: non-maximum suppression, and average precision (AP) as COCO defines it, by pycocotools.

>>> boxes = np.array([[0, 0, 10, 10], [1, 0, 10, 10], [20, 0, 5, 5]], np.float32)
>>> suppressed(boxes, np.array([0.9, 0.8, 0.3]), np.array([0, 0, 0])).tolist()  # the second overlaps the first
[0, 2]
"""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmjax.data.pipeline import Pipeline, batches
from mmjax.evaluation.pictures import detection_picture
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score
from mmjax.types import Array, ArrayLike, Float, Int, MmjaxError, Params

Predict = Callable[[Params, Any, ArrayLike], Mapping[str, Array]]
"""(params, state, uint8 images) -> {"boxes": [b, k, 4], "scores": [b, k], "labels": [b, k]}, the best first; pure."""
OVERLAP = 0.6
"""FCOS's threshold of suppression."""
MOST = 100
"""Boxes of an image that COCO counts."""
EXAMPLES = 6
PICTURE_THRESHOLD = 0.5
"""The score from which a box is in the picture."""
SUMMARY = {"AP": 0, "AP50": 1, "AP75": 2, "AR100": 8}
"""name -> its index in COCOeval.stats."""


def box_overlaps(first: Float[np.ndarray, "n 4"], second: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Intersection over union of boxes x, y, width, height; 0 for boxes without an area."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum((first[:, :2] + first[:, 2:])[:, None], (second[:, :2] + second[:, 2:])[None])
    both = np.clip(high - low, 0, None).prod(-1)
    union = first[:, 2:].prod(-1)[:, None] + second[:, 2:].prod(-1)[None] - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def suppressed(
    boxes: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    overlap: float = OVERLAP,
    most: int = MOST,
) -> Int[np.ndarray, " k"]:
    """Indices of the boxes that stay, the best first: a box goes that overlaps a better one of its class by more."""
    order = np.argsort(-scores, kind="stable")
    over = (box_overlaps(boxes[order], boxes[order]) > overlap) & (labels[order][:, None] == labels[order])
    stays: list[int] = []
    gone = np.zeros(len(order), bool)
    for i in range(len(order)):
        if gone[i]:
            continue
        stays.append(i)
        if len(stays) == most:
            break
        gone |= over[i]
    return order[stays]


def average_precision(
    ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], dict[int, float]]:
    """({"AP", "AP50", "AP75", "AR100"} in percent, AP by category id), of COCO's boxes.

    ground_truth: the content of a COCO file. detections: {"image_id", "category_id", "bbox", "score"} each.
    Raises MmjaxError when pycocotools is missing.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MmjaxError('average precision needs pycocotools: pip install "mmjax[detection]"') from error
    ids = [category["id"] for category in ground_truth["categories"]]
    if not detections:
        return dict.fromkeys(SUMMARY, 0.0), dict.fromkeys(ids, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        truth: Any = COCO()
        truth.dataset = {"info": {}} | dict(ground_truth)
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(list(detections)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = judge.eval["precision"][..., 0, 2]  # [thresholds, recalls, categories]; -1 where there is no box
    by_category = {}
    for k, category in enumerate(judge.params.catIds):
        counted = precision[..., k][precision[..., k] > -1]
        by_category[int(category)] = 100.0 * float(counted.mean()) if counted.size else float("nan")
    return {name: 100.0 * max(float(judge.stats[i]), 0.0) for name, i in SUMMARY.items()}, by_category


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DetectionEvaluation(ScoredEvaluation):
    """`<name>_AP`, `_AP50`, `_AP75`, `_AR100` and, of at most 20 classes, `<name>_AP/<class>`; in percent.

    A picture at the end: images with true and predicted boxes.

    Attributes:
        predict: see `Predict`.
        data: batches {"image": uint8 [b, side, side, 3], "boxes", "labels", "index"} of whole images, squashed.
        ground_truth: as in a COCO file; its images are the records of the pipeline's source, in their order, and its
            categories are the classes, in their order.
        attribution: a line at the foot of the picture.
    """

    name: str = "detection"
    predict: Predict
    data: Pipeline
    ground_truth: Mapping[str, Any]
    attribution: str | None = None

    @functools.cached_property
    def _compiled(self) -> Predict:
        return jax.jit(self.predict)

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        images, categories = self.ground_truth["images"], self.ground_truth["categories"]
        detections: list[dict[str, Any]] = []
        examples: list[Any] = []
        visited: list[int] = []
        for index, image, truth, boxes, scores, labels in self._predictions(params, state):
            scale = np.array([images[index]["width"], images[index]["height"]] * 2) / np.array(
                [*image.shape[1::-1]] * 2
            )
            for box, score, label in zip((boxes * scale).tolist(), scores.tolist(), labels.tolist()):
                detection = {"image_id": images[index]["id"], "category_id": categories[label]["id"]}
                detections.append(detection | {"bbox": box, "score": score})
            if len(examples) < EXAMPLES:
                sure = scores >= PICTURE_THRESHOLD
                examples.append((image, truth, (boxes[sure], labels[sure])))
            visited.append(index)
        ids = {images[i]["id"] for i in visited}
        truth = dict(self.ground_truth)
        truth["images"] = [images[i] for i in sorted(visited)]
        truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in ids]
        overall, by_category = average_precision(truth, detections)
        scores = {f"{self.name}_{name}": Score(value, len(visited)) for name, value in overall.items()}
        if len(categories) <= 20:
            values = {category["name"]: by_category[category["id"]] for category in categories}
            scores |= {f"{self.name}_AP/{k}": Score(v, len(visited)) for k, v in values.items() if not np.isnan(v)}
        figures = {}
        if pictures:
            names = [category["name"] for category in categories]
            figures[self.name] = detection_picture(examples, names, self.attribution)
        return Outcome(scores, {f"{self.name}_n": len(visited)}, figures)

    def _predictions(self, params: Params, state: Any) -> Iterator[tuple[int, np.ndarray, Any, Any, Any, Any]]:
        """(index, image, (true boxes, labels), boxes, scores, labels) of every readable record once."""
        size = min(self.data.batch_size, len(self.data.source))
        once = self.data.replace(shuffle=False, epochs=1, drop_remainder=False, batch_size=size)
        visited: set[int] = set()
        for batch in batches(once):
            images = batch["image"]
            padded = np.concatenate([images, np.repeat(images[:1], size - len(images), 0)])
            outputs = {name: np.asarray(value) for name, value in self._compiled(params, state, padded).items()}
            for i, index in enumerate(batch["index"].tolist()):
                if index in visited:  # a record that replaces an unreadable one
                    continue
                visited.add(index)
                boxes, scores, labels = (outputs[name][i] for name in ("boxes", "scores", "labels"))
                stays = suppressed(boxes, scores, labels)
                present = batch["labels"][i] >= 0
                truth = batch["boxes"][i][present], batch["labels"][i][present]
                yield index, images[i], truth, boxes[stays], scores[stays], labels[stays]
