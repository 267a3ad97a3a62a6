"""Training of a detector as FCOS: which point is for which box, three losses, and the best boxes of an image."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.channels import IMAGENET_MEAN, IMAGENET_STD
from mmjax.errors import MmjaxError
from mmjax.models.dense.detector import DetectionConfig, DetectionHead, Detector
from mmjax.models.dense.frozen import MAPS, in_dtype, unflattened
from mmjax.objectives.detection import centre_ness, generalised_iou, sigmoid_focal
from mmjax.training.classification import RGB
from mmjax.training.method import Loss, Method, loss_terms
from mmjax.training.state import Carry
from mmjax.types import Array, ArrayLike, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray

RADIUS = 1.5
"""Points within so many strides of a box's centre, along each axis, are trained for it (FCOS's centre sampling)."""
CANDIDATES = 200
"""Boxes of an image that are passed on to non-maximum suppression."""


def assign(
    outputs: dict[str, Array], boxes: Float[Array, "b m 4"], labels: Int[Array, "b m"]
) -> tuple[Int[Array, "b L"], Float[Array, "b L 4"]]:
    """(the class that each point is trained for, or -1; the distances to the sides of its box).

    A point is for a box that it is inside, near the centre of, and whose farthest side is in the range of its level;
    of several it is for the smallest. boxes: x, y, width, height; a negative label: no box.
    """
    xy, strides, sizes = outputs["xy"], outputs["strides"], outputs["sizes"]
    offset = xy[None, :, None] - boxes[:, None, :, :2]  # [b, L, m, 2], from the upper left corner
    extent = boxes[:, None, :, 2:]
    distances = jnp.concatenate([offset, extent - offset], -1)
    near = (jnp.abs(offset - extent / 2) < RADIUS * strides[None, :, None, None]).all(-1)
    farthest = distances.max(-1)
    fits = (farthest > sizes[None, :, None, 0]) & (farthest <= sizes[None, :, None, 1])
    valid = near & fits & (distances.min(-1) > 0) & (labels >= 0)[:, None]
    area = jnp.where(valid, extent.prod(-1), jnp.inf)
    best = area.argmin(-1)
    label = jnp.take_along_axis(labels[:, None], best[..., None], -1)[..., 0]
    chosen = jnp.take_along_axis(distances, best[..., None, None], 2)[:, :, 0]
    return jnp.where(valid.any(-1), label, -1), chosen


@dataclasses.dataclass(frozen=True)
class Detection(Method):
    """Batches are {"image": uint8 [b, height, width, 3], "boxes": float32 [b, m, 4], "labels": int [b, m]}.

    With the column "maps" (`mmjax.models.dense.frozen`), only the head is computed; the encoder is then frozen. Boxes
    are x, y, width, height in pixels of the image; rows with a negative label are no box. Losses, as FCOS's: "class",
    focal; "box", 1 - generalised IoU, weighted by the centre-ness; "centre", its cross-entropy. Each is a sum over
    points, divided by the number of points with a box (of their weights); an image counts as one point at least, so
    that the division never fails. A label past the classes makes the loss NaN, so that the step refuses it. Metrics:
    accuracy, the share of those points whose most probable class is their box's.

    Attributes: mean, std, stored_statistics, bn_groups: as of `Segmentation`.
    """

    config: DetectionConfig
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD
    stored_statistics: bool = True
    bn_groups: int = 1

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Raises MmjaxError for a batch without "image", "boxes" or "labels"."""
        missing = [name for name in ("image", "boxes", "labels") if name not in batch]
        if missing:
            raise MmjaxError(f"detection needs batch[{missing[0]!r}]; the batch has {sorted(batch)}")
        variables: Any = Detector(self.config).init(rng, jnp.zeros((1, *batch["image"].shape[1:]), jnp.float32))
        return variables["params"], Carry({}, {}, variables.get("batch_stats", {}), {})

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        outputs, stats = self._outputs(params, carry.stats, batch, rng, axis_name)
        labels, distances = assign(outputs, batch["boxes"], batch["labels"])
        terms = loss_terms(self._losses(outputs, labels, distances))
        known = jnp.all(batch["labels"] < self.config.classes)
        terms = {name: Mean(jnp.where(known, term.total, jnp.nan), term.count) for name, term in terms.items()}
        right = jax.lax.stop_gradient(outputs["logits"]).argmax(-1) == labels
        accuracy = Mean.of(1.0 * right, labels >= 0)
        return dict(terms), (dataclasses.replace(carry, stats=stats), {"accuracy": accuracy})

    def _outputs(
        self, params: Params, stats: Params, batch: Batch, rng: PRNGKeyArray, axis_name: str | None
    ) -> tuple[dict[str, Array], Params]:
        """(outputs in training, statistics after this batch)."""
        c, images = self.config, batch["image"]
        if MAPS in batch:
            maps = unflattened(in_dtype(c), batch[MAPS], *images.shape[1:3])
            outputs: Any = DetectionHead(c, name="head").apply({"params": params["head"]}, maps)
            return outputs, stats
        variables = {"params": params} | ({"batch_stats": stats} if stats else {})
        trained = not self.stored_statistics
        result: Any = Detector(c, axis_name).apply(
            variables,
            self.pixels(images),
            trained,
            self.bn_groups,
            rngs={"dropout": rng},
            mutable=["batch_stats"] if trained else [],
        )
        return result[0], result[1].get("batch_stats", stats)

    def _losses(self, outputs: dict[str, Array], labels: Int[Array, "b L"], distances: Float[Array, "b L 4"]) -> Means:
        positive = labels >= 0
        weights = jnp.where(positive, centre_ness(distances), 0.0)
        targets = jax.nn.one_hot(labels, self.config.classes)
        classes = sigmoid_focal(outputs["logits"], targets).sum()
        overlap = generalised_iou(outputs["distances"], jnp.where(positive[..., None], distances, 1.0))
        centre = outputs["centre"]
        entropy = jax.nn.softplus(centre) - weights * centre
        points = jnp.maximum(positive.sum(1), 1).sum().astype(jnp.float32)
        total_weight = jnp.maximum(weights.sum(1), 1e-3).sum()
        return {
            "class": Mean(classes, points),
            "box": Mean(((1 - overlap) * weights).sum(), jax.lax.stop_gradient(total_weight)),
            "centre": Mean(jnp.where(positive, entropy, 0.0).sum(), points),
        }

    def pixels(self, images: ArrayLike) -> Float[Array, "b height width 3"]:
        """uint8 images -> normalised float32; floats count as normalised already."""
        if images.dtype != jnp.uint8:
            return jnp.asarray(images)
        return (jnp.asarray(images, jnp.float32) / 255 - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def predict(self, params: Params, state: Any, images: ArrayLike) -> dict[str, Array]:
        """`candidates` of uint8 images. state: a TrainState, for its statistics."""
        variables = {"params": params} | ({"batch_stats": state.stats} if state.stats else {})
        outputs: Any = Detector(self.config).apply(variables, self.pixels(images))
        return candidates(outputs, images.shape[1], images.shape[2])


def candidates(outputs: dict[str, Array], height: int, width: int) -> dict[str, Array]:
    """The CANDIDATES best boxes of each image before suppression: boxes [b, k, 4] (x, y, width, height, inside the
    image), scores [b, k] in [0, 1] (root of class probability times centre-ness, falling), labels int32 [b, k]."""
    scores = jnp.sqrt(jax.nn.sigmoid(outputs["logits"]) * jax.nn.sigmoid(outputs["centre"])[..., None])
    b, count, classes = scores.shape
    best, index = jax.lax.top_k(scores.reshape(b, -1), min(CANDIDATES, count * classes))
    point = index // classes
    distances = jnp.take_along_axis(outputs["distances"], point[..., None], 1)
    xy, limit = outputs["xy"][point], jnp.array([width, height], jnp.float32)
    low = jnp.clip(xy - distances[..., :2], 0, limit)
    high = jnp.clip(xy + distances[..., 2:], 0, limit)
    return {
        "boxes": jnp.concatenate([low, high - low], -1),
        "scores": best,
        "labels": (index % classes).astype(jnp.int32),
    }
