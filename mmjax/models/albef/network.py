"""ALBEF's networks (arXiv 2107.07651, section 3.1; salesforce/ALBEF models/): an image encoder, and a text encoder
whose upper half looks at the image."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.errors import MmjaxError
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.nn.norm import l2_normalize
from mmjax.nn.transformer import Dense
from mmjax.types import Array, Float, Int, Params

MOMENTUM = ("vision", "text", "vision_proj", "text_proj", "cls_hidden", "cls_head", "decoder")
"""The parts with a momentum copy, of those that a network has: not the temperature, not the head that matches."""


@dataclass(frozen=True)
class AlbefConfig:
    """Sizes, and which heads stand on the encoders; class methods give what is published.

    Attributes:
        vision: the image encoder; its class token stands for the whole image, all its tokens are looked at.
        text: `cross_from` is the first layer that looks at the image (`fusion_layer`); `mlm` the head of masked words.
        embed_dim: of the space in which images and texts are compared; 0: there is no such space.
        matching: the head that tells whether a text belongs to an image.
        classes: of image and text together (SNLI-VE: 3); 0: there is no such head.
        pairs: texts are of two images (NLVR2): the layers that look at an image look at the first one and at the second
            one in turn. Each two such layers share the matrices of keys and values.
        assigning: the head that tells which of two images a text is of, if any: pre-training for pairs.
        decoder: writes answers, looking at the question's states (VQA); None: there is none.
        temperature: of the contrast at the start.
        queue: keys of earlier batches that a contrast has beside those of its own.
        by_image: pairs of one image are told by its id, in the batch and in the queue: retrieval.
        momentum: the share of the old value that the momentum encoders keep at a step.
        alpha: the share of the momentum encoders' word in the targets.
        holds_state: the file had momentum encoders (and queues): they come in, and an export writes them.
        dtype: compute dtype of the encoders and the decoder; the heads are float32.
    """

    vision: ViTConfig
    text: BertConfig
    embed_dim: int = 256
    matching: bool = True
    classes: int = 0
    pairs: bool = False
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
            raise MmjaxError(f"albef: cross_from={self.text.cross_from} in text: which of its layers see the image?")
        if self.pairs and (self.text.depth - self.text.cross_from) % 2:
            raise MmjaxError("albef: pairs: an odd number of layers looks at the two images")
        if self.assigning and not (self.pairs and self.embed_dim):
            raise MmjaxError("albef: assigning wants pairs, and embed_dim by which it draws the other images")
        if self.decoder is not None and (self.decoder.cross_from != 0 or not self.decoder.causal):
            raise MmjaxError("albef: every layer of the decoder looks at the question, and none ahead: cross_from=0")

    @classmethod
    def base(cls, side: int = 256, **fields: Any) -> Self:
        """As pre-trained: ViT-B/16 on images of 256 pixels, BERT-base of six and six layers; 209.9 M parameters."""
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
        """NLVR2: six layers that read and six pairs that look."""
        return cls._of(side, _text(depth=18), fields, **ALONE, classes=2, pairs=True)

    @classmethod
    def assignment(cls, side: int = 256, **fields: Any) -> Self:
        """Text assignment, on the way to NLVR2; 258.9 M parameters."""
        own: dict[str, Any] = {"matching": False, "queue": 0, "pairs": True, "assigning": True}
        return cls._of(side, _text(depth=18), fields, **own)

    @classmethod
    def vqa(cls, side: int = 384, **fields: Any) -> Self:
        decoder = _text(depth=6, cross_from=0, causal=True, mlm=True)
        return cls._of(side, _text(), fields, **ALONE, decoder=decoder)

    @classmethod
    def _of(cls, side: int, text: BertConfig, fields: dict[str, Any], **own: Any) -> Self:
        return cls(_vision(side), text, **(own | fields))


ALONE: dict[str, Any] = {"embed_dim": 0, "matching": False, "queue": 0}
"""Where nothing is compared."""


def _vision(side: int) -> ViTConfig:
    return ViTConfig(image_size=(side, side), init="normal")


def _text(**fields: Any) -> BertConfig:
    return BertConfig(**{"pooler": False, "cross_from": 6, **fields})


class Albef(nn.Module):
    """Params: vision, text, and as configured vision_proj, text_proj, temperature, itm_head, cls_hidden and cls_head,
    ta_head, decoder.

    axis_name: the mapped axis that cuts the batch, for dropout.
    """

    config: AlbefConfig
    axis_name: str | None = None

    def setup(self) -> None:
        c = self.config
        dtype: Any = {"dtype": c.dtype}
        self.vision = ViT(replace(c.vision, **dtype))
        self.text = Bert(replace(c.text, **dtype), self.axis_name)
        if c.embed_dim:
            self.vision_proj, self.text_proj = _linear(c.embed_dim, c.vision.width), _linear(c.embed_dim, c.text.width)
            self.temperature = self.param("temperature", nn.initializers.constant(c.temperature), ())
        if c.matching:
            self.itm_head = _linear(2, c.text.width)
        if c.classes:
            self.cls_hidden, self.cls_head = _linear(c.text.width, c.text.width), _linear(c.classes, c.text.width)
        if c.assigning:
            self.ta_head = _linear(3, c.text.width)
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
        """Everything that the configured heads give of images and the texts beside them; logits are float32.

        mask: 1 = a token, 0 = padding. decoder_ids: answers, of a network that writes some. other_images: the
        second ones, of a network for pairs. train: with dropout, which asks for the rng "dropout".

        Returns "image_tokens" [b, n, d]; "text_states" [b, l, d], before the layers that look at the image; "states"
        [b, l, d], after them; "image_embeds" and "text_embeds" [b, e], of unit length; "mlm_logits" [b, l, v];
        "itm_logits" [b, 2]; "logits" [b, c]; "assignment_logits" [b, 3]; "answer_logits" [b, t, v].
        """
        c = self.config
        image_tokens = self.image(images, train)
        text_states = self.read(ids, mask, train)
        other_tokens = None if other_images is None else self.image(other_images, train)
        states = self.fuse(text_states, mask, image_tokens, other_tokens, train)
        told = {"image_tokens": image_tokens, "text_states": text_states, "states": states}
        if c.embed_dim:
            told["image_embeds"], told["text_embeds"] = self.image_embeds(image_tokens), self.text_embeds(text_states)
        if c.text.mlm:
            told["mlm_logits"] = self.words(states)
        if c.matching:
            told["itm_logits"] = self.match(states)
        if c.classes:
            told["logits"] = self.classify(states)
        if c.assigning:
            told["assignment_logits"] = self.assign(states)
        if c.decoder is not None:
            decoder_ids = ids[:, :1] if decoder_ids is None else decoder_ids
            told["answer_logits"] = self.write(decoder_ids, None, states, mask, train)
        return told

    def image(self, images: Float[Array, "b height width 3"], train: bool = False) -> Float[Array, "b n d"]:
        """The class token and the patches, after the final norm."""
        return self.vision(images, train=train, axis_name=self.axis_name).tokens

    def read(
        self, ids: Int[Array, "b l"], mask: Int[Array, "b l"] | None = None, train: bool = False
    ) -> Float[Array, "b l d"]:
        """The text by itself: the layers before `cross_from`."""
        return self.text.run(self.text.embed(ids, train=train), mask, train=train, last=self.config.text.cross_from)[-1]

    def fuse(
        self,
        text_states: Float[Array, "b l d"],
        mask: Int[Array, "b l"] | None,
        image_tokens: Float[Array, "b n e"],
        other_tokens: Float[Array, "b n e"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b l d"]:
        """The layers that look at the image, over what `read` gave.

        other_tokens: of the second image. Raises MmjaxError for it without `pairs`, or none with it.
        """
        if self.config.pairs != (other_tokens is not None):
            raise MmjaxError(f"albef: pairs={self.config.pairs}: images of a text: {1 + (other_tokens is not None)}")
        first, context = self.config.text.cross_from or 0, image_tokens
        if other_tokens is None:
            return self.text.run(text_states, mask, context, train=train, first=first)[-1]
        for i in range(first, self.config.text.depth):
            context = (image_tokens, other_tokens)[(i - first) % 2]
            text_states = self.text.run(text_states, mask, context, train=train, first=i, last=i + 1)[-1]
        return text_states

    def image_embeds(self, image_tokens: Float[Array, "b n d"]) -> Float[Array, "b e"]:
        """Of unit length, from the class token."""
        return l2_normalize(self.vision_proj(image_tokens[:, 0]))

    def text_embeds(self, text_states: Float[Array, "b l d"]) -> Float[Array, "b e"]:
        """Of unit length, from the first token ([CLS]) of what `read` gave."""
        return l2_normalize(self.text_proj(text_states[:, 0]))

    def words(
        self, states: Float[Array, "b l d"], places: Int[Array, "b m"] | None = None
    ) -> Float[Array, "b l v"] | Float[Array, "b m v"]:
        return self.text.mlm_logits(states, places)

    def match(self, states: Float[Array, "b l d"]) -> Float[Array, "b 2"]:
        """Of the first token: class 1 where text and image belong together."""
        return self.itm_head(states[:, 0]).astype(jnp.float32)

    def classify(self, states: Float[Array, "b l d"]) -> Float[Array, "b c"]:
        return self.cls_head(jax.nn.relu(self.cls_hidden(states[:, 0]))).astype(jnp.float32)

    def assign(self, states: Float[Array, "b l d"]) -> Float[Array, "b 3"]:
        """Of the first token: 0, 1: the text is of the first, of the second image; 2: of neither."""
        return self.ta_head(states[:, 0]).astype(jnp.float32)

    def write(
        self,
        ids: Int[Array, "b t"],
        mask: Int[Array, "b t"] | None,
        states: Float[Array, "b l d"],
        states_mask: Int[Array, "b l"] | None,
        train: bool = False,
    ) -> Float[Array, "b t v"]:
        """The decoder's logits of the word after each token. states, states_mask: of the questions, a row an answer."""
        x = self.decoder.embed(ids, train=train)
        return self.decoder.mlm_logits(self.decoder.run(x, mask, states, states_mask, train)[-1])


def _linear(features: int, inputs: int) -> Dense:
    """torch's Linear as it begins: weights and biases uniform within 1 / sqrt(inputs)."""
    bound = inputs**-0.5

    def draw(rng: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return Dense(features, kernel_init=draw, bias_init=draw)


def twins(config: AlbefConfig) -> list[tuple[str, str]]:
    """Of a network for pairs, the blocks that share keys and values: the first looks at the first image."""
    first = config.text.cross_from or 0
    numbers = range(first, config.text.depth, 2) if config.pairs else ()
    return [(f"block_{i}", f"block_{i + 1}") for i in numbers]


def tied(params: Params, config: AlbefConfig) -> Params:
    """Parameters as they are kept: what two blocks share is in the second of them alone (of ALBEF's files, too, that
    one is taken where they differ)."""
    return _with_twins(params, config, lambda one, other: {k: v for k, v in one.items() if k not in "kv"})


def untied(params: Params, config: AlbefConfig) -> Params:
    """Parameters as the module asks for them: the shared ones in both blocks. Gradients add up."""
    return _with_twins(params, config, lambda one, other: {**one, "k": other["k"], "v": other["v"]})


def _with_twins(params: Params, config: AlbefConfig, change: Callable[[Params, Params], Params]) -> Params:
    if not config.pairs:
        return params
    encoder = dict(params["text"]["encoder"])
    for first, second in twins(config):
        attention = change(encoder[first]["cross_attention"], encoder[second]["cross_attention"])
        encoder[first] = {**encoder[first], "cross_attention": attention}
    return {**params, "text": {**params["text"], "encoder": encoder}}
