"""CLIP's pretraining (arXiv 2103.00020, section 2.3), and SigLIP's where the config has a bias."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from mmjax.channels import CLIP_MEAN, CLIP_STD
from mmjax.errors import MmjaxError
from mmjax.models.clip.network import CLIP as Network
from mmjax.models.clip.network import CLIPConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.nn.norm import l2_normalize
from mmjax.objectives.contrastive import clip_loss, in_batch_accuracy, mutual_information_bound, sigmoid_loss
from mmjax.training.method import Loss, Method
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Means, Params, PRNGKeyArray

MAX_LOGIT_SCALE = math.log(100.0)


@dataclasses.dataclass(frozen=True)
class CLIP(Method):
    """Batches {"image": uint8 or float [b, height, width, 3], "text": int32 [b, l]}; other arrays are ignored.

    uint8 images are normalised on the device; float images count as normalised already. A frozen tower (LiT) is
    the optimizer's partition: {"vision/**": "frozen"}, and with its projection {"vision*/**": "frozen"}.

    Attributes:
        bn_groups: parts of the global batch with separate batch statistics, for towers that have them.
        mean, std: of the images' channels in [0, 1].
        label_smoothing: the share of a pair's label that is spread over the batch; against overfitting of small data.
            SigLIP's loss has none.
        loss_blocks: see `mmjax.objectives.contrastive`: with more than 1 the whole matrix of logits is never in memory.
        chunks: micro-batches that the towers encode one after another, under the loss of the whole batch: the same
            gradient with a fraction of the activations, for one more forward pass (GradCache, arXiv 2101.06983;
            accum_freq in open_clip). Not with batch statistics, which would be of another batch.
    """

    config: CLIPConfig
    bn_groups: int = 1
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    label_smoothing: float = 0.0
    loss_blocks: int = 1
    chunks: int = 1

    def __post_init__(self) -> None:
        """Raises MmjaxError for smoothing out of range, or of a loss that has none."""
        if not 0 <= self.label_smoothing < 1:
            raise MmjaxError(f"clip: label_smoothing={self.label_smoothing} (from 0 to below 1)")
        if self.label_smoothing and self.config.init_bias is not None:
            raise MmjaxError(f"clip: label_smoothing={self.label_smoothing} with SigLIP's loss, which has none")

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Uses only the shapes of `batch`."""
        image, text = (jnp.zeros((1, *batch[name].shape[1:]), batch[name].dtype) for name in ("image", "text"))
        variables: Any = Network(self.config).init(rng, self._pixels(image), text)
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
        """The loss; metrics: logit_scale (the factor itself), mutual_information_bound in nats, image_to_text_accuracy
        and text_to_image_accuracy within the batch, in [0, 1]."""
        if self.chunks > 1:
            (image, text), stats = self._chunked(params, carry, batch), carry.stats
        else:
            image, text, stats = self._features(params, carry.stats, batch, axis_name)
        scale, blocks = params["logit_scale"], self.loss_blocks
        if self.config.init_bias is None:
            value = clip_loss(image, text, scale, axis_name, blocks, self.label_smoothing)
        else:
            value = sigmoid_loss(image, text, scale, params["logit_bias"], axis_name, blocks)
        nce = value
        if self.config.init_bias is not None or self.label_smoothing:  # only the plain loss bounds mutual information
            nce = clip_loss(*jax.lax.stop_gradient((image, text, scale)), axis_name, blocks)
        candidates = image.shape[0] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
        metrics: Means = {
            "logit_scale": jnp.exp(params["logit_scale"]),
            "mutual_information_bound": mutual_information_bound(nce, candidates),
            "image_to_text_accuracy": in_batch_accuracy(image, text, axis_name, blocks),
            "text_to_image_accuracy": in_batch_accuracy(text, image, axis_name, blocks),
        }
        return value, (dataclasses.replace(carry, stats=stats), metrics)

    def constrain(self, params: Params) -> Params:
        """logit_scale stays within [0, ln 100] (open_clip's train.py, after the step)."""
        return {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, MAX_LOGIT_SCALE)}

    def encode_image(self, params: Params, state: Any, images: Array) -> Float[Array, "b e"]:
        """Unit features of a batch's images, for evaluations beside training; `state` has the batch statistics."""
        variables = {"params": params} | ({"batch_stats": state.stats} if state.stats else {})
        out: Any = Network(self.config).apply(variables, self._pixels(images), method="encode_image")
        return l2_normalize(out["embeds"])

    def encode_text(self, params: Params, state: Any, texts: Array) -> Float[Array, "b e"]:
        """Unit features of ids [b, l]."""
        out: Any = Network(self.config).apply({"params": params}, texts, method="encode_text")
        return l2_normalize(out["embeds"])

    def _pixels(self, image: Array) -> Array:
        if image.dtype != jnp.uint8:
            return image
        mean, std = (jnp.asarray(value, jnp.float32) for value in (self.mean, self.std))
        return (image.astype(jnp.float32) / 255 - mean) / std

    def _features(
        self, params: Params, stats: Params, batch: Batch, axis_name: str | None
    ) -> tuple[Array, Array, Params]:
        """Unit features of both towers, and the batch statistics after them."""
        variables = {"params": params} | ({"batch_stats": stats} if stats else {})
        pixels = self._pixels(batch["image"])
        result: Any = Network(self.config, axis_name).apply(
            variables, pixels, batch["text"], None, True, self.bn_groups, mutable=["batch_stats"]
        )
        out, moved = result
        return (
            l2_normalize(out["vision"]["embeds"]),
            l2_normalize(out["text"]["embeds"]),
            moved.get("batch_stats", stats),
        )

    def _chunked(self, params: Params, carry: Carry, batch: Batch) -> tuple[Array, Array]:
        """The same features, a chunk after the other; its activations are computed again when its gradient is due."""
        size = batch["image"].shape[0]
        if not isinstance(self.config.vision, ViTConfig):
            raise MmjaxError("chunks > 1 needs a tower without batch statistics (a ViT)")
        if size % self.chunks:
            raise MmjaxError(f"chunks={self.chunks} does not divide the {size} rows of a batch")
        parts = {
            # Every k-th row: rows that a mesh spreads over devices stay spread in each chunk.
            name: rearrange(batch[name], "(b k) ... -> k b ...", k=self.chunks)
            for name in ("image", "text")
        }

        @functools.partial(jax.checkpoint, prevent_cse=False)  # within a scan nothing is merged
        def encode(part: Batch) -> tuple[Array, Array]:
            return self._features(params, carry.stats, part, None)[:2]

        _, (image, text) = jax.lax.scan(lambda _, part: ((), encode(part)), (), parts)
        return rearrange(image, "k b e -> (b k) e"), rearrange(text, "k b e -> (b k) e")
