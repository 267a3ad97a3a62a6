"""Retrieval in two stages by one network: the nearest by their features, then the ITM head (ALBEF Retrieval.py:72-219).

stages = TwoStages(method.head, method.pixels)
evaluation = RerankEvaluation(
    reranker=stages.reranker(k=128, add_similarity=False), first=functools.partial(stages.first, images, texts)
)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.evaluation.features import batched, similarities
from mmjax.evaluation.rerank import PairScorer, Reranker
from mmjax.types import Array, ArrayLike, Float, Params

Apply = Callable[..., Any]
"""(params, the name of a method of the network, *its arrays) -> its output in evaluation; pure."""
Similarity = Callable[[Array, Array], Array]
"""(features of images [n, ...], features of texts [m, ...]) -> similarities [n, m]."""


@dataclasses.dataclass(frozen=True, eq=False)
class TwoStages:
    """Both stages, compiled once for each shape and for all parameters.

    Attributes:
        apply: of a network with the methods encode_image(pixels), encode_text(ids, mask), image_embeds(image states),
            text_embeds(text states), encode_pair(ids, mask, text states, image states) and itm_logits(pair states).
        pixels: images as they come -> the network's pixel values; pure.
        batch_size: images or texts that an encoder takes at a time.
        similarity: of features.
    """

    apply: Apply
    pixels: Callable[[Array], Array] = lambda images: images
    batch_size: int = 64
    similarity: Similarity = similarities

    def reranker(self, k: int, add_similarity: bool) -> Reranker:
        """The second stage for whole data sets. k, add_similarity: see `Reranker`."""
        return Reranker(self.match, k, add_similarity)

    @functools.cached_property
    def scorer(self) -> PairScorer:
        """The second stage for pairs."""
        return PairScorer(self.match)

    def first(
        self, images: ArrayLike, texts: Mapping[str, ArrayLike], params: Params, state: Any = None
    ) -> tuple[Float[Array, "n m"], dict[str, Array]]:
        """Similarities, and the states of all images and texts for `match`: 8.9 GB in float32 for COCO's 5,000 images
        of 384 pixels.

        images: [n, height, width, 3] as `pixels` takes them. texts: "input_ids", "attention_mask" [m, l].
        """
        ids, mask = np.asarray(texts["input_ids"]), np.asarray(texts["attention_mask"])
        image_states, image_embeds = self._run(params, ("encode_image", "image_embeds"), np.asarray(images))
        text_states, text_embeds = self._run(params, ("encode_text", "text_embeds"), ids, mask)
        states = {"images": image_states, "texts": text_states, "ids": jnp.asarray(ids), "mask": jnp.asarray(mask)}
        return self.similarity(image_embeds, text_embeds), states

    def match(self, params: Params, states: Mapping[str, Array], pairs: Mapping[str, Array]) -> Float[Array, "b t"]:
        """The ITM head's logit of class 1 for each image with each of its texts, all given by index."""
        b, t = pairs["texts"].shape
        texts = pairs["texts"].reshape(-1)
        images = jnp.repeat(states["images"][pairs["image"]], t, axis=0)
        text = (states[name][texts] for name in ("ids", "mask", "texts"))
        return self.apply(params, "itm_logits", self.apply(params, "encode_pair", *text, images))[:, 1].reshape(b, t)

    def image_features(self, params: Params, images: ArrayLike, batch_size: int | None = None) -> Float[Array, "n e"]:
        """The features alone; states of whole data sets would not fit into memory."""
        return self._run(params, ("encode_image", "image_embeds"), images, last=True, batch_size=batch_size)

    def text_features(
        self, params: Params, ids: ArrayLike, mask: ArrayLike, batch_size: int | None = None
    ) -> Float[Array, "m e"]:
        return self._run(params, ("encode_text", "text_embeds"), ids, mask, last=True, batch_size=batch_size)

    def _run(
        self,
        params: Params,
        names: tuple[str, ...],
        *arrays: ArrayLike,
        last: bool = False,
        batch_size: int | None = None,
    ) -> Any:
        """The outputs of the network's methods of these names, applied in order, batch by batch; or the last alone."""
        outputs = batched(
            functools.partial(self._compiled, params, names, last), batch_size or self.batch_size, *arrays
        )
        return outputs[0] if last else outputs

    @functools.cached_property
    def _compiled(self) -> Any:
        def run(params: Params, names: tuple[str, ...], last: bool, *arrays: Array) -> list[Any]:
            inputs: Any = (self.pixels(arrays[0]),) if names[0] == "encode_image" else arrays
            outputs = []
            for name in names:
                outputs.append(self.apply(params, name, *inputs))
                inputs = outputs[-1:]
            return outputs[-1:] if last else outputs

        return jax.jit(run, static_argnums=(1, 2))
