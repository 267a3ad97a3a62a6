"""What ALBEF's training methods share: momentum encoders that have a say in the targets, and the contrast's queues."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mmjax.channels import CLIP_MEAN, CLIP_STD
from mmjax.models.albef.network import MOMENTUM, Albef, AlbefConfig, tied, untied
from mmjax.nn.groups import take_in_group
from mmjax.objectives.language import IGNORED, token_accuracy
from mmjax.objectives.matching import (
    has_negative,
    matching_labels,
    matching_loss,
    negative_log_weights,
    sample_negatives,
)
from mmjax.objectives.momentum_contrast import momentum_contrast
from mmjax.training.method import Method
from mmjax.training.queue import Queue, create_queue, enqueue
from mmjax.training.rng import example_keys, named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray


@dataclass(frozen=True)
class ForwardPasses(Method):
    """The network's passes over batches; no state beside the parameters.

    Attributes:
        mean, std: of the channels in [0, 1], for images that come as uint8.
    """

    config: AlbefConfig
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def example(self, batch: Batch) -> dict[str, Any]:
        """What `Albef.__call__` takes of a batch; only shapes are read."""
        return {
            "images": self.pixels(batch["image"][:1]),
            "ids": batch["input_ids"][:1],
            "mask": batch["attention_mask"][:1],
        }

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        variables: Any = Albef(self.config).init(named(rng, "params"), **self.example(batch))
        return tied(variables["params"], self.config), Carry()

    def run(self, params: Params, name: str, *inputs: Any, axis_name: str | None, rng: PRNGKeyArray) -> Any:
        """A method of the network in training. rng: of its dropout, another for each pass."""
        network = Albef(self.config, axis_name)
        variables = {"params": untied(params, self.config)}
        return network.apply(variables, *inputs, train=True, method=name, rngs={"dropout": rng})

    def head(self, params: Params, name: str, *inputs: Any) -> Any:
        """A method of the network that draws nothing."""
        return Albef(self.config).apply({"params": untied(params, self.config)}, *inputs, method=name)

    def pixels(self, image: Array) -> Float[Array, "*b h w 3"]:
        """Normalised floats of uint8; floats are normalised already."""
        if image.dtype != jnp.uint8:
            return image
        mean, std = (jnp.asarray(value, jnp.float32) for value in (self.mean, self.std))
        return (image.astype(jnp.float32) / 255 - mean) / std


@dataclass(frozen=True)
class MomentumDistillation(ForwardPasses):
    """Momentum encoders beside the network, and the state that they are.

    hparams: momentum, alpha.

    Attributes:
        alpha_steps: batches over which the momentum encoders' share of the targets rises to alpha: an epoch in the
            original (Pretrain.py:61-64); 0: it is alpha from the start.
    """

    alpha_steps: int = 0

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Raises MmjaxError if the queue's length is not a multiple of the batch."""
        params, _ = super().init(rng, batch)
        ema = {part: params[part] for part in MOMENTUM if part in params}
        hparams = {"momentum": jnp.float32(self.config.momentum), "alpha": jnp.float32(self.config.alpha)}
        return params, Carry(ema, self.queues(rng, batch), hparams=hparams)

    def queues(self, rng: PRNGKeyArray, batch: Batch) -> dict[str, Queue]:
        """Those of the contrast: "image", "text" and, where pairs are told by images, "ids" [q, 1]; {} without one."""
        c, size = self.config, len(batch["input_ids"])
        if not (c.queue and c.embed_dim):
            return {}
        found = {
            name: create_queue(named(rng, f"queue/{name}"), c.queue, c.embed_dim, size) for name in ("image", "text")
        }
        if c.by_image:
            found["ids"] = Queue(jnp.full((c.queue, 1), IGNORED, jnp.int32), jnp.zeros((), jnp.int32))
        return found

    def teacher(self, params: Params, carry: Carry) -> Params:
        """The network with its momentum parts; no gradient passes."""
        return jax.lax.stop_gradient({**params, **carry.ema})

    def alpha(self, carry: Carry, step: Int[Array, ""]) -> Float[Array, ""]:
        """The momentum encoders' share of the targets at this step."""
        if not self.alpha_steps:
            return carry.hparams["alpha"]
        return carry.hparams["alpha"] * jnp.minimum(1.0, step / self.alpha_steps)


@struct.dataclass
class Encoded:
    """What both encoders, and their momentum copies, say of a batch."""

    image: Float[Array, "b n d"]
    text: Float[Array, "b l d"]
    image_embeds: Float[Array, "b e"]
    text_embeds: Float[Array, "b e"]
    teacher_image: Float[Array, "b n d"]
    image_keys: Float[Array, "b e"]
    text_keys: Float[Array, "b e"]


@dataclass(frozen=True)
class Alignment(MomentumDistillation):
    """Image-text contrast and matching, which pre-training and retrieval share (model_pretrain.py, model_retrieval.py).

    Batches: {"image": [b, h, w, 3], uint8 or normalised floats; "input_ids": int32 [b, l], [CLS] first;
    "attention_mask": [b, l], 1 = a token; with `config.by_image` "image_id": int32 [b]}.

    Attributes:
        groups: parts of the global batch, in which pairs meet the keys and the hard negatives of their own part alone:
            one a process in the original (8).
        blocks: in how many runs of rows the contrast's logits are made (see `momentum_contrast`).
    """

    groups: int = 1
    blocks: int = 1

    def encode(self, params: Params, carry: Carry, batch: Batch, rng: PRNGKeyArray, axis_name: str | None) -> Encoded:
        """Each encoder by itself. The momentum encoders are in training mode too: their dropout is on."""
        teacher, pixels = self.teacher(params, carry), self.pixels(batch["image"])

        def both(params: Params, who: str) -> tuple[Array, Array, Array, Array]:
            keys = (named(rng, f"{who}/{part}") for part in ("image", "read"))
            image = self.run(params, "image", pixels, axis_name=axis_name, rng=next(keys))
            text = self.run(
                params, "read", batch["input_ids"], batch["attention_mask"], axis_name=axis_name, rng=next(keys)
            )
            return image, text, self.head(params, "image_embeds", image), self.head(params, "text_embeds", text)

        teacher_image, _, image_keys, text_keys = both(teacher, "teacher")
        return Encoded(*both(params, "student"), teacher_image, image_keys, text_keys)

    def encode_image(self, params: Params, state: Any, images: Array) -> Float[Array, "b e"]:
        """Unit features of images, for evaluations beside training."""
        return self.head(params, "image_embeds", self.head(params, "image", self.pixels(images)))

    def encode_text(self, params: Params, state: Any, texts: Batch) -> Float[Array, "b e"]:
        """Unit features of {"input_ids", "attention_mask"} [b, l]."""
        return self.head(params, "text_embeds", self.head(params, "read", texts["input_ids"], texts["attention_mask"]))

    def contrast(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        told: Encoded,
        alpha: Float[Array, ""],
        axis_name: str | None,
    ) -> Float[Array, ""]:
        """Against the queues as they are before this batch."""
        empty = jnp.zeros((0, self.config.embed_dim))
        queues = {name: queue.keys for name, queue in carry.queues.items()}
        by_image = self.config.by_image
        return momentum_contrast(
            told.image_embeds,
            told.text_embeds,
            told.image_keys,
            told.text_keys,
            queues.get("image", empty),
            queues.get("text", empty),
            params["temperature"],
            alpha,
            ids=batch["image_id"] if by_image else None,
            queue_ids=queues.get("ids", jnp.zeros((0, 1), jnp.int32))[:, 0] if by_image else None,
            groups=self.groups,
            axis_name=axis_name,
            blocks=self.blocks,
        )

    def enqueued(self, carry: Carry, batch: Batch, told: Encoded, axis_name: str | None) -> dict[str, Queue]:
        """The queues with this batch's keys, of all devices, as incoming."""
        keys = {"image": told.image_keys, "text": told.text_keys}
        if self.config.by_image:
            keys["ids"] = batch["image_id"].astype(jnp.int32)[:, None]
        keys = {name: keys[name] for name in carry.queues}
        if axis_name is not None:
            keys = {name: jax.lax.all_gather(value, axis_name, tiled=True) for name, value in keys.items()}
        return {name: enqueue(carry.queues[name], value) for name, value in keys.items()}

    def hardness(
        self, params: Params, batch: Batch, told: Encoded, axis_name: str | None
    ) -> tuple[Float[Array, "b m"], Float[Array, "b m"]]:
        """Logs of the weights by which each text's negative image and each image's negative text are drawn."""
        how: dict[str, Any] = {"groups": self.groups, "axis_name": axis_name}
        how["ids"] = batch["image_id"] if self.config.by_image else None
        images = negative_log_weights(told.text_embeds, told.image_keys, params["temperature"], **how)
        return images, negative_log_weights(told.image_embeds, told.text_keys, params["temperature"], **how)

    def negatives(
        self, params: Params, batch: Batch, told: Encoded, rng: PRNGKeyArray, axis_name: str | None
    ) -> tuple[Int[Array, "b"], Int[Array, "b"]]:
        """Places in the group: of a negative image for each text, and of a negative text for each image."""
        weights = self.hardness(params, batch, told, axis_name)
        keys = (example_keys(named(rng, name), len(w), axis_name) for name, w in zip(("images", "texts"), weights))
        images, texts = (sample_negatives(key, w) for key, w in zip(keys, weights))
        return images, texts

    def match(
        self,
        params: Params,
        batch: Batch,
        told: Encoded,
        negatives: tuple[Int[Array, "b"], Int[Array, "b"]],
        rng: PRNGKeyArray,
        axis_name: str | None,
    ) -> tuple[Mean, Means, Float[Array, "three_b 2"]]:
        """The loss, its metrics, and the logits of the pairs, of (text, negative image) and of (negative text, image).

        Negatives keep their gradient.
        """
        images, texts = negatives

        def other(x: Array, places: Array) -> Array:
            return take_in_group(x, places, self.groups, axis_name)

        mask, how = batch["attention_mask"], {"axis_name": axis_name}
        states = _in_turn(told.text, other(told.text, texts))
        seen, masks = _in_turn(other(told.image, images), told.image), _in_turn(mask, other(mask, texts))
        right = self.run(params, "fuse", told.text, mask, told.image, rng=named(rng, "fuse"), **how)
        wrong = self.run(params, "fuse", states, masks, seen, rng=named(rng, "fuse/negatives"), **how)
        # As one product of [3 b, d]: the head sees the first token alone.
        logits = self.head(params, "match", jnp.concatenate([right[:, :1], wrong[::2, :1], wrong[1::2, :1]]))
        ids = batch["image_id"] if self.config.by_image else None
        counted = has_negative(len(right), ids, self.groups, axis_name)
        return (
            matching_loss(logits, counted),
            {"matching_accuracy": token_accuracy(logits, matching_labels(counted))},
            logits,
        )


def _in_turn(first: Array, second: Array) -> Array:
    """[b, ...] twice -> [2 b, ...], of each example the one and then the other: dropout goes by the place in the batch,
    and one run behind the other would have other places on every cut of it."""
    return jnp.stack([first, second], 1).reshape(-1, *first.shape[1:])
