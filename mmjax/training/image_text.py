"""Training methods that ALBEF, BLIP and BLIP-2 share: momentum distillation, image-text contrast (ITC) and matching
(ITM), and the loss of captions."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mmjax.channels import CLIP_MEAN, CLIP_STD
from mmjax.nn.groups import take_in_group
from mmjax.objectives.language import IGNORED, group_mean_weights, next_tokens, token_accuracy, token_cross_entropy
from mmjax.objectives.matching import (
    has_negative,
    matching_loss,
    matching_metrics,
    mixed_with_uniform,
    negative_log_weights,
    sample_negatives,
)
from mmjax.objectives.momentum_contrast import momentum_contrast
from mmjax.training.method import Loss, Method
from mmjax.training.queue import Queue, create_queue, enqueue
from mmjax.training.rng import example_keys, named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray


class PairConfig(Protocol):
    """A network's config, a frozen dataclass.

    embed_dim: width of the contrast's space; 0: there is none. by_image: pairs have an image id.
    """

    @property
    def embed_dim(self) -> int: ...
    @property
    def by_image(self) -> bool: ...

    def network(self, axis_name: str | None = None) -> nn.Module:
        """The module. Its methods: encode_image, encode_text, encode_multimodal, all with `train`; image_embeds,
        text_embeds and itm_logits of their states."""
        ...

    def module_params(self, params: Params) -> Params:
        """The parameters that the module reads, from those that are stored."""
        ...

    def stored_params(self, params: Params) -> Params:
        """The inverse."""
        ...


class ImageTextConfig(PairConfig, Protocol):
    """A network's config with momentum encoders.

    matching: there is an ITM head. queue: keys of earlier batches in the contrast. momentum, alpha: initial
    hyper-parameters. momentum_parts: names of the parameter subtrees with a momentum copy, of those that the network
    has.
    """

    @property
    def matching(self) -> bool: ...
    @property
    def queue(self) -> int: ...
    @property
    def momentum(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def momentum_parts(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class ForwardPasses(Method):
    """The network's passes over batches; no state beside the parameters.

    Attributes:
        mean, std: of the channels in [0, 1], for images that come as uint8.
    """

    config: PairConfig
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def example(self, batch: Batch) -> dict[str, Any]:
        """The arguments of the network's `__call__`; only shapes are read."""
        return {
            "images": self.pixels(batch["image"][:1]),
            "ids": batch["input_ids"][:1],
            "mask": batch["attention_mask"][:1],
        }

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        variables: Any = self.config.network().init(named(rng, "params"), **self.example(batch))
        return self.config.stored_params(variables["params"]), Carry()

    def run(self, params: Params, name: str, *inputs: Any, axis_name: str | None, rng: PRNGKeyArray) -> Any:
        """A method of the network in training. rng: of its dropout, another for each pass."""
        variables = {"params": self.config.module_params(params)}
        network = self.config.network(axis_name)
        return network.apply(variables, *inputs, train=True, method=name, rngs={"dropout": rng})

    def head(self, params: Params, name: str, *inputs: Any) -> Any:
        """A method of the network without dropout."""
        return self.config.network().apply({"params": self.config.module_params(params)}, *inputs, method=name)

    def pixels(self, image: Array) -> Float[Array, "*b h w 3"]:
        """uint8 images as normalised floats; floats are normalised already."""
        if image.dtype != jnp.uint8:
            return image
        mean, std = (jnp.asarray(value, jnp.float32) for value in (self.mean, self.std))
        return (image.astype(jnp.float32) / 255 - mean) / std


@struct.dataclass
class EncodedPairs:
    """The outputs of both encoders for a batch; of several features an image they are [b, q, e] (BLIP-2)."""

    image: Float[Array, "b n d"]
    text: Float[Array, "b l d"]
    image_embeds: Float[Array, "b *q e"]
    text_embeds: Float[Array, "b e"]


@dataclass(frozen=True)
class Matching(ForwardPasses):
    """Image-text matching (ITM) with hard negatives: ALBEF, BLIP, and BLIP-2's first stage.

    Attributes:
        groups: parts of the global batch, in which pairs meet the keys and the hard negatives of their own part alone:
            one a process in the original (8).
        negative_groups: the same for the hard negatives alone; None: `groups`.
        uniform_steps: steps over which the ITM head's negatives change from uniform ones to hard ones: the share of
            uniform ones falls linearly from 1 to 0. 0: all are hard, as in the papers.

    Of the class:
        negative_floor: see `negative_log_weights`.
        matching_tokens: the first states of a pair that the ITM head reads; None: all.
    """

    negative_floor: ClassVar[float] = 0.0
    matching_tokens: ClassVar[int | None] = 1

    groups: int = 1
    negative_groups: int | None = None
    uniform_steps: int = 0

    def encode_image(self, params: Params, state: Any, images: Array) -> Float[Array, "b e"]:
        """Unit features of images, for evaluations beside training."""
        return self.head(params, "image_embeds", self.head(params, "encode_image", self.pixels(images)))

    def encode_text(self, params: Params, state: Any, texts: Batch) -> Float[Array, "b e"]:
        """Unit features of {"input_ids", "attention_mask"} [b, l]."""
        states = self.head(params, "encode_text", texts["input_ids"], texts["attention_mask"])
        return self.head(params, "text_embeds", states)

    def negative_weights(
        self, params: Params, batch: Batch, encoded: EncodedPairs, axis_name: str | None
    ) -> tuple[Float[Array, "b m"], Float[Array, "b m"]]:
        """Logs of the weights by which each text's negative image and each image's negative text are sampled."""
        options: dict[str, Any] = {"groups": self._negative_groups, "axis_name": axis_name, "ids": self._ids(batch)}
        options |= {"floor": self.negative_floor}
        image_keys, text_keys = self.negative_keys(encoded)
        images = negative_log_weights(encoded.text_embeds, image_keys, params["temperature"], **options)
        texts = negative_log_weights(encoded.image_embeds, text_keys, params["temperature"], **options)
        return images, texts

    def negative_keys(self, encoded: EncodedPairs) -> tuple[Float[Array, "b *q e"], Float[Array, "b e"]]:
        """The features of images and of texts that hard negatives are compared by."""
        return encoded.image_embeds, encoded.text_embeds

    def multimodal_texts(self, batch: Batch, encoded: EncodedPairs) -> Array:
        """The texts [b, l, ...] that `encode_multimodal` of the network takes: here the states of `encode_text`."""
        return encoded.text

    def negatives(
        self,
        params: Params,
        batch: Batch,
        encoded: EncodedPairs,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None,
    ) -> tuple[Int[Array, "b"], Int[Array, "b"]]:
        """Indices in the group: of a negative image for each text, and of a negative text for each image."""
        weights = self.negative_weights(params, batch, encoded, axis_name)
        if self.uniform_steps:
            share = jnp.maximum(0.0, 1 - step / self.uniform_steps)
            weights = tuple(mixed_with_uniform(w, share) for w in weights)
        keys = (example_keys(named(rng, name), len(w), axis_name) for name, w in zip(("images", "texts"), weights))
        images, texts = (sample_negatives(key, w) for key, w in zip(keys, weights))
        return images, texts

    def itm_loss(
        self,
        params: Params,
        batch: Batch,
        encoded: EncodedPairs,
        negatives: tuple[Int[Array, "b"], Int[Array, "b"]],
        rng: PRNGKeyArray,
        axis_name: str | None,
    ) -> tuple[Mean, Means, Float[Array, "three_b 2"]]:
        """Image-text matching: the loss, its metrics, and the logits of the pairs, of (text, negative image) and of
        (negative text, image). Negatives keep their gradient."""
        logits = self.head(params, "itm_logits", self.pair_states(params, batch, encoded, negatives, rng, axis_name))
        counted = has_negative(len(logits) // 3, self._ids(batch), self._negative_groups, axis_name)
        metrics: Means = {**matching_metrics(logits, counted, axis_name)}
        return matching_loss(logits, counted), metrics, logits

    def pair_states(
        self,
        params: Params,
        batch: Batch,
        encoded: EncodedPairs,
        negatives: tuple[Int[Array, "b"], Int[Array, "b"]],
        rng: PRNGKeyArray,
        axis_name: str | None,
    ) -> Float[Array, "three_b t d"]:
        """The multimodal states that the ITM head reads, of the pairs of `matching_loss`."""
        images, texts = negatives

        def other(x: Array, indices: Array) -> Array:
            return take_in_group(x, indices, self._negative_groups, axis_name)

        def fuse(text: Array, mask: Array, image: Array, name: str) -> Array:
            rngs = named(rng, name)
            return self.run(params, "encode_multimodal", text, mask, image, rng=rngs, axis_name=axis_name)

        text, mask = self.multimodal_texts(batch, encoded), batch["attention_mask"]
        positive = fuse(text, mask, encoded.image, "multimodal")
        negative = fuse(
            _interleaved(text, other(text, texts)),
            _interleaved(mask, other(mask, texts)),
            _interleaved(other(encoded.image, images), encoded.image),
            "multimodal/negatives",
        )
        # As one product of [3 b, d] where the ITM head reads the first token alone.
        chosen = slice(self.matching_tokens)
        return jnp.concatenate([positive[:, chosen], negative[::2, chosen], negative[1::2, chosen]])

    @property
    def _negative_groups(self) -> int:
        return self.groups if self.negative_groups is None else self.negative_groups

    def _ids(self, batch: Batch) -> Int[Array, "b"] | None:
        return batch["image_id"] if self.config.by_image else None


@dataclass(frozen=True)
class MomentumDistillation(ForwardPasses):
    """Momentum encoders beside the network, whose outputs are soft targets (ALBEF, arXiv 2107.07651, section 3.3).

    hparams: momentum, alpha.

    Attributes:
        alpha_steps: steps over which the momentum encoders' share of the targets rises to alpha: an epoch in the
            original (Pretrain.py:61-64); 0: it is alpha from the start.
    """

    config: ImageTextConfig
    alpha_steps: int = 0

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Raises MmjaxError if the queue's length is not a multiple of the batch."""
        params, _ = super().init(rng, batch)
        ema = {part: params[part] for part in self.config.momentum_parts if part in params}
        hparams = {"momentum": jnp.float32(self.config.momentum), "alpha": jnp.float32(self.config.alpha)}
        return params, Carry(ema, self.queues(rng, batch), hparams=hparams)

    def queues(self, rng: PRNGKeyArray, batch: Batch) -> dict[str, Queue]:
        """The queues of the contrast: "image", "text" and, where pairs have image ids, "ids" [q, 1]; {} without one."""
        c, size = self.config, len(batch["input_ids"])
        if not (c.queue and c.embed_dim):
            return {}
        queues = {
            name: create_queue(named(rng, f"queue/{name}"), c.queue, c.embed_dim, size) for name in ("image", "text")
        }
        if c.by_image:
            queues["ids"] = Queue(jnp.full((c.queue, 1), IGNORED, jnp.int32), jnp.zeros((), jnp.int32))
        return queues

    def teacher(self, params: Params, carry: Carry) -> Params:
        """The network with its momentum parts; without a gradient."""
        return jax.lax.stop_gradient({**params, **carry.ema})

    def alpha(self, carry: Carry, step: Int[Array, ""]) -> Float[Array, ""]:
        """The momentum encoders' share of the targets at this step."""
        if not self.alpha_steps:
            return carry.hparams["alpha"]
        return carry.hparams["alpha"] * jnp.minimum(1.0, step / self.alpha_steps)


@struct.dataclass
class Encoded(EncodedPairs):
    """The outputs of both encoders and of their momentum copies for a batch."""

    teacher_image: Float[Array, "b n d"]
    image_keys: Float[Array, "b e"]
    text_keys: Float[Array, "b e"]


@dataclass(frozen=True)
class Alignment(MomentumDistillation, Matching):
    """ITC and ITM, which pre-training and retrieval share (ALBEF model_pretrain.py, model_retrieval.py; BLIP
    blip_pretrain.py, blip_retrieval.py).

    Batches: {"image": [b, h, w, 3], uint8 or normalised floats; "input_ids": int32 [b, l], [CLS] first;
    "attention_mask": [b, l], 1 = a token; with `config.by_image` "image_id": int32 [b]}. The parameters have a
    "temperature".

    Under accumulation a micro-batch is a batch of its own for the contrast's in-batch keys and for the hard negatives,
    as one process of the original is; queues are those of before the whole batch (`mmjax.training.state.Carry`).

    Attributes:
        blocks: number of blocks that the contrast's logits are computed in (see `momentum_contrast`).
    """

    blocks: int = 1

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        """contrast_loss, with an ITM head matching_loss, and those of `text_losses`, each with weight 1; queues are
        those of before."""
        encoded = self.encode(params, carry, batch, rng, axis_name)
        alpha = self.alpha(carry, step)
        losses: dict[str, Any] = {"contrast_loss": self.itc_loss(params, carry, batch, encoded, alpha, axis_name)}
        metrics: Means = {"temperature": params["temperature"]}
        if self.config.matching:
            negatives = self.negatives(params, batch, encoded, rng, step, axis_name)
            losses["matching_loss"], itm_metrics, _ = self.itm_loss(params, batch, encoded, negatives, rng, axis_name)
            metrics |= itm_metrics
        text_losses, text_metrics = self.text_losses(params, carry, batch, encoded, alpha, rng, axis_name)
        next_carry = dataclasses.replace(carry, queues=self.next_queues(carry, batch, encoded, axis_name))
        return losses | text_losses, (next_carry, metrics | text_metrics)

    def text_losses(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        encoded: Encoded,
        alpha: Float[Array, ""],
        rng: PRNGKeyArray,
        axis_name: str | None,
    ) -> tuple[dict[str, Mean], Means]:
        """Losses of texts under their images, by name, and their metrics: those of pre-training; retrieval has none."""
        return {}, {}

    def encode(self, params: Params, carry: Carry, batch: Batch, rng: PRNGKeyArray, axis_name: str | None) -> Encoded:
        """Both encoders. The momentum encoders are in training mode too: their dropout is on."""
        pixels, texts = self.pixels(batch["image"]), (batch["input_ids"], batch["attention_mask"])

        def outputs(params: Params, who: str) -> tuple[Array, Array, Array, Array]:
            keys = (named(rng, f"{who}/{part}") for part in ("image", "text"))
            image = self.run(params, "encode_image", pixels, axis_name=axis_name, rng=next(keys))
            text = self.run(params, "encode_text", *texts, axis_name=axis_name, rng=next(keys))
            return image, text, self.head(params, "image_embeds", image), self.head(params, "text_embeds", text)

        teacher_image, _, image_keys, text_keys = outputs(self.teacher(params, carry), "teacher")
        return Encoded(*outputs(params, "student"), teacher_image, image_keys, text_keys)

    def negative_keys(self, encoded: EncodedPairs) -> tuple[Float[Array, "b e"], Float[Array, "b e"]]:
        """The features of images and of texts that hard negatives are compared by: the momentum encoders'."""
        assert isinstance(encoded, Encoded)
        return encoded.image_keys, encoded.text_keys

    def itc_loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        encoded: Encoded,
        alpha: Float[Array, ""],
        axis_name: str | None,
    ) -> Float[Array, ""]:
        """Image-text contrast against the queues from before this batch."""
        empty = jnp.zeros((0, self.config.embed_dim))
        queues = {name: queue.keys for name, queue in carry.queues.items()}
        by_image = self.config.by_image
        return momentum_contrast(
            encoded.image_embeds,
            encoded.text_embeds,
            encoded.image_keys,
            encoded.text_keys,
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

    def next_queues(self, carry: Carry, batch: Batch, encoded: Encoded, axis_name: str | None) -> dict[str, Queue]:
        """The queues with the keys of this batch, of all devices, as incoming."""
        keys = {"image": encoded.image_keys, "text": encoded.text_keys}
        if self.config.by_image:
            keys["ids"] = batch["image_id"].astype(jnp.int32)[:, None]
        keys = {name: keys[name] for name in carry.queues}
        if axis_name is not None:
            keys = {name: jax.lax.all_gather(value, axis_name, tiled=True) for name, value in keys.items()}
        return {name: enqueue(carry.queues[name], value) for name, value in keys.items()}


LABEL_SMOOTHING = 0.1
"""Of every loss of BLIP's decoder (models/med.py:914), and of BLIP-2's (Qformer.py:1076)."""


def caption_loss(
    logits: Float[Array, "b l v"],
    ids: Int[Array, "b l"],
    mask: Int[Array, "b l"],
    groups: int = 1,
    axis_name: str | None = None,
) -> tuple[Mean, Means]:
    """The loss of each text's next tokens, and the metric lm_accuracy in [0, 1].

    ids: [DEC] first; [SEP] is a target. The loss is the mean of the groups' means over tokens.
    """
    labels = next_tokens(ids, mask)
    weights = group_mean_weights(labels, groups, axis_name)
    loss = token_cross_entropy(logits, labels, weights=weights, label_smoothing=LABEL_SMOOTHING).loss
    return loss, {"lm_accuracy": token_accuracy(logits, labels)}


LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.001, 0.5


def clamped_temperature(params: Params) -> Params:
    """The parameters with the temperature in its range (ALBEF model_pretrain.py:90, BLIP blip_pretrain.py)."""
    return {**params, "temperature": jnp.clip(params["temperature"], LEAST_TEMPERATURE, MOST_TEMPERATURE)}


def _interleaved(first: Array, second: Array) -> Array:
    """[b, ...] twice -> [2 b, ...], the two of each example side by side: dropout is a function of the position in the
    batch, and one block after the other would have other positions on every division of it over devices."""
    return jnp.stack([first, second], 1).reshape(-1, *first.shape[1:])
