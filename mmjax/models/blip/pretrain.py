"""BLIP's pre-training: contrast, matching and language modelling from one image pass (arXiv 2201.12086, section 3.2;
blip_pretrain.py:97-212)."""

from dataclasses import dataclass
from typing import ClassVar

from mmjax.errors import MmjaxError
from mmjax.models.blip.network import BlipConfig, with_first
from mmjax.training.image_text import Alignment, Encoded, EncodedPairs, caption_loss, clamped_temperature
from mmjax.training.rng import named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray


@dataclass(frozen=True)
class BlipAlignment(Alignment):
    """What pre-training and retrieval share: ids for the image-grounded encoder begin with [ENC], and the temperature
    is clamped. Batches as for `Alignment`; texts end with [SEP]."""

    config: BlipConfig

    def multimodal_texts(self, batch: Batch, encoded: EncodedPairs) -> Int[Array, "b l"]:
        """The ids with [ENC] first: the image-grounded encoder begins at the embeddings."""
        return with_first(batch["input_ids"], self.config.enc)

    def constrain(self, params: Params) -> Params:
        """The temperature stays within its bounds."""
        return clamped_temperature(params)


@dataclass(frozen=True)
class BlipPretraining(BlipAlignment):
    """The sum of contrast_loss, matching_loss and lm_loss. Batches as for `Alignment`, without ids of images.

    Hard negatives are of the batch's part (`groups`), by the similarity of the encoders to the momentum encoders;
    1e-4 is added to each softmax. alpha rises over two epochs in the original (`alpha_steps`). Metrics: lm_accuracy of
    next tokens in [0, 1], temperature, and those of `matching_metrics`.
    """

    negative_floor: ClassVar[float] = 1e-4

    def __post_init__(self) -> None:
        """Raises MmjaxError for a network without decoder, projections or ITM head."""
        c = self.config
        if not (c.shared and c.embed_dim and c.matching) or c.by_image:
            raise MmjaxError("blip: pre-training needs shared, a decoder, embed_dim, matching, and no by_image")

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
        loss, metrics, _ = self.lm_loss(params, batch, encoded, rng, axis_name)
        return {"lm_loss": loss}, metrics

    def lm_loss(
        self, params: Params, batch: Batch, encoded: Encoded, rng: PRNGKeyArray, axis_name: str | None
    ) -> tuple[Mean, Means, Float[Array, "b l v"]]:
        """The loss of the texts' next tokens under their images, its metrics, and the logits.

        [DEC] is first, [SEP] is a target. The loss is the mean of the groups' means over tokens.
        """
        texts = with_first(batch["input_ids"], self.config.bos), batch["attention_mask"]
        logits = self.run(params, "decode", *texts, encoded.image, axis_name=axis_name, rng=named(rng, "decode"))
        return *caption_loss(logits, *texts, self.groups, axis_name), logits
