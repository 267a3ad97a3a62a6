"""ALBEF's fine-tuning: retrieval, entailment, pairs of images, answers to questions (arXiv 2107.07651, section 5)."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.models.albef.network import AlbefConfig
from mmjax.objectives.classification import hits
from mmjax.objectives.distillation import distilled_cross_entropy
from mmjax.objectives.language import IGNORED, answer_loss, distilled_text_cross_entropy
from mmjax.training.image_text import Alignment, MomentumDistillation
from mmjax.training.method import Loss
from mmjax.training.rng import named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Means, Params, PRNGKeyArray


@dataclass(frozen=True)
class AlbefRetrieval(Alignment):
    """The sum of contrast_loss and matching_loss, in which all pairs of an image are right (model_retrieval.py).

    Batches: see `Alignment`. Metrics: temperature, which is not clamped, and those of `matching_metrics`.
    """

    config: AlbefConfig

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without projections, ITM head or image ids."""
        c = self.config
        if not (c.embed_dim and c.matching and c.by_image):
            raise MmjaxError("albef: retrieval needs embed_dim, matching and by_image")


@dataclass(frozen=True)
class AlbefClassification(MomentumDistillation):
    """Classes of texts and images: SNLI-VE (model_ve.py) and, with `config.two_images`, NLVR2 (model_nlvr.py).

    Batches: {"image": [b, h, w, 3], with `two_images` "image_0" and "image_1"; "input_ids", "attention_mask": [b, l];
    "label": int32 [b]}.
    Metric: accuracy in [0, 1].
    """

    config: AlbefConfig

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without classes."""
        if not self.config.classes:
            raise MmjaxError("albef: classification needs classes of 1 or more")

    def example(self, batch: Batch) -> dict[str, Any]:
        if not self.config.two_images:
            return super().example(batch)
        return super().example({**batch, "image": batch["image_0"]}) | {
            "other_images": self.pixels(batch["image_1"][:1])
        }

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        student = self.logits(params, batch, named(rng, "student"), axis_name)
        teacher = self.logits(self.teacher(params, carry), batch, named(rng, "teacher"), axis_name)
        value = jnp.mean(distilled_cross_entropy(student, teacher, batch["label"], self.alpha(carry, step)))
        return value, (carry, {"accuracy": jnp.mean(hits(student, batch["label"]))})

    def logits(
        self, params: Params, batch: Batch, rng: PRNGKeyArray, axis_name: str | None = None
    ) -> Float[Array, "b c"]:
        """In training mode."""
        axis = {"axis_name": axis_name}
        tokens = [
            self.run(params, "encode_image", self.pixels(batch[name]), rng=named(rng, name), **axis)
            for name in (("image_0", "image_1") if self.config.two_images else ("image",))
        ]
        mask = batch["attention_mask"]
        states = self.run(params, "encode_text", batch["input_ids"], mask, rng=named(rng, "text"), **axis)
        states = self.run(params, "encode_multimodal", states, mask, *tokens, rng=named(rng, "multimodal"), **axis)
        return self.head(params, "classify", states)


@dataclass(frozen=True)
class AlbefAnswering(MomentumDistillation):
    """Answers to questions about images, token by token (model_vqa.py).

    Batches: {"image": [b, h, w, 3]; "input_ids", "attention_mask": questions [b, l]; "answer_ids": int32 [b, a, t],
    [CLS] first, [SEP] last and padding after it; "answer_mask": [b, a, t], 1 = a token; "answer_weights": float32
    [b, a], 0 where a question has fewer than a answers}.
    """

    config: AlbefConfig

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without a decoder."""
        if self.config.decoder is None:
            raise MmjaxError("albef: answering needs a decoder")

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
        losses, _ = self.losses(params, carry, batch, rng, step, axis_name)
        return answer_loss(losses, batch["answer_weights"], len(batch["input_ids"])), (carry, {})

    def losses(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Float[Array, "b a"], tuple[Float[Array, "b a t v"], Float[Array, "b a t v"]]]:
        """The loss of each answer, summed over its tokens; and the logits of student and teacher."""
        student = self.logits(params, batch, named(rng, "student"), axis_name)
        teacher = self.logits(self.teacher(params, carry), batch, named(rng, "teacher"), axis_name)
        labels = jnp.where(batch["answer_mask"] == 1, batch["answer_ids"], IGNORED)[..., 1:]
        alpha = self.alpha(carry, step)
        losses = distilled_text_cross_entropy(student[..., :-1, :], teacher[..., :-1, :], labels, alpha)
        return losses, (student, teacher)

    def logits(
        self, params: Params, batch: Batch, rng: PRNGKeyArray, axis_name: str | None = None
    ) -> Float[Array, "b a t v"]:
        """In training mode: of the token after each token of each answer."""
        axis, mask = {"axis_name": axis_name}, batch["attention_mask"]
        tokens = self.run(params, "encode_image", self.pixels(batch["image"]), rng=named(rng, "image"), **axis)
        states = self.run(params, "encode_text", batch["input_ids"], mask, rng=named(rng, "text"), **axis)
        states = self.run(params, "encode_multimodal", states, mask, tokens, rng=named(rng, "multimodal"), **axis)
        b, a, t = batch["answer_ids"].shape

        def per_answer(x: Array) -> Array:
            return jnp.repeat(x, a, axis=0)

        answers, answers_mask = (batch[name].reshape(b * a, t) for name in ("answer_ids", "answer_mask"))
        inputs = answers, answers_mask, per_answer(states), per_answer(mask)
        logits = self.run(params, "decode", *inputs, rng=named(rng, "decode"), **axis)
        return logits.reshape(b, a, t, -1)
