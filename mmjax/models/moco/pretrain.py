"""MoCo's training: contrast with a queue (v1, v2) or within the batch (v3).

Statistics. `carry.stats` has "query" and "key", each moved by its own forward pass and by nothing else. Where batch
normalisation has groups, running statistics move by the mean over groups; the originals keep those of device 0.

ShuffleBN. The key images of the global batch are permuted, encoded in `bn_groups` groups, and put back in order, so a
query and its key are never normalised together. The permutation comes from the step's key alone: one device with 8
groups, 8 devices with one each and a mesh compute the same.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mmjax.errors import MmjaxError
from mmjax.models.moco.network import MoCo, MoCoConfig
from mmjax.nn.norm import l2_normalize
from mmjax.objectives.contrastive import in_batch_accuracy, in_batch_nce, info_nce, info_nce_logits
from mmjax.training.method import Loss, Method
from mmjax.training.queue import create_queue, enqueue
from mmjax.training.rng import named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Means, Params, PRNGKeyArray

MOMENTUM = ("backbone", "projector")
"""The parts that have a momentum copy."""


@struct.dataclass
class Probe:
    """Some images of the last batch and their keys at that step: they measure the drift of the key encoder."""

    images: Float[Array, "p height width 3"]
    keys: Float[Array, "p d"]


@dataclass(frozen=True)
class MoCoMethod(Method):
    """Batches are {"view_1", "view_2"}: float32 [b, height, width, 3], normalised.

    hparams: momentum, temperature. Metrics: contrastive_accuracy, feature_std (of unit queries, times sqrt(dim): 1 for
    features spread over the sphere, 0 when they have collapsed), and with `drift_rows` key_drift: 1 - cosine between
    the keys of the last batch's first images by the momentum encoder of that step and of this one.

    Attributes:
        bn_groups: groups of batch normalisation (v1, v2: one a GPU of the original, 8; v3: 1).
        drift_rows: images that key_drift is measured on; each step encodes twice as many more. 0: no key_drift.
        cosine_steps: v3: momentum rises from its first value to 1 over this many steps; 0: it is constant.
        blocks: parts in which the logits are computed, for large batches.
    """

    config: MoCoConfig
    bn_groups: int = 1
    drift_rows: int = 0
    cosine_steps: int = 0
    blocks: int = 1

    def network(self, axis_name: str | None = None) -> MoCo:
        return MoCo(self.config, axis_name)

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Raises MmjaxError if the queue's length is not a multiple of the batch, or a view is missing."""
        images = jnp.zeros(_view(batch, "view_1").shape, jnp.float32)
        variables = self.network().init(named(rng, "params"), images[:1])
        params, stats = variables["params"], variables.get("batch_stats") or {}
        ema = {part: params[part] for part in MOMENTUM}
        queues: dict[str, Any] = {}
        if self.config.queue:
            queues["keys"] = create_queue(named(rng, "queue"), self.config.queue, self.config.dim, len(images))
        rows = min(self.drift_rows, len(images))
        extra = {"probe": Probe(images[:rows], jnp.zeros((rows, self.config.dim)))} if rows else {}
        # Copies: the state is donated, and one buffer cannot be donated twice.
        stats_by_encoder = {
            "query": stats,
            "key": jax.tree.map(jnp.copy, {k: v for k, v in stats.items() if k in MOMENTUM}),
        }
        hparams = {"momentum": self.config.momentum, "temperature": self.config.temperature}
        return params, Carry(
            ema, queues, stats_by_encoder, {name: jnp.float32(value) for name, value in hparams.items()}, extra
        )

    def momentum(self, hparams: dict[str, Float[Array, ""]], step: Int[Array, ""]) -> Float[Array, ""]:
        """Constant; in v3 half a cosine up to 1 (moco-v3 main_moco.py, adjust_moco_momentum)."""
        if not self.cosine_steps:
            return hparams["momentum"]
        progress = jnp.asarray(step, jnp.float32) / self.cosine_steps
        return 1 - 0.5 * (1 + jnp.cos(jnp.pi * progress)) * (1 - hparams["momentum"])

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        contrast = self._symmetric if self.config.version == 3 else self._with_queue
        views = _view(batch, "view_1"), _view(batch, "view_2")
        value, stats, queues, metrics = contrast(params, carry, views, rng, axis_name)
        extra = carry.extra
        if self.drift_rows:
            probe, metrics["key_drift"] = self._drift(carry, views[-1], axis_name)
            extra = {"probe": probe}
        return value, (dataclasses.replace(carry, stats=stats, queues=queues, extra=extra), metrics)

    def encode(
        self, params: Params, stats: Params, images: Array, axis_name: str | None, query: bool
    ) -> tuple[Float[Array, "b d"], Params]:
        """(unit vectors, statistics after this batch), in training mode."""
        variables = {"params": params} | ({"batch_stats": stats} if stats else {})
        outputs, new = self.network(axis_name).apply(
            variables, images, True, self.bn_groups, query, mutable=["batch_stats"]
        )
        name = "prediction" if query and self.config.version == 3 else "embedding"
        return l2_normalize(outputs[name]), new.get("batch_stats") or {}

    # ------------------------------------------------------------------------------------------------------- v1, v2

    def _with_queue(self, params: Params, carry: Carry, views: Any, rng: Array, axis_name: str | None) -> Any:
        """moco builder.py:138-184. The negatives are the queue before this batch's keys are added."""
        queue, temperature = carry.queues["keys"], carry.hparams["temperature"]
        q, query_stats = self.encode(params, carry.stats["query"], views[0], axis_name, query=True)
        keys, key_stats = self._shuffled_keys(carry, views[1], rng, axis_name)
        positives = keys if axis_name is None else _local_part(keys, len(q), axis_name)
        value = info_nce(q, positives, queue.keys, temperature, self.blocks)
        logits = info_nce_logits(jax.lax.stop_gradient(q), positives, queue.keys, 1.0)
        hit = jnp.mean(logits[:, 0] > jnp.max(logits[:, 1:], 1))
        metrics = {"contrastive_accuracy": hit, "feature_std": feature_std(q, axis_name)}
        return value, {"query": query_stats, "key": key_stats}, {"keys": enqueue(queue, keys)}, metrics

    def _shuffled_keys(self, carry: Carry, images: Array, rng: Array, axis_name: str | None) -> tuple[Array, Params]:
        """Keys [global b, d] in the order of the global batch, and the key encoder's statistics."""
        if self.bn_groups > 1:
            everything = images if axis_name is None else jax.lax.all_gather(images, axis_name, tiled=True)
            order = jax.random.permutation(named(rng, "shuffle"), len(everything))
            local_order = order if axis_name is None else _local_part(order, len(images), axis_name)
            images = everything[local_order]
        keys, stats = self.encode(jax.lax.stop_gradient(carry.ema), carry.stats["key"], images, axis_name, query=False)
        if axis_name is not None:
            keys = jax.lax.all_gather(keys, axis_name, tiled=True)
        if self.bn_groups > 1:
            keys = jnp.zeros_like(keys).at[order].set(keys)
        return jax.lax.stop_gradient(keys), stats

    # ----------------------------------------------------------------------------------------------------------- v3

    def _symmetric(self, params: Params, carry: Carry, views: Any, rng: Array, axis_name: str | None) -> Any:
        """moco-v3 builder.py:57-96: each view's predictions against the other's keys, times 2 T; the two views are
        two passes, whose statistics never mix."""
        temperature, ema = carry.hparams["temperature"], jax.lax.stop_gradient(carry.ema)
        query_stats, key_stats = carry.stats["query"], carry.stats["key"]
        q1, query_stats = self.encode(params, query_stats, views[0], axis_name, query=True)
        q2, query_stats = self.encode(params, query_stats, views[1], axis_name, query=True)
        k1, key_stats = self.encode(ema, key_stats, views[0], axis_name, query=False)
        k2, key_stats = self.encode(ema, key_stats, views[1], axis_name, query=False)
        k1, k2 = jax.lax.stop_gradient((k1, k2))
        pair = [in_batch_nce(q, k, temperature, axis_name, self.blocks) for q, k in ((q1, k2), (q2, k1))]
        hit = in_batch_accuracy(q1, k2, axis_name, self.blocks)
        metrics = {"contrastive_accuracy": hit, "feature_std": feature_std(q1, axis_name)}
        return 2 * temperature * (pair[0] + pair[1]), {"query": query_stats, "key": key_stats}, {}, metrics

    # --------------------------------------------------------------------------------------------------------- drift

    def _drift(self, carry: Carry, images: Array, axis_name: str | None) -> tuple[Probe, Float[Array, ""]]:
        """The probe for the next step, and key_drift from the last one (0 in the first step)."""
        previous, ema, rows = carry.extra["probe"], jax.lax.stop_gradient(carry.ema), len(carry.extra["probe"].keys)
        if axis_name is not None:
            images = jax.lax.all_gather(images[:rows], axis_name, tiled=True)
        if len(images) < rows:
            raise MmjaxError(f"MoCo: drift_rows={rows} images of a micro-batch of {len(images)}")
        stats = {"batch_stats": carry.stats["key"]} if carry.stats["key"] else {}

        def keys(images: Array) -> Array:
            outputs, _ = self.network().apply(
                {"params": ema} | stats, images, True, predict=False, mutable=["batch_stats"]
            )
            return jax.lax.stop_gradient(l2_normalize(outputs["embedding"]))

        has_keys = jnp.any(previous.keys != 0)
        drift = jnp.where(has_keys, 1 - jnp.mean(jnp.sum(keys(previous.images) * previous.keys, -1)), 0.0)
        return Probe(images[:rows], keys(images[:rows])), drift


def feature_std(unit_features: Float[Array, "b d"], axis_name: str | None = None) -> Float[Array, ""]:
    """sqrt(d) times the mean over features of their standard deviation over the global batch."""
    x = jax.lax.stop_gradient(unit_features)
    mean, square = jnp.mean(x, 0), jnp.mean(jnp.square(x), 0)
    if axis_name is not None:
        mean, square = jax.lax.pmean((mean, square), axis_name)
    return jnp.mean(jnp.sqrt(jnp.maximum(square - jnp.square(mean), 0))) * x.shape[-1] ** 0.5


def _local_part(values: Array, size: int, axis_name: str) -> Array:
    """This device's part of the values of the global batch."""
    return jax.lax.dynamic_slice_in_dim(values, jax.lax.axis_index(axis_name) * size, size)


def _view(batch: Batch, name: str) -> Array:
    if name not in batch:
        raise MmjaxError(f"MoCo wants batch[{name!r}]; the batch has {sorted(batch)} (see augment.two_views)")
    return batch[name]
