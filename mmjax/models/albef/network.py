"""ALBEF's networks (arXiv 2107.07651, section 3.1; salesforce/ALBEF models/): an image encoder, and a text encoder
whose upper half cross-attends to the image."""

from dataclasses import dataclass, replace
from typing import Any, Self

import jax.numpy as jnp
from flax import linen as nn

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.nn.image_text import ImageTextHeads
from mmjax.nn.transformer import torch_linear
from mmjax.types import Array, Float, Int, Params

MOMENTUM = ("vision", "text", "vision_proj", "text_proj", "cls_hidden", "cls_head", "decoder")
"""The parts with a momentum copy, of those that a network has: not the temperature, not the ITM head."""


@dataclass(frozen=True)
class AlbefConfig:
    """The sizes, and the heads on the encoders; class methods give the published configs.

    Attributes:
        vision: the image encoder; its class token represents the image, cross attention reads all its tokens.
        text: `cross_from` is its first cross-attention layer (`fusion_layer`); `mlm` its MLM head.
        embed_dim: width of the projections, in which the contrast (ITC) is; 0: there are none.
        matching: the ITM head: does a text belong to an image?
        classes: of image and text together (SNLI-VE: 3); 0: there is no such head.
        two_images: texts are of two images (NLVR2): cross-attention layers attend to the first one and to the second
            one in turn. Each two such layers share the matrices of keys and values.
        assigning: the head of text assignment: which of two images is a text of, if any? Pre-training for two images.
        decoder: of answers, with cross attention to the question's states (VQA); None: there is none.
        temperature: of the contrast at the start.
        queue: keys of earlier batches in the contrast, beside those of the batch.
        by_image: pairs have image ids, in the batch and in the queue: retrieval.
        momentum: the share of the old value that the momentum encoders retain at a step.
        alpha: the momentum encoders' share of the targets.
        holds_state: the file had momentum encoders (and queues): they are loaded, and an export writes them.
        dtype: compute dtype of the encoders and the decoder; the heads are float32.
    """

    vision: ViTConfig
    text: BertConfig
    embed_dim: int = 256
    matching: bool = True
    classes: int = 0
    two_images: bool = False
    assigning: bool = False
    decoder: BertConfig | None = None
    temperature: float = 0.07
    queue: int = 65536
    by_image: bool = False
    momentum: float = 0.995
    alpha: float = 0.4
    holds_state: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises MmjaxError for parts that do not fit each other."""
        if self.text.cross_from is None or self.text.cross_from > self.text.depth:
            raise MmjaxError(f"albef: text.cross_from={self.text.cross_from}: no layer of {self.text.depth}")
        if self.two_images and (self.text.depth - self.text.cross_from) % 2:
            raise MmjaxError("albef: two_images needs an even number of cross-attention layers")
        if self.assigning and not (self.two_images and self.embed_dim):
            raise MmjaxError("albef: assigning needs two_images, and embed_dim, by which other images are sampled")
        if self.decoder is not None and (self.decoder.cross_from != 0 or not self.decoder.causal):
            raise MmjaxError("albef: every layer of the decoder is causal and has cross attention: cross_from=0")

    @classmethod
    def base(cls, side: int = 256, **fields: Any) -> Self:
        """The pre-trained size: ViT-B/16 on 256 x 256 pixels, BERT-base of six and six layers; 209.9 M parameters."""
        return cls(_vision(side), _text(mlm=True), **fields)

    @classmethod
    def retrieval(cls, side: int = 384, **fields: Any) -> Self:
        return cls._of(side, _text(), fields, by_image=True)

    @classmethod
    def entailment(cls, side: int = 384, **fields: Any) -> Self:
        """SNLI-VE."""
        return cls._of(side, _text(), fields, **ALONE, classes=3)

    @classmethod
    def nlvr(cls, side: int = 384, **fields: Any) -> Self:
        """NLVR2: six text layers and six pairs of cross-attention layers."""
        return cls._of(side, _text(depth=18), fields, **ALONE, classes=2, two_images=True)

    @classmethod
    def assignment(cls, side: int = 256, **fields: Any) -> Self:
        """Text assignment, on the way to NLVR2; 258.9 M parameters."""
        own: dict[str, Any] = {"matching": False, "queue": 0, "two_images": True, "assigning": True}
        return cls._of(side, _text(depth=18), fields, **own)

    @classmethod
    def vqa(cls, side: int = 384, **fields: Any) -> Self:
        decoder = _text(depth=6, cross_from=0, causal=True, mlm=True)
        return cls._of(side, _text(), fields, **ALONE, decoder=decoder)

    @classmethod
    def _of(cls, side: int, text: BertConfig, fields: dict[str, Any], **own: Any) -> Self:
        return cls(_vision(side), text, **(own | fields))

    # ------------------------------------------------------- what `mmjax.training.image_text.ImageTextConfig` declares

    @property
    def momentum_parts(self) -> tuple[str, ...]:
        return MOMENTUM

    def network(self, axis_name: str | None = None) -> "Albef":
        return Albef(self, axis_name)

    def module_params(self, params: Params) -> Params:
        """The parameters with the keys and values that pairs of blocks share in both blocks. Gradients add up."""
        flat = tree.flatten(params)
        shared = {path: flat[source] for path, source in self._shared(flat).items()}
        return tree.overlay(params, tree.unflatten(shared)) if shared else params

    def stored_params(self, params: Params) -> Params:
        """The parameters with what a pair of blocks shares in its second block alone.

        Where the two differ in ALBEF's files, the second one is loaded.
        """
        shared = self._shared(tree.flatten(params))
        return tree.split(params, [path for path in shared if path in tree.flatten(params)])[1] if shared else params

    def _shared(self, flat: Any) -> dict[str, str]:
        """Path in the first block -> path in the second block, of keys and values in `tied_pairs`."""
        shared: dict[str, str] = {}
        for first, second in tied_pairs(self):
            prefixes = (f"text/encoder/{second}/cross_attention/{letter}/" for letter in "kv")
            for prefix in prefixes:
                paths = [path for path in flat if path.startswith(prefix)]
                shared |= {path.replace(f"/{second}/", f"/{first}/", 1): path for path in paths}
        return shared


ALONE: dict[str, Any] = {"embed_dim": 0, "matching": False, "queue": 0}
"""The fields of a network without contrast and matching."""


def _vision(side: int) -> ViTConfig:
    return ViTConfig(image_size=(side, side), init="timm")


def _text(**fields: Any) -> BertConfig:
    return BertConfig(**{"pooler": False, "cross_from": 6, "init": "normal", **fields})


class Albef(ImageTextHeads):
    """Params: vision, text, and as configured vision_proj, text_proj, temperature, itm_head, cls_hidden and cls_head,
    ta_head, decoder.

    axis_name: the mapped axis that cuts the batch, for dropout.
    """

    config: AlbefConfig
    axis_name: str | None = None

    def setup(self) -> None:
        c = self.config
        dtype: Any = {"dtype": c.dtype}
        self.vision = ViT(replace(c.vision, **dtype), self.axis_name)
        self.text = Bert(replace(c.text, **dtype), self.axis_name)
        self.set_up_heads(c)
        if c.embed_dim:
            self.temperature = self.param("temperature", nn.initializers.constant(c.temperature), ())
        if c.assigning:
            self.ta_head = torch_linear(3, c.text.width)
        if c.decoder is not None:
            self.decoder = Bert(replace(c.decoder, **dtype), self.axis_name)

    def __call__(
        self,
        images: Float[Array, "b height width 3"],
        ids: Int[Array, "b l"],
        mask: Int[Array, "b l"] | None = None,
        decoder_ids: Int[Array, "b t"] | None = None,
        other_images: Float[Array, "b height width 3"] | None = None,
        train: bool = False,
    ) -> dict[str, Any]:
        """The outputs of all configured heads for images and their texts; logits are float32.

        mask: 1 = a token, 0 = padding. decoder_ids: answers, with a decoder. other_images: the second ones, with
        `two_images`. train: with dropout, which needs the rng "dropout".

        Returns "image_tokens" [b, n, d]; "text_states" [b, l, d], before the cross-attention layers; "states"
        [b, l, d], after them; "image_embeds" and "text_embeds" [b, e], of unit length; "mlm_logits" [b, l, v];
        "itm_logits" [b, 2]; "logits" [b, c]; "assignment_logits" [b, 3]; "answer_logits" [b, t, v].
        """
        c = self.config
        image_tokens = self.encode_image(images, train)
        text_states = self.encode_text(ids, mask, train)
        other_tokens = None if other_images is None else self.encode_image(other_images, train)
        states = self.encode_multimodal(text_states, mask, image_tokens, other_tokens, train)
        outputs = {"image_tokens": image_tokens, "text_states": text_states, "states": states}
        if c.embed_dim:
            outputs["image_embeds"], outputs["text_embeds"] = (
                self.image_embeds(image_tokens),
                self.text_embeds(text_states),
            )
        if c.text.mlm:
            outputs["mlm_logits"] = self.mlm_logits(states)
        if c.matching:
            outputs["itm_logits"] = self.itm_logits(states)
        if c.classes:
            outputs["logits"] = self.classify(states)
        if c.assigning:
            outputs["assignment_logits"] = self.assign(states)
        if c.decoder is not None:
            decoder_ids = ids[:, :1] if decoder_ids is None else decoder_ids
            outputs["answer_logits"] = self.decode(decoder_ids, None, states, mask, train)
        return outputs

    def encode_image(self, images: Float[Array, "b height width 3"], train: bool = False) -> Float[Array, "b n d"]:
        """The class token and the patches, after the final norm."""
        return self.vision(images, train=train).tokens

    def encode_text(
        self, ids: Int[Array, "b l"], mask: Int[Array, "b l"] | None = None, train: bool = False
    ) -> Float[Array, "b l d"]:
        """The text alone: the layers before `cross_from`."""
        return self.text.run(self.text.embed(ids, train=train), mask, train=train, last=self.config.text.cross_from)[-1]

    def encode_multimodal(
        self,
        text_states: Float[Array, "b l d"],
        mask: Int[Array, "b l"] | None,
        image_tokens: Float[Array, "b n e"],
        other_tokens: Float[Array, "b n e"] | None = None,
        train: bool = False,
        image_index: Int[Array, "b"] | None = None,
        outputs: int | None = None,
    ) -> Float[Array, "b l d"]:
        """The cross-attention layers, over the states of `encode_text`.

        other_tokens: of the second image. Raises MmjaxError for it without `two_images`, or none with it.
        Of one image: image_index: the image of each text, where several texts share one; image_tokens are then
        [m, n, e], and their keys and values are computed once. outputs: the number of first tokens of the result that
        are computed: 1 is enough for the ITM head. None: all.
        """
        two = self.config.two_images
        if two != (other_tokens is not None):
            raise MmjaxError(f"albef: two_images={two}: images of a text: {1 + (other_tokens is not None)}")
        first, context = self.config.text.cross_from or 0, image_tokens
        if other_tokens is None:
            options: dict[str, Any] = {"context_index": image_index, "outputs": outputs}
            return self.text.run(text_states, mask, context, train=train, first=first, **options)[-1]
        for i in range(first, self.config.text.depth):
            context = (image_tokens, other_tokens)[(i - first) % 2]
            text_states = self.text.run(text_states, mask, context, train=train, first=i, last=i + 1)[-1]
        return text_states

    def encode_pair(
        self,
        ids: Int[Array, "b l"],
        mask: Int[Array, "b l"] | None,
        text_states: Float[Array, "b l d"],
        image_states: Float[Array, "b n e"],
        other_states: Float[Array, "b n e"] | None = None,
    ) -> Float[Array, "b l d"]:
        """As `encode_multimodal`, with the arguments that `mmjax.interface.two_stage` has for every system."""
        return self.encode_multimodal(text_states, mask, image_states, other_states)

    def mlm_logits(
        self, states: Float[Array, "b l d"], positions: Int[Array, "b m"] | None = None
    ) -> Float[Array, "b l v"] | Float[Array, "b m v"]:
        return self.text.mlm_logits(states, positions)

    def assign(self, states: Float[Array, "b l d"]) -> Float[Array, "b 3"]:
        """Logits of the first token; 0: the text belongs to the first image, 1: to the second, 2: to neither."""
        return self.ta_head(states[:, 0]).astype(jnp.float32)

    def decode(
        self,
        ids: Int[Array, "b t"],
        mask: Int[Array, "b t"] | None,
        states: Float[Array, "b l d"],
        states_mask: Int[Array, "b l"] | None,
        train: bool = False,
    ) -> Float[Array, "b t v"]:
        """The decoder's logits of the token after each. states, states_mask: of the questions, one for each answer."""
        x = self.decoder.embed(ids, train=train)
        return self.decoder.mlm_logits(self.decoder.run(x, mask, states, states_mask, train)[-1])


def tied_pairs(config: AlbefConfig) -> list[tuple[str, str]]:
    """With `two_images`, the blocks that share keys and values: the first attends to the first image."""
    first = config.text.cross_from or 0
    numbers = range(first, config.text.depth, 2) if config.two_images else ()
    return [(f"block_{i}", f"block_{i + 1}") for i in numbers]
