"""BLIP-2's first stage of pre-training: contrast, matching and captions, from one image pass (arXiv 2301.12597, section
3.1; LAVIS blip2_qformer.py:90-275)."""

from dataclasses import dataclass
from typing import ClassVar

from flax import struct

from mmjax.errors import MmjaxError
from mmjax.models.blip.network import with_first
from mmjax.models.blip2.network import Blip2Config
from mmjax.nn.stack import LayerCache
from mmjax.objectives.contrastive import nearest_query_loss
from mmjax.training.image_text import LABEL_SMOOTHING, EncodedPairs, Matching, caption_loss
from mmjax.training.method import Loss
from mmjax.training.rng import named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray


@struct.dataclass
class EncodedQueries(EncodedPairs):
    """caches: keys and values of the queries, to which captions attend."""

    caches: list[LayerCache]


@dataclass(frozen=True)
class Blip2Pretraining(Matching):
    """The sum of contrast_loss, matching_loss and lm_loss.

    Batches: {"image": [b, h, w, 3], uint8 or normalised floats; "input_ids": int32 [b, l], [CLS] first, [SEP] last;
    "attention_mask": [b, l], 1 = a token; with `config.by_image` "image_id": int32 [b]}. `FROZEN_TOWER` are the rules
    of the partition. Contrast and hard negatives are over the whole batch, of all devices. Metrics: lm_accuracy of
    next tokens in [0, 1], temperature, which is not clamped, and those of `matching_metrics`.

    Attributes:
        negative_groups: None: the whole batch. groups: parts of the batch in which captions have a mean of their own;
            one a process in the original (16).
        detached: see `nearest_query_loss`: True is what the original does in several processes, False in one.
    """

    matching_tokens: ClassVar[int | None] = None

    config: Blip2Config
    negative_groups: int | None = 1
    detached: bool = False

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without LM head or temperature, such as Hugging Face's."""
        if not self.config.qformer.mlm or self.config.temperature is None:
            raise MmjaxError("blip2: pre-training needs a qformer with mlm=True, and a temperature")

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        encoded = self.encode(params, batch, rng, axis_name)
        negatives = self.negatives(params, batch, encoded, rng, step, axis_name)
        contrast = self.itc_loss(params, batch, encoded, axis_name)
        matching, metrics, _ = self.itm_loss(params, batch, encoded, negatives, rng, axis_name)
        captions, caption_metrics, _ = self.lm_loss(params, batch, encoded, rng, axis_name)
        losses = {"contrast_loss": contrast, "matching_loss": matching, "lm_loss": captions}
        return losses, (carry, {**metrics, **caption_metrics, "temperature": params["temperature"]})

    def encode(self, params: Params, batch: Batch, rng: PRNGKeyArray, axis_name: str | None) -> EncodedQueries:
        """The image's tokens, the queries over them, and the text alone."""
        keys = {name: named(rng, name) for name in ("image", "queries", "text")}
        pixels, texts = self.pixels(batch["image"]), (batch["input_ids"], batch["attention_mask"])
        tokens = self.run(params, "encode_image", pixels, axis_name=axis_name, rng=keys["image"])
        states, caches = self.run(params, "encode_queries", tokens, axis_name=axis_name, rng=keys["queries"])
        text = self.run(params, "encode_text", *texts, axis_name=axis_name, rng=keys["text"])
        embeds = self.head(params, "project_queries", states), self.head(params, "text_embeds", text)
        return EncodedQueries(tokens, text, *embeds, caches)

    def multimodal_texts(self, batch: Batch, encoded: EncodedPairs) -> Int[Array, "b l"]:
        """The ids, [CLS] first: queries and text attend to each other from the embeddings on."""
        return batch["input_ids"]

    def itc_loss(self, params: Params, batch: Batch, encoded: EncodedPairs, axis_name: str | None) -> Float[Array, ""]:
        """Contrast within the batch, by the nearest query."""
        return nearest_query_loss(
            encoded.image_embeds,
            encoded.text_embeds,
            params["temperature"],
            label_smoothing=LABEL_SMOOTHING,
            ids=self._ids(batch),
            detached=self.detached,
            axis_name=axis_name,
        )

    def lm_loss(
        self, params: Params, batch: Batch, encoded: EncodedQueries, rng: PRNGKeyArray, axis_name: str | None
    ) -> tuple[Mean, Means, Float[Array, "b l v"]]:
        """The loss of the texts' next tokens after the queries, its metrics, and the logits. [DEC] is first; gradients
        flow through the queries' keys and values into their pass."""
        ids, mask = with_first(batch["input_ids"], self.config.bos), batch["attention_mask"]
        logits = self.run(params, "decode", ids, mask, encoded.caches, axis_name=axis_name, rng=named(rng, "decode"))
        return *caption_loss(logits, ids, mask, self.groups, axis_name), logits
