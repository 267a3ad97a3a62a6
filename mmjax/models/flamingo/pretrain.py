"""Training Flamingo: the language model's loss on texts with images in them, over several sources at once.

Source: open_flamingo's train/train_utils.py and train.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from mmjax import tree
from mmjax.channels import CLIP_MEAN, CLIP_STD
from mmjax.models.flamingo.config import FlamingoConfig
from mmjax.models.flamingo.network import Flamingo
from mmjax.models.language.network import output_layer
from mmjax.objectives.language import linear_cross_entropy, next_tokens
from mmjax.training.method import Loss, Method
from mmjax.training.optimizer import Optimizer, Schedule, adamw
from mmjax.training.partition import FROZEN, TRAINABLE, Partition
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Bool, Float, Int, Mean, Means, Params, PRNGKeyArray

DECAYED = "decayed"


@dataclass(frozen=True)
class FlamingoLM(Method):
    """Batches have for each source {"NAME_image" [b, t, height, width, 3], "NAME_input_ids", "NAME_attention_mask",
    "NAME_labels" [b, l]}, as from `mmjax.data.mixture`; the b of sources may differ. Images are uint8, or floats that
    are normalised already; of videos [b, t, f, height, width, 3].

    The loss is the sum over the sources of weight * mean over the source's labels. The padding's row of the added
    embedding gets no gradient, so that of the added ids the two of images are trained alone.

    Attributes:
        weights: source -> its factor; OpenFlamingo's are 1 for documents and 0.2 for pairs, the paper's 1, 0.2, 0.2
            and 0.03 for web pages, ALIGN, LTIP and videos.
        mean, std: of the image encoder's preprocessing.
    """

    config: FlamingoConfig
    weights: Mapping[str, float] = field(default_factory=lambda: {"documents": 1.0, "pairs": 0.2})
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Uses only the shapes of `batch`."""
        part = source_batch(batch, next(iter(self.weights)))
        image, ids = (jnp.zeros((1, *part[name].shape[1:]), part[name].dtype) for name in ("image", "input_ids"))
        variables: Any = Flamingo(self.config).init(rng, self._pixels(image), ids)
        return variables["params"], Carry(stats=variables.get("batch_stats", {}))

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        """The loss, a term a source. Metrics of each: NAME_nll, in nats a token; NAME_media, the images of a text;
        NAME_unattended, those of them that no text attends to."""
        params = self._frozen_padding(params)
        losses, metrics = dict[str, Mean | Array](), dict[str, Mean | Array]()
        for name, weight in self.weights.items():
            part = source_batch(batch, name)
            hidden = self._hidden(params, carry, part, axis_name)
            layer = output_layer(params["language"], self.config.decoder)
            outputs = linear_cross_entropy(hidden, labels=next_tokens(part["labels"]), **layer)
            losses[f"{name}_loss"] = Mean(weight * outputs.loss.total, outputs.loss.count)
            metrics[f"{name}_nll"] = outputs.nll
            starts = part["input_ids"] == self.config.image_token
            texts = jnp.float32(len(starts))
            metrics[f"{name}_media"] = Mean(starts.sum().astype(jnp.float32), texts)
            metrics[f"{name}_unattended"] = Mean(unattended(starts, part["attention_mask"]), texts)
        return losses, (carry, metrics)

    def _hidden(self, params: Params, carry: Carry, part: Batch, axis_name: str | None) -> Float[Array, "b l d"]:
        variables = {"params": params} | ({"batch_stats": carry.stats} if carry.stats else {})

        def run(module: Flamingo, pixels: Array) -> Array:
            # The image encoder is frozen: no gradient goes into it.
            media = module.resample(jax.lax.stop_gradient(module.encode_frames(pixels)))
            return module.hidden(media, part["input_ids"], part["attention_mask"])

        hidden: Any = Flamingo(self.config, axis_name).apply(variables, self._pixels(part["image"]), method=run)
        return hidden

    def _pixels(self, image: Array) -> Float[Array, "b t f height width 3"]:
        image = image[:, :, None] if image.ndim == 5 else image
        if image.dtype != jnp.uint8:
            return image
        mean, std = (jnp.asarray(value, jnp.float32) for value in (self.mean, self.std))
        return (image.astype(jnp.float32) / 255 - mean) / std

    def _frozen_padding(self, params: Params) -> Params:
        """The parameters, with no gradient for added rows that are neither `<image>` nor `<|endofchunk|>`."""
        c = self.config
        if not c.added_tokens or c.end_of_chunk is None:
            return params
        ids = c.vocab_size + jnp.arange(c.added_tokens)
        trained = (ids == c.image_token) | (ids == c.end_of_chunk)
        rows = params["language"]["added_embedding"]
        rows = jnp.where(trained[:, None], rows, jax.lax.stop_gradient(rows))
        return {**params, "language": {**params["language"], "added_embedding": rows}}


def unattended(starts: Bool[Array, "b l"], mask: Int[Array, "b l"]) -> Float[Array, ""]:
    """The number of images to which only their own `<image>` attends: another one, or nothing, follows it."""
    text = jnp.pad((mask == 1) & ~starts, ((0, 0), (0, 1)))[:, 1:]
    return (starts & ~text).sum().astype(jnp.float32)


def source_batch(batch: Batch, name: str) -> dict[str, Array]:
    """The fields of one source."""
    start = f"{name}_"
    return {key.removeprefix(start): value for key, value in batch.items() if key.startswith(start)}


def partition(config: FlamingoConfig) -> Partition:
    """Image encoder and language model are frozen, but for the embedding of the added ids; the cross attention has
    weight decay, the resampler and the embedding none."""
    rules = {"vision/**": FROZEN}
    if config.embed_dim:
        rules["vision_projection/**"] = FROZEN
    if config.added_tokens:
        rules["language/added_embedding"] = TRAINABLE
    return Partition({**rules, "language/**": FROZEN, **{f"cross_{i}/**": DECAYED for i in config.crossed}})


def optimizer(config: FlamingoConfig, rate: Schedule, weight_decay: float = 0.1) -> Optimizer:
    """AdamW; decay of all leaves of the cross attention, norms and gates too; gradients clipped at a norm of 1."""
    transforms = {TRAINABLE: adamw(rate), DECAYED: adamw(rate, weight_decay, mask=None)}
    return Optimizer(transforms, partition(config), clip_norm=1.0)


def trainable_count(config: FlamingoConfig, params: Params) -> int:
    """The number of trained parameters."""
    trainable, _ = partition(config).split(params)
    return sum(leaf.size for leaf in tree.flatten(trainable).values())
