"""Training a language model to tell the next token: pretraining, and instruction tuning where only answers count."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mmjax.models.language.network import Decoder, DecoderConfig
from mmjax.objectives.language import linear_cross_entropy, next_tokens
from mmjax.training.method import Loss, Method
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray


@dataclass(frozen=True)
class CausalLM(Method):
    """Batches {"input_ids" [b, l], "labels" [b, l]}, int32: labels are the ids, -100 where nothing is learned.

    The loss is the mean over all labels but each text's first, taken without ever holding the logits of a whole batch.
    A batch without any label has the loss NaN, which the step refuses and counts.

    Attributes:
        z_loss: factor on log^2 of the softmax's normaliser (PaLM, arXiv 2204.02311, section 5).
    """

    config: DecoderConfig
    z_loss: float = 0.0

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Reads the shapes alone of `batch`."""
        variables: Any = Decoder(self.config).init(rng, jnp.zeros((1, batch["input_ids"].shape[1]), jnp.int32))
        return variables["params"], Carry()

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        """The loss; metrics: nll, in nats a token, and tokens_per_text, how many were counted."""
        hidden, kernel = self._last(params, batch["input_ids"])
        labels = next_tokens(batch["labels"])
        told = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            kernel,
            labels.reshape(-1),
            tied=self.config.tied,
            z_loss=self.z_loss,
        )
        texts = jnp.float32(len(labels))
        return told.loss, (carry, {"nll": told.nll, "tokens_per_text": Mean(told.loss.count, texts)})

    def _last(self, params: Params, ids: Array) -> tuple[Array, Array]:
        """(normed states [b, l, d] as the head takes them, the head's matrix or the embedding)."""

        def last(decoder: Decoder) -> Array:
            return decoder.hidden(decoder.embed(ids))

        hidden: Any = Decoder(self.config).apply({"params": params}, method=last)
        return hidden, params["token_embedding"] if self.config.tied else params["head"]["kernel"]

    def logits(self, params: Params, ids: Array, mask: Array) -> Float[Array, "b l v"]:
        """For evaluations; see `mmjax.evaluation.perplexity`."""
        told: Any = Decoder(self.config).apply({"params": params}, ids, mask)
        return told["logits"]
