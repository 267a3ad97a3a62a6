"""ALBEF's losses over cached states of frozen encoders: projections, multimodal layers and heads train.

A step costs a small part of the whole network's: both encoders run once per image and text, before training.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.albef.finetune import AlbefRetrieval
from mmjax.objectives.language import distilled_token_cross_entropy, token_accuracy
from mmjax.training.image_text import Encoded
from mmjax.training.partition import Partition
from mmjax.training.rng import named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray


@dataclass(frozen=True)
class CachedAlbef(AlbefRetrieval):
    """ITC; ITM, if the network has the ITM head; MLM, if it has the MLM head. One device.

    Batches: {"image": [b, n, d], "text": [b, l, d]: states, float16; "input_ids", "attention_mask", "image_id"}, and
    for MLM "masked_text" [b, l, d]: states of a text with masked pieces, "masked_positions" and "masked_labels": int32
    [b, m], `IGNORED` where there is none.

    Attributes:
        side: of the images in pixels.
    """

    side: int = 224

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without projections or image ids."""
        if not (self.config.embed_dim and self.config.by_image):
            raise MmjaxError("albef: cached states need embed_dim and by_image")

    def example(self, batch: Batch) -> dict[str, Any]:
        return super().example({**batch, "image": jnp.zeros((1, self.side, self.side, 3))})

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """The momentum copy is of the trained parts alone."""
        params, carry = super().init(rng, batch)
        momentum = {part: params[part] for part in ("vision", *carry.ema)}
        trained, _ = Partition(frozen_rules(self.config.text.cross_from or 0)).split(momentum)
        return params, dataclasses.replace(carry, ema=trained)

    def teacher(self, params: Params, carry: Carry) -> Params:
        return jax.lax.stop_gradient(tree.overlay(params, carry.ema))

    def encode(self, params: Params, carry: Carry, batch: Batch, rng: PRNGKeyArray, axis_name: str | None) -> Encoded:
        image, text = (batch[name].astype(jnp.float32) for name in ("image", "text"))

        def embeds(params: Params) -> tuple[Array, Array]:
            return self.head(params, "image_embeds", image), self.head(params, "text_embeds", text)

        return Encoded(image, text, *embeds(params), image, *embeds(self.teacher(params, carry)))

    def pair_states(
        self,
        params: Params,
        batch: Batch,
        encoded: Encoded,
        negatives: tuple[Int[Array, "b"], Int[Array, "b"]],
        rng: PRNGKeyArray,
        axis_name: str | None,
    ) -> Float[Array, "three_b 1 d"]:
        """One pass, in which the keys and values of each image are computed once for all its texts."""
        every = jnp.arange(len(encoded.text))
        images = jnp.concatenate([every, negatives[0], every])
        texts = jnp.concatenate([every, every, negatives[1]])
        inputs = encoded.text[texts], batch["attention_mask"][texts], encoded.image
        options: Any = {"image_index": images, "outputs": 1, "rngs": {"dropout": named(rng, "multimodal")}}
        network, variables = self.config.network(), {"params": params}
        states: Any = network.apply(variables, *inputs, train=True, method="encode_multimodal", **options)
        return states

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
        """mlm_loss, with the momentum copy's words as soft targets."""
        if not self.config.text.mlm:
            return {}, {}
        text, labels = batch["masked_text"].astype(jnp.float32), batch["masked_labels"]

        def logits(params: Params, who: str) -> Float[Array, "b m v"]:
            inputs, key = (text, batch["attention_mask"], encoded.image), named(rng, f"{who}/mlm")
            states = self.run(params, "encode_multimodal", *inputs, axis_name=axis_name, rng=key)
            return self.head(params, "mlm_logits", states, batch["masked_positions"])

        student, teacher = logits(params, "student"), logits(self.teacher(params, carry), "teacher")
        loss = distilled_token_cross_entropy(student, teacher, labels, alpha).loss
        return {"mlm_loss": loss}, {"mlm_accuracy": token_accuracy(student, labels)}

    def head(self, params: Params, name: str, *inputs: Any) -> Any:
        """Of images whose states are cached, the encoder's outputs are the inputs. Of a pair the ITM head needs the
        first token alone."""
        if name == "encode_image":
            return inputs[0].astype(jnp.float32)
        if name == "encode_pair":
            _, mask, text, image = inputs
            return super().head(params, "encode_multimodal", text, mask, image, None, False, None, 1)
        return super().head(params, name, *inputs)


def frozen_rules(text_depth: int) -> dict[str, str]:
    """Rules for a `Partition` that freezes the encoders: of the text's blocks those without cross attention."""
    blocks = (f"text/encoder/block_{i}/**" for i in range(text_depth))
    return dict.fromkeys(("vision/**", "text/embeddings/**", *blocks), "frozen")
