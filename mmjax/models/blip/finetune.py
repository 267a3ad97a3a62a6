"""BLIP's fine-tuning: retrieval, captions, answers to questions, pairs of images (arXiv 2201.12086, section 5)."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.models.blip.network import BlipConfig, with_first
from mmjax.models.blip.pretrain import BlipAlignment
from mmjax.objectives.classification import hits, softmax_cross_entropy
from mmjax.objectives.language import (
    IGNORED,
    answer_loss,
    group_mean_weights,
    next_tokens,
    text_cross_entropy,
    token_accuracy,
    token_cross_entropy,
)
from mmjax.training.image_text import LABEL_SMOOTHING, EncodedPairs, ForwardPasses
from mmjax.training.method import Loss
from mmjax.training.rng import named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray


@dataclass(frozen=True)
class BlipRetrieval(BlipAlignment):
    """The sum of contrast_loss and matching_loss, in which all pairs of an image are right (blip_retrieval.py).

    Hard negatives are sampled by the features of the encoders that are trained, without a floor. On COCO they come from
    the batches of all processes, on Flickr30K from the process's own: `negative_groups` 1, and None. Metrics:
    temperature, and those of `matching_metrics`.
    """

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without projections, ITM head or image ids."""
        c = self.config
        if not (c.embed_dim and c.matching and c.by_image):
            raise MmjaxError("blip: retrieval needs embed_dim, matching and by_image")

    def negative_keys(self, encoded: EncodedPairs) -> tuple[Float[Array, "b e"], Float[Array, "b e"]]:
        """The features of the encoders that are trained."""
        return encoded.image_embeds, encoded.text_embeds


@dataclass(frozen=True)
class BlipCaptioning(ForwardPasses):
    """Captions of images, token by token, after a prompt that is no target (models/blip.py:105-126).

    Batches: {"image": [b, h, w, 3]; "input_ids", "attention_mask": [b, l], of "a picture of CAPTION", [CLS] first,
    [SEP] last}. Metric: lm_accuracy of next tokens in [0, 1].

    Attributes:
        prompt_length: tokens of "a picture of" with [DEC]: none of them is a target.
        groups: parts of the global batch; the loss is the mean of their means over tokens. One a process there.
    """

    config: BlipConfig
    prompt_length: int = 4
    groups: int = 1

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network that is more than a captioner."""
        if self.config.text is not None or self.config.decoder is None:
            raise MmjaxError("blip: captioning needs a decoder, and no text encoder")

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        logits, labels = self.logits(params, batch, rng, axis_name), self.labels(batch)
        return self.lm_loss(logits, labels, axis_name), (carry, {"lm_accuracy": token_accuracy(logits, labels)})

    def logits(
        self, params: Params, batch: Batch, rng: PRNGKeyArray, axis_name: str | None = None
    ) -> Float[Array, "b l v"]:
        """In training mode."""
        axis, pixels = {"axis_name": axis_name}, self.pixels(batch["image"])
        tokens = self.run(params, "encode_image", pixels, rng=named(rng, "image"), **axis)
        inputs = (with_first(batch["input_ids"], self.config.bos), batch["attention_mask"], tokens)
        return self.run(params, "decode", *inputs, rng=named(rng, "decode"), **axis)

    def labels(self, batch: Batch) -> Int[Array, "b l"]:
        """The tokens to be predicted at each position."""
        targets = jnp.where(batch["attention_mask"] == 1, batch["input_ids"], IGNORED)
        return next_tokens(targets.at[:, : self.prompt_length].set(IGNORED))

    def lm_loss(self, logits: Float[Array, "b l v"], labels: Int[Array, "b l"], axis_name: str | None) -> Mean:
        weights = group_mean_weights(labels, self.groups, axis_name)
        return token_cross_entropy(logits, labels, weights=weights, label_smoothing=LABEL_SMOOTHING).loss


@dataclass(frozen=True)
class BlipAnswering(ForwardPasses):
    """Answers to questions about images, token by token (models/blip_vqa.py).

    Batches: {"image": [b, h, w, 3]; "input_ids", "attention_mask": questions [b, l]; "answer_ids": int32 [b, a, t],
    [CLS] first, [SEP] last and padding after it; "answer_mask": [b, a, t], 1 = a token; "answer_weights": float32
    [b, a], 0 where a question has fewer than a answers}.
    """

    config: BlipConfig

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without a decoder of answers."""
        if not self.config.answers:
            raise MmjaxError("blip: answering needs a text encoder and a decoder that share nothing")

    def example(self, batch: Batch) -> dict[str, Any]:
        return super().example(batch) | {"decoder_ids": batch["answer_ids"][:1, 0]}

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        losses, _ = self.losses(params, batch, rng, axis_name)
        return answer_loss(losses, batch["answer_weights"], len(batch["input_ids"])), (carry, {})

    def losses(
        self, params: Params, batch: Batch, rng: PRNGKeyArray, axis_name: str | None = None
    ) -> tuple[Float[Array, "b a"], Float[Array, "b a t v"]]:
        """The loss of each answer, summed over its tokens, and the logits of the token after each; in training mode."""
        axis, mask = {"axis_name": axis_name}, batch["attention_mask"]
        tokens = self.run(params, "encode_image", self.pixels(batch["image"]), rng=named(rng, "image"), **axis)
        questions = with_first(batch["input_ids"], self.config.enc)
        inputs = (questions, mask, tokens)
        states = self.run(params, "encode_multimodal", *inputs, rng=named(rng, "multimodal"), **axis)
        b, a, t = batch["answer_ids"].shape
        answers, answers_mask = (batch[name].reshape(b * a, t) for name in ("answer_ids", "answer_mask"))
        answers = with_first(answers, self.config.bos)
        context = (jnp.repeat(x, a, axis=0) for x in (states, mask))
        logits = self.run(params, "decode", answers, answers_mask, *context, rng=named(rng, "decode"), **axis)
        labels = next_tokens(answers, answers_mask)
        losses = text_cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        return losses.reshape(b, a), logits.reshape(b, a, t, -1)


@dataclass(frozen=True)
class BlipClassification(ForwardPasses):
    """Classes of texts about two images: NLVR2 (models/blip_nlvr.py).

    Batches: {"image_0", "image_1": [b, h, w, 3]; "input_ids", "attention_mask": [b, l]; "label": int32 [b]}.
    Metric: accuracy in [0, 1].
    """

    config: BlipConfig

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without classes, or of one image."""
        if not (self.config.classes and self.config.two_images):
            raise MmjaxError("blip: classification needs classes, and a text encoder of two images (merge_from)")

    def example(self, batch: Batch) -> dict[str, Any]:
        example = super().example({**batch, "image": batch["image_0"]})
        return example | {"other_images": self.pixels(batch["image_1"][:1])}

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        logits = self.logits(params, batch, rng, axis_name)
        value = jnp.mean(softmax_cross_entropy(logits, batch["label"]))
        return value, (carry, {"accuracy": jnp.mean(hits(logits, batch["label"]))})

    def logits(
        self, params: Params, batch: Batch, rng: PRNGKeyArray, axis_name: str | None = None
    ) -> Float[Array, "b c"]:
        """In training mode."""
        axis = {"axis_name": axis_name}
        tokens = [
            self.run(params, "encode_image", self.pixels(batch[name]), rng=named(rng, name), **axis)
            for name in ("image_0", "image_1")
        ]
        inputs = (with_first(batch["input_ids"], self.config.enc), batch["attention_mask"], *tokens)
        states = self.run(params, "encode_multimodal", *inputs, rng=named(rng, "multimodal"), **axis)
        return self.head(params, "classify", states)
