"""Training a language model on the next token: pretraining, and instruction tuning where only answers count."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mmjax.models.language.network import Decoder, DecoderConfig, output_layer
from mmjax.objectives.language import linear_cross_entropy, next_tokens
from mmjax.training.method import Loss, Method
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray


@dataclass(frozen=True)
class CausalLM(Method):
    """Batches {"input_ids" [b, l], "labels" [b, l]}, int32: labels are the ids, -100 for ignored tokens.

    "inputs_embeds" [b, l, d] may replace the ids: a prompt with images in it. "attention_mask" [b, l]: 1 = a token.

    The loss is the mean over all labels but each text's first, computed without the logits of a whole batch in memory.
    A batch without any label has the loss NaN, which the step refuses and counts.

    Attributes:
        z_loss: factor on log^2 of the softmax's normaliser (PaLM, arXiv 2204.02311, section 5).
    """

    config: DecoderConfig
    z_loss: float = 0.0

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Uses only the shapes of `batch`."""
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
        """The loss; metrics: nll, in nats a token, and tokens_per_text, the number of counted tokens."""
        labels, layer = next_tokens(batch["labels"]), output_layer(params, self.config)
        outputs = linear_cross_entropy(self._hidden(params, batch), labels=labels, z_loss=self.z_loss, **layer)
        texts = jnp.float32(len(labels))
        return outputs.loss, (carry, {"nll": outputs.nll, "tokens_per_text": Mean(outputs.loss.count, texts)})

    def _hidden(self, params: Params, batch: Batch) -> Float[Array, "b l d"]:
        """The normalised hidden states, the input of the head."""

        def last(decoder: Decoder) -> Array:
            embeds = batch["inputs_embeds"] if "inputs_embeds" in batch else decoder.embed(batch["input_ids"])
            return decoder.hidden(embeds, batch.get("attention_mask"))

        hidden: Any = Decoder(self.config).apply({"params": params}, method=last)
        return hidden

    def logits(self, params: Params, ids: Array, mask: Array) -> Float[Array, "b l v"]:
        """For evaluations; see `mmjax.evaluation.perplexity`."""
        outputs: Any = Decoder(self.config).apply({"params": params}, ids, mask)
        return outputs["logits"]
