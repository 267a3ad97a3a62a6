"""Training on the answers to prompts with images: LLaVA's two stages, BLIP-2's second one, and all that put features in
a prompt."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.models.language import network as decoder
from mmjax.models.t5 import network as t5
from mmjax.models.vision_language.network import VisionLanguage, VisionLanguageConfig
from mmjax.objectives.language import linear_cross_entropy, next_tokens, shift_right
from mmjax.training.method import Loss, Method
from mmjax.training.rng import named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Mean, Means, Params, PRNGKeyArray


@dataclass(frozen=True)
class PrefixLM(Method):
    """Next tokens after a prefix with images; what is trained is the optimizer's partition.

    Batches: {"image": [b, k, h, w, 3], the pictures of each row, uint8 or normalised floats; "input_ids",
    "attention_mask", "labels", "feature_index": int32 [b, l]}. labels: ids, -100 for what is not learned.
    feature_index: -1 for a token, else the number of a feature among those of the row's pictures, feature j of picture
    i being i * p + j; k * p is the newline. A row without images has pictures too, which it does not use: all batches
    run the same program. Of an encoder-decoder these columns are the encoder's, but labels int32 [b, t] the decoder's.
    Of a connector that sees texts "query_ids" and "query_mask" int32 [b, t] are the text of each row. Of
    a resampler "token_index" and "token_mask" [b, k, p] may be there, see `VisionLanguage.encode_image`; token j of
    picture i of the row is i * p + j.

    The loss is the mean over all labels, computed without the logits of a whole batch in memory. A batch without any
    has the loss NaN, which the step refuses and counts. Metrics: nll, in nats a token, and supervised_tokens a row.

    Attributes:
        mean, std: of the channels in [0, 1], for uint8 images.
    """

    config: VisionLanguageConfig
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """Uses only the shapes of `batch`."""
        pixels = jnp.zeros((1, *batch["image"].shape[2:]))
        ids, labels = (jnp.zeros((1, batch[name].shape[1]), jnp.int32) for name in ("input_ids", "labels"))
        text = jnp.zeros((1, batch["query_ids"].shape[1]), jnp.int32) if "query_ids" in batch else None
        arrays = (ids, ids, None, labels if self.config.encodes else None, text)
        return VisionLanguage(self.config).init(rng, pixels, *arrays)["params"], Carry()

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        hidden = self._run(params, batch, "hidden", axis_name, named(rng, "dropout"))
        if self.config.encodes:
            labels, layer = batch["labels"], t5.output_layer(params["language"], self.config.decoder)
        else:
            labels = next_tokens(batch["labels"])
            layer = decoder.output_layer(params["language"], self.config.decoder)
        outputs = linear_cross_entropy(hidden, labels=labels, **layer)
        counted = Mean(outputs.loss.count, jnp.float32(len(labels)))
        return outputs.loss, (carry, {"nll": outputs.nll, "supervised_tokens": counted})

    def logits(self, params: Params, batch: Batch) -> Float[Array, "b l v"]:
        """float32, for evaluations."""
        return self._run(params, batch, "decode", None)["logits"]

    def _run(
        self, params: Params, batch: Batch, method: str, axis_name: str | None, rng: PRNGKeyArray | None = None
    ) -> Any:
        """rng: of the connector's dropout; None: without. The tower and the language model have none."""
        c, network, variables = self.config, VisionLanguage(self.config, axis_name), {"params": params}
        pictures = batch["image"].shape[1]
        texts = [batch.get(name) for name in ("query_ids", "query_mask")]
        texts = [None if text is None else jnp.repeat(text, pictures, axis=0) for text in texts]
        arrays = (self._pixels(batch["image"]), *texts, rng is not None)
        rngs = {} if rng is None else {"dropout": rng}
        tokens = picture_tokens(batch)
        features: Any = network.apply(variables, *arrays, **tokens, method="encode_image", rngs=rngs)
        index = self._rows(batch["feature_index"], pictures, features.shape[1])
        embeds = network.apply(variables, batch["input_ids"], index, features, method="embed")
        decoder_ids = shift_right(batch["labels"], c.decoder.start, c.decoder.pad) if c.encodes else None
        return network.apply(variables, embeds, batch["attention_mask"], decoder_ids, method=method)

    def _pixels(self, images: Array) -> Array:
        """[b, k, h, w, 3] -> normalised float32 [b * k, h, w, 3]."""
        pixels = images.reshape(-1, *images.shape[2:])
        if pixels.dtype != jnp.uint8:
            return pixels
        if self.mean is None or self.std is None:
            raise MmjaxError("uint8 images need mean and std; floats are taken as normalised")
        return (pixels.astype(jnp.float32) / 255 - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def _rows(self, index: Int[Array, "b l"], pictures: int, tokens: int) -> Int[Array, "b l"]:
        """A row's features among those of the whole batch; its newline is the one of all."""
        b, own = index.shape[0], pictures * tokens
        rows = jnp.where(index == own, b * own, index + own * jnp.arange(b)[:, None])
        return jnp.where(index < 0, -1, rows)


def picture_tokens(batch: Batch) -> dict[str, Any]:
    """ "token_index" and "token_mask" of a batch, where it has them, as `VisionLanguage.encode_image` takes them."""
    if "token_index" not in batch:
        return {}
    index, mask = batch["token_index"], batch["token_mask"]
    b, k, p = index.shape
    rows = index + k * p * jnp.arange(b)[:, None, None]
    return {"token_index": rows.reshape(b * k, p), "token_mask": mask.reshape(b * k, p)}
