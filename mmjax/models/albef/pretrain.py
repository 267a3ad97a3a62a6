"""ALBEF's pre-training: contrast, matching, and words under an image (arXiv 2107.07651; model_pretrain.py:88-214)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.models.albef.network import AlbefConfig
from mmjax.objectives.language import IGNORED, distilled_token_cross_entropy, group_mean_weights, token_accuracy
from mmjax.training.image_text import Alignment, Encoded, clamped_temperature
from mmjax.training.rng import example_keys, named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray


@dataclass(frozen=True)
class AlbefPretraining(Alignment):
    """The sum of contrast_loss, matching_loss and mlm_loss. Batches as for `Alignment`, without ids of images.

    Metrics: mlm_accuracy in [0, 1], temperature, and those of `matching_metrics`.

    Attributes:
        mask_id: the id of [MASK].
        special: ids that are never masked: [PAD] and [CLS].
        mask_rate: each other token is masked with this probability, independently.
    """

    config: AlbefConfig
    mask_id: int = 103
    special: tuple[int, ...] = (0, 101)
    mask_rate: float = 0.15

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without MLM head, projections or ITM head."""
        c = self.config
        if not (c.text.mlm and c.embed_dim and c.matching) or c.by_image:
            raise MmjaxError("albef: pre-training needs text.mlm, embed_dim, matching, and no by_image")

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
        masked = self.masks(batch, rng, axis_name)
        loss, metrics, _ = self.mlm_loss(params, carry, batch, encoded, masked, alpha, rng, axis_name)
        return {"mlm_loss": loss}, metrics

    def masks(
        self, batch: Batch, rng: PRNGKeyArray, axis_name: str | None
    ) -> tuple[Int[Array, "b l"], Int[Array, "b l"]]:
        """`masked` of each text."""
        keys = example_keys(named(rng, "masks"), len(batch["input_ids"]), axis_name)
        return jax.vmap(self.masked)(keys, batch["input_ids"])

    def masked(self, key: PRNGKeyArray, ids: Int[Array, "l"]) -> tuple[Int[Array, "l"], Int[Array, "l"]]:
        """(ids, labels) of one text: 80 % of the masked tokens are [MASK], 10 % a random id, 10 % unchanged.

        Labels are the ids of masked tokens, and IGNORED elsewhere (model_pretrain.py:253-276)."""
        chosen, kind, other = jax.random.split(key, 3)
        is_masked = jax.random.bernoulli(chosen, self.mask_rate, ids.shape)
        is_masked &= ~jnp.isin(ids, jnp.asarray(self.special))
        kind = jax.random.uniform(kind, ids.shape)
        random_ids = jax.random.randint(other, ids.shape, 0, self.config.text.vocab_size)
        replacement = jnp.where(kind < 0.8, self.mask_id, jnp.where(kind < 0.9, random_ids, ids))
        return jnp.where(is_masked, replacement, ids), jnp.where(is_masked, ids, IGNORED)

    def mlm_loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        encoded: Encoded,
        masked: tuple[Int[Array, "b l"], Int[Array, "b l"]],
        alpha: Float[Array, ""],
        rng: PRNGKeyArray,
        axis_name: str | None,
    ) -> tuple[Mean, Means, tuple[Float[Array, "b l v"], Float[Array, "b l v"]]]:
        """The loss, its metrics, and the logits of the network and of its momentum copy, each with its image states.

        masked: ids and labels as `masked` makes them. The loss is the mean of the groups' means over masked tokens.
        """
        ids, labels = masked

        def logits(params: Params, image: Array, who: str) -> Array:
            mask, keys = batch["attention_mask"], [named(rng, f"{who}/mlm/{part}") for part in ("text", "multimodal")]
            states = self.run(params, "encode_text", ids, mask, axis_name=axis_name, rng=keys[0])
            states = self.run(params, "encode_multimodal", states, mask, image, axis_name=axis_name, rng=keys[1])
            return self.head(params, "mlm_logits", states)

        student = logits(params, encoded.image, "student")
        teacher = logits(self.teacher(params, carry), encoded.teacher_image, "teacher")
        weights = group_mean_weights(labels, self.groups, axis_name)
        loss = distilled_token_cross_entropy(student, teacher, labels, alpha, weights).loss
        return loss, {"mlm_accuracy": token_accuracy(student, labels)}, (student, teacher)

    def constrain(self, params: Params) -> Params:
        """The temperature stays within its bounds."""
        return clamped_temperature(params)
