"""BLIP-2's first stage (arXiv 2301.12597, section 3; LAVIS models/blip2_models/): a frozen image encoder, and a query
transformer (Q-Former) whose queries attend to its tokens, in three roles.

    contrast      queries and text apart: each query's feature against the text's, the nearest counts
    matching      queries and text attend to each other: the mean of all queries' logits
    generation    the text attends to the queries' keys and values and to the text so far, never to the image
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.models.blip.network import with_first
from mmjax.models.blip2.qformer import mask_behind_queries, qformer, query_states
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.nn.kv_cache import KeyValues
from mmjax.nn.masks import causal_mask, padding_mask
from mmjax.nn.norm import l2_normalize
from mmjax.nn.stack import LayerCache
from mmjax.nn.transformer import torch_linear
from mmjax.types import Array, Float, Int, Params

FROZEN_TOWER = {"vision/norm/**": "trainable", "vision/**": "frozen"}
"""The rules of the partition that trains all but the image encoder; its final norm, LAVIS' ln_vision, is trained."""


@dataclass(frozen=True)
class Blip2Config:
    """The sizes; class methods give the published configs.

    Attributes:
        vision: the image encoder; the queries attend to all its tokens after the final norm.
        qformer: the query transformer. With `mlm` it has an LM head, and generates captions.
        queries: their number.
        embed_dim: width of the projections, in which the contrast (ITC) is.
        bos: the id of [DEC], with which generated texts begin.
        sep, pad: the ids of [SEP], which ends every text (None: the tokenizer's), and of padding.
        image_token: the id of transformers' placeholder, of which `queries` may precede the ids of a text in `forward`.
        temperature: of the contrast at the start; it is never clamped. None: it is no parameter (Hugging Face's files).
        by_image: pairs have image ids in the contrast: retrieval.
        dtype: compute dtype; the heads are float32. vision_dtype: of the image encoder, None: the same.
    """

    vision: ViTConfig
    qformer: BertConfig
    queries: int = 32
    embed_dim: int = 256
    bos: int = 30522
    sep: int | None = 102
    pad: int = 0
    image_token: int | None = None
    temperature: float | None = 0.07
    by_image: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    vision_dtype: Literal["float32", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        """Raises MmjaxError for a transformer that is no Q-Former."""
        c = self.qformer
        if c.cross_from != 0 or not c.query_feed_forward or c.causal or c.types or c.pooler:
            raise MmjaxError(
                "blip2: the qformer needs cross_from=0, query_feed_forward=True, causal=False, types=0, pooler=False; "
                f"it has {c.cross_from}, {c.query_feed_forward}, {c.causal}, {c.types}, {c.pooler}"
            )

    @classmethod
    def eva_g(cls, side: int = 224, **fields: Any) -> Self:
        """The published size with EVA-CLIP's g/14: 1,173 M parameters, 187 M of them trained."""
        vision = ViTConfig.g14_eva(image_size=(side, side), norm_epsilon=1e-5)
        return cls(**({"vision": vision, "qformer": qformer()} | fields))

    @classmethod
    def clip_l(cls, side: int = 224, **fields: Any) -> Self:
        """The published size with CLIP's L/14, of which the last block is left out."""
        kind: dict[str, Any] = {"norm_after_pool": False, "rule": "bicubic", "norm_epsilon": 1e-5}
        vision = ViTConfig.clip(side, 14, 1024, 23, 16, 4096, **kind)
        return cls(**({"vision": vision, "qformer": qformer()} | fields))

    @property
    def vocab_size(self) -> int:
        return self.qformer.vocab_size

    @property
    def matching(self) -> bool:
        return True

    @property
    def two_images(self) -> bool:
        return False

    @property
    def classes(self) -> int:
        return 0

    # ------------------------------------------------------- what `mmjax.training.image_text.ImageTextConfig` declares

    def network(self, axis_name: str | None = None) -> "Blip2":
        return Blip2(self, axis_name)

    def module_params(self, params: Params) -> Params:
        return params

    def stored_params(self, params: Params) -> Params:
        return params


class Blip2(nn.Module):
    """Params: vision, queries [q, d], qformer, vision_proj, text_proj, itm_head, and as configured temperature.

    axis_name: the mapped axis that cuts the batch, for dropout.
    """

    config: Blip2Config
    axis_name: str | None = None

    def setup(self) -> None:
        c = self.config
        width = c.qformer.width
        self.vision = ViT(replace(c.vision, dtype=c.vision_dtype or c.dtype), self.axis_name)
        self.queries = self.param("queries", c.qformer.initializer, (c.queries, width))
        self.qformer = Bert(replace(c.qformer, dtype=c.dtype), self.axis_name)
        self.vision_proj, self.text_proj = (torch_linear(c.embed_dim, width) for _ in range(2))
        self.itm_head = torch_linear(2, width)
        if c.temperature is not None:
            self.temperature = self.param("temperature", nn.initializers.constant(c.temperature), ())

    def __call__(
        self,
        images: Float[Array, "b height width 3"],
        ids: Int[Array, "b l"],
        mask: Int[Array, "b l"] | None = None,
        train: bool = False,
    ) -> dict[str, Any]:
        """The outputs of all heads for images and their texts; logits are float32.

        ids: [CLS] text [SEP]; [DEC] replaces the first one here for generation. mask: 1 = a token, 0 = padding.
        train: with dropout, which needs the rng "dropout".

        Returns "image_tokens" [b, n, e]; "query_states" [b, q, d], of the queries alone; "text_states" [b, l, d], of
        the text alone; "states" [b, q, d], of the queries with the text; "image_embeds" [b, q, e] and "text_embeds"
        [b, e], of unit length; "itm_logits" [b, 2]; with an LM head "decoder_logits" [b, l, v].
        """
        tokens = self.encode_image(images, train)
        query_states, caches = self.encode_queries(tokens, train)
        text_states = self.encode_text(ids, mask, train)
        states = self.encode_multimodal(ids, mask, tokens, train)
        outputs = {"image_tokens": tokens, "query_states": query_states, "text_states": text_states, "states": states}
        outputs |= {"image_embeds": self.project_queries(query_states), "text_embeds": self.text_embeds(text_states)}
        outputs["itm_logits"] = self.itm_logits(states)
        if self.config.qformer.mlm:
            outputs["decoder_logits"] = self.decode(with_first(ids, self.config.bos), mask, caches, train)
        return outputs

    def encode_image(self, images: Float[Array, "b height width 3"], train: bool = False) -> Float[Array, "b n e"]:
        """The class token and the patches, after the final norm."""
        return self.vision(images, train=train).tokens

    def encode_queries(
        self, image_tokens: Float[Array, "b n e"], train: bool = False
    ) -> tuple[Float[Array, "b q d"], list[LayerCache]]:
        """The states of the queries alone, and their keys and values, which generated texts attend to."""
        x = self.qformer.embed(queries=self._queries(len(image_tokens)), train=train)
        return self.qformer.run_cached(x, None, image_tokens, train, queries=self.config.queries)

    def encode_text(
        self, ids: Int[Array, "b l"], mask: Int[Array, "b l"] | None = None, train: bool = False
    ) -> Float[Array, "b l d"]:
        """The text alone, with the feed-forwards of texts. ids: [CLS] first."""
        return self.qformer.run(self.qformer.embed(ids, train=train), mask, train=train)[-1]

    def encode_multimodal(
        self,
        ids: Int[Array, "b l"],
        mask: Int[Array, "b l"] | None,
        image_tokens: Float[Array, "b n e"],
        train: bool = False,
    ) -> Float[Array, "b q d"]:
        """The states of the queries, which attend to the image and, with the text, to each other. ids: [CLS] first."""
        return query_states(self.qformer, self.queries, image_tokens, ids, mask, train)

    def encode_pair(
        self,
        ids: Int[Array, "b l"],
        mask: Int[Array, "b l"] | None,
        text_states: Float[Array, "b l d"],
        image_states: Float[Array, "b n e"],
    ) -> Float[Array, "b q d"]:
        """`encode_multimodal` with the arguments that `mmjax.interface.two_stage` has for every system."""
        return self.encode_multimodal(ids, mask, image_states)

    def image_embeds(self, image_tokens: Float[Array, "b n e"]) -> Float[Array, "b q e"]:
        """Unit-norm features, one for each query."""
        return self.project_queries(self.encode_queries(image_tokens)[0])

    def project_queries(self, states: Float[Array, "b q d"]) -> Float[Array, "b q e"]:
        """The same from the states of `encode_queries`."""
        return l2_normalize(self.vision_proj(states))

    def text_embeds(self, text_states: Float[Array, "b l d"]) -> Float[Array, "b e"]:
        """Unit-norm features, from the first token ([CLS]) of the states of `encode_text`."""
        return l2_normalize(self.text_proj(text_states[:, 0]))

    def itm_logits(self, states: Float[Array, "b q d"]) -> Float[Array, "b 2"]:
        """The mean over queries of the logits of `encode_multimodal`'s states; class 1: text and image match."""
        return jnp.mean(self.itm_head(states).astype(jnp.float32), axis=1)

    # ------------------------------------------------------------------------------------------------------ generation

    def decode(
        self,
        ids: Int[Array, "b l"],
        mask: Int[Array, "b l"] | None,
        caches: Sequence[LayerCache],
        train: bool = False,
    ) -> Float[Array, "b l v"]:
        """The logits of the token after each. ids: [DEC] first. caches: of `encode_queries`.

        Positions of the text begin at 0: queries have none (Qformer.py:860-864).
        """
        x = self.qformer.embed(ids, train=train)
        x, _ = self.qformer.run_cached(x, self._visible(jnp.ones_like(ids) if mask is None else mask), None, train,
                                       past=caches)  # fmt: skip
        return self.qformer.mlm_logits(x)

    def prefill(
        self, ids: Int[Array, "b l"], mask: Int[Array, "b l"], image_tokens: Float[Array, "b n e"]
    ) -> tuple[Float[Array, "b v"], list[LayerCache]]:
        """The logits of the token after each prompt's last, and the keys and values that `step` continues from.

        Padding, on either side, takes no position.
        """
        _, past = self.encode_queries(image_tokens)
        x = self.qformer.embed(ids, position_ids=jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0))
        x, caches = self.qformer.run_cached(x, self._visible(mask), past=past)
        last = ids.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return self.qformer.mlm_logits(jnp.take_along_axis(x, last[:, None, None], axis=1))[:, 0], caches

    def step(
        self,
        ids: Int[Array, "b r"],
        caches: list[LayerCache],
        new: list[KeyValues],
        index: Int[Array, ""],
        prompt_mask: Int[Array, "b l"],
    ) -> tuple[Float[Array, "b r v"], list[KeyValues]]:
        """The logits after one more token a row, and the rows' keys and values with that token's in slot `index`."""
        valid = self._with_queries(prompt_mask).astype(bool)
        return self.qformer.step(ids, caches, new, index, valid, queries=self.config.queries)

    def _queries(self, b: int) -> Float[Array, "b q d"]:
        return jnp.broadcast_to(self.queries, (b, *self.queries.shape))

    def _with_queries(self, mask: Int[Array, "b l"]) -> Int[Array, "b q_l"]:
        """The padding mask of a text behind the queries."""
        return mask_behind_queries(mask, self.config.queries)

    def _visible(self, mask: Int[Array, "b l"]) -> Array:
        """Which keys, of the queries and of the text, each token of the text attends to [b, 1, l, q + l]."""
        l = mask.shape[1]
        return causal_mask(l, self.config.queries + l) & padding_mask(self._with_queries(mask))
