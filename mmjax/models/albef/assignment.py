"""ALBEF's text assignment, the pre-training for pairs of images (arXiv 2107.07651, section 5; Pretrain_nlvr.py): which
of two images is a text of, if any?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.models.albef.network import AlbefConfig
from mmjax.nn.groups import group_positions, take_in_group
from mmjax.objectives.classification import hits, softmax_cross_entropy
from mmjax.objectives.matching import negative_log_weights, sample_negatives
from mmjax.training.image_text import ForwardPasses
from mmjax.training.method import Loss
from mmjax.training.partition import FROZEN
from mmjax.training.rng import example_keys, named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Means, Params, PRNGKeyArray

TEMPERATURE = 0.07
"""The temperature of the image similarities by which other images are sampled (model_pretrain_nlvr.py)."""
UNTRAINED: Mapping[str, str] = dict.fromkeys(("vision_proj/**", "text_proj/**", "temperature"), FROZEN)
"""A partition's rules for the parameters that the loss does not use. In the original they have no gradient, and so do
not decay either."""


@dataclass(frozen=True)
class TextAssignment(ForwardPasses):
    """Each text is encoded with two images: its own and another in either order, or two others.

    Batches: {"image": [b, h, w, 3], uint8 or normalised floats; "input_ids": int32 [b, l], [CLS] first;
    "attention_mask": [b, l], 1 = a token}. Metric: accuracy in [0, 1]. The partition should have the rules `UNTRAINED`.

    Attributes:
        groups: parts of the global batch; a text's other images come from its part. The original has one a process (8).
    """

    config: AlbefConfig
    groups: int = 1

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without the head."""
        if not self.config.assigning:
            raise MmjaxError("albef: text assignment needs assigning")

    def example(self, batch: Batch) -> dict[str, Any]:
        return super().example(batch) | {"other_images": self.pixels(batch["image"][:1])}

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        """Raises MmjaxError for groups of fewer than 3 pairs."""
        mask, axis = batch["attention_mask"], {"axis_name": axis_name}
        image = self.run(params, "encode_image", self.pixels(batch["image"]), rng=named(rng, "image"), **axis)
        first, second, labels = self.draw(self.head(params, "image_embeds", image), rng, axis_name)
        images = [take_in_group(image, indices, self.groups, axis_name) for indices in (first, second)]
        states = self.run(params, "encode_text", batch["input_ids"], mask, rng=named(rng, "text"), **axis)
        states = self.run(params, "encode_multimodal", states, mask, *images, rng=named(rng, "multimodal"), **axis)
        logits = self.head(params, "assign", states)
        value = jnp.mean(softmax_cross_entropy(logits, labels))
        return value, (carry, {"accuracy": jnp.mean(hits(logits, labels))})

    def draw(
        self, image_embeds: Float[Array, "b e"], rng: PRNGKeyArray, axis_name: str | None
    ) -> tuple[Int[Array, "b"], Int[Array, "b"], Int[Array, "b"]]:
        """(index in the group of each text's first image, index of its second, label).

        The label is, with probability 1/3 each, 0: the first image is the text's own, 1: the second one is, 2: neither
        is, and they differ. An image is the more probable, the more similar it is to the text's own.
        """
        weights = negative_log_weights(image_embeds, image_embeds, TEMPERATURE, groups=self.groups, axis_name=axis_name)
        if weights.shape[1] < 3:
            raise MmjaxError(
                f"albef: groups={self.groups}: text assignment draws of 3 images or more, not of a group's "
                f"{weights.shape[1]}"
            )
        keys = [example_keys(named(rng, name), len(weights), axis_name) for name in ("label", "other", "further")]
        labels = jax.vmap(lambda key: jax.random.randint(key, (), 0, 3))(keys[0])
        positive = group_positions(len(weights), self.groups, axis_name)
        negative = sample_negatives(keys[1], weights)
        rest = jnp.where(negative[:, None] == jnp.arange(weights.shape[1]), -jnp.inf, weights)
        second_negative = sample_negatives(keys[2], rest)
        first = jnp.where(labels == 0, positive, negative)
        second = jnp.where(labels == 0, negative, jnp.where(labels == 1, positive, second_negative))
        return first, second, labels
