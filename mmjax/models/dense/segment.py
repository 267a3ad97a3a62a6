"""Training of a segmentation network: cross-entropy of every pixel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.channels import IMAGENET_MEAN, IMAGENET_STD
from mmjax.data.masks import IGNORED
from mmjax.errors import MmjaxError
from mmjax.models.dense.frozen import MAPS, in_dtype, unflattened
from mmjax.models.dense.network import SegmentationConfig, Segmenter, head_of
from mmjax.models.dense.pyramid import resized
from mmjax.objectives.classification import softmax_cross_entropy
from mmjax.training.classification import RGB
from mmjax.training.method import Loss, Method
from mmjax.training.rng import named
from mmjax.training.state import Carry
from mmjax.types import Array, ArrayLike, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Segmentation(Method):
    """Batches are {"image": uint8 [b, height, width, 3], "mask": uint8 [b, height, width]}. Metrics: pixels' accuracy.

    With the column "maps" (`mmjax.models.dense.frozen`), only the head is computed; the encoder is then frozen. Pixels
    of value 255 do not count. Another value that is no class makes the loss NaN, so that the step refuses it.

    Attributes:
        mean, std: of the channels in [0, 1].
        stored_statistics: the encoder runs in evaluation mode, as where it is frozen: batch normalisation with the
            stored statistics, no dropout.
        bn_groups: groups of batch normalisation.
    """

    config: SegmentationConfig
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD
    stored_statistics: bool = True
    bn_groups: int = 1

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Raises MmjaxError for a batch without "image" or "mask", or of different sizes."""
        image, mask = _column(batch, "image"), _column(batch, "mask")
        if image.shape[:3] != mask.shape:
            raise MmjaxError(f"segmentation: images {list(image.shape)} and masks {list(mask.shape)} have other sizes")
        variables: Any = Segmenter(self.config).init(rng, jnp.zeros((1, *image.shape[1:]), jnp.float32))
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
        logits, stats = self._logits(params, carry.stats, batch, named(rng, "dropout"), axis_name)
        mask = _column(batch, "mask").astype(jnp.int32)
        counted = mask != IGNORED
        labels = jnp.where(counted, mask, 0)
        entropies = softmax_cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.ravel())
        value = Mean.of(entropies, counted.ravel())
        value = Mean(jnp.where(jnp.all(labels < self.config.classes), value.total, jnp.nan), value.count)
        right = jax.lax.stop_gradient(logits).argmax(-1) == labels
        return value, (dataclasses.replace(carry, stats=stats), {"accuracy": Mean.of(1.0 * right, counted)})

    def _logits(
        self, params: Params, stats: Params, batch: Batch, rng: PRNGKeyArray, axis_name: str | None
    ) -> tuple[Float[Array, "b height width c"], Params]:
        """(logits in training, statistics after this batch)."""
        c, images, rngs = self.config, _column(batch, "image"), {"dropout": rng}
        if MAPS in batch:
            maps = unflattened(in_dtype(c), batch[MAPS], *images.shape[1:3])
            logits: Any = head_of(c, axis_name).apply({"params": params["head"]}, maps, True, rngs=rngs)
            return resized(logits, *images.shape[1:3]), stats
        variables = {"params": params} | ({"batch_stats": stats} if stats else {})
        trained = not self.stored_statistics
        result: Any = Segmenter(c, axis_name).apply(
            variables,
            self.pixels(images),
            True,
            trained,
            self.bn_groups,
            rngs=rngs,
            mutable=["batch_stats"] if trained else [],
        )
        return result[0], result[1].get("batch_stats", stats)

    def pixels(self, images: ArrayLike) -> Float[Array, "b height width 3"]:
        """uint8 images -> normalised float32; floats count as normalised already."""
        if images.dtype != jnp.uint8:
            return jnp.asarray(images)
        return (jnp.asarray(images, jnp.float32) / 255 - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def predict(self, params: Params, state: Any, images: ArrayLike) -> Int[Array, "b height width"]:
        """The most probable class of each pixel, int32. images: uint8. state: a TrainState, for its statistics."""
        variables = {"params": params} | ({"batch_stats": state.stats} if state.stats else {})
        logits: Any = Segmenter(self.config).apply(variables, self.pixels(images))
        return logits.argmax(-1).astype(jnp.int32)


def _column(batch: Batch, name: str) -> Array:
    if name not in batch:
        raise MmjaxError(f"segmentation needs batch[{name!r}]; the batch has {sorted(batch)}")
    return batch[name]
