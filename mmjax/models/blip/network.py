"""BLIP's networks (arXiv 2201.12086, section 3.1; salesforce/BLIP models/): an image encoder, and one text transformer
in three roles: text encoder, image-grounded text encoder, image-grounded text decoder."""

from dataclasses import dataclass, replace
from typing import Any, Self

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.nn.image_text import ImageTextHeads
from mmjax.nn.norm import l2_normalize
from mmjax.types import Array, ArrayLike, Float, Int, Params

MOMENTUM = ("vision", "vision_proj", "text", "text_proj")
"""The parts with a momentum copy, of those that a network has."""
UNSHARED = ("encoder/*/attention/**", "encoder/*/norm_1/**", "mlm_transform/**", "mlm_bias")
"""Globs of the decoder's parameters that it does not share with the text encoder (blip_pretrain.py:269-339)."""


@dataclass(frozen=True)
class BlipConfig:
    """The sizes, and the heads on the encoders; class methods give the published configs.

    Attributes:
        vision: the image encoder; its class token represents the image, cross attention reads all its tokens.
        text: the encoder of text alone and, with its cross attention, of text and image. None: a captioner has none.
            `merge_from`: texts are of two images (NLVR2).
        decoder: of captions, from the image's tokens; beside an encoder with which it does not share parameters, of
            answers, from the states of question and image (VQA). None: there is none.
        shared: pre-training: the decoder has the encoder's parameters but for its self-attention, and its LM head.
        embed_dim: width of the projections, in which the contrast (ITC) is; 0: there are none.
        matching: the ITM head: does a text belong to an image?
        classes: of a text and its image(s) together (NLVR2: 2); 0: there is no such head.
        bos, enc: the ids of [DEC] and [ENC], with which the decoder's and the image-grounded encoder's texts begin.
        sep, pad: the ids of [SEP], which ends every text (None: the tokenizer's), and of padding.
        temperature: of the contrast at the start; None: it is no parameter (files for inference).
        queue: keys of earlier batches in the contrast, beside those of the batch.
        by_image: pairs have image ids, in the batch and in the queue: retrieval.
        momentum: the share of the old value that the momentum encoders retain at a step.
        alpha: the momentum encoders' share of the targets.
        holds_state: the file had momentum encoders (and queues): they are loaded, and an export writes them.
        dtype: compute dtype of the encoders and the decoder; the heads are float32.
    """

    vision: ViTConfig
    text: BertConfig | None
    decoder: BertConfig | None = None
    shared: bool = False
    embed_dim: int = 256
    matching: bool = True
    classes: int = 0
    bos: int = 30522
    enc: int = 30523
    sep: int | None = 102
    pad: int = 0
    temperature: float | None = 0.07
    queue: int = 57600
    by_image: bool = False
    momentum: float = 0.995
    alpha: float = 0.4
    holds_state: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises MmjaxError for parts that do not fit each other."""
        text, decoder = self.text, self.decoder
        if text is None and (decoder is None or self.shared or self.embed_dim or self.matching or self.classes):
            raise MmjaxError("blip: without a text encoder there is a decoder alone: no projections, no other heads")
        if text is not None and (text.cross_from != 0 or text.causal):
            raise MmjaxError("blip: every layer of the text encoder has cross attention, none is causal: cross_from=0")
        if decoder is not None and not (decoder.cross_from == 0 and decoder.causal and decoder.mlm):
            raise MmjaxError("blip: the decoder needs cross_from=0, causal=True and mlm=True")
        alike = decoder and text and replace(decoder, causal=False, mlm=False, remat=text.remat)
        if self.shared and (alike is None or text != alike):
            raise MmjaxError("blip: shared=True needs a decoder that is the text encoder but for causal=True, mlm=True")
        if self.two_images and (self.embed_dim or self.matching or decoder is not None):
            raise MmjaxError("blip: an encoder of two images (merge_from) has the head of classes alone")

    @classmethod
    def base(cls, side: int = 224, **fields: Any) -> Self:
        """The pre-trained size with ViT-B/16; 252.4 M parameters."""
        return cls._pretrained(_vision(side), fields)

    @classmethod
    def large(cls, side: int = 224, **fields: Any) -> Self:
        """The pre-trained size with ViT-L/16; 474.7 M parameters."""
        return cls._pretrained(_vision(side, large=True), fields)

    @classmethod
    def retrieval(cls, side: int = 384, large: bool = False, **fields: Any) -> Self:
        """Fine-tuned for retrieval. large: with ViT-L/16, here and below."""
        return cls._of(_vision(side, large), _text(), None, fields, by_image=True)

    @classmethod
    def itm(cls, side: int = 384, large: bool = False, **fields: Any) -> Self:
        """The same for inference alone: no temperature, no queues (blip_itm.py)."""
        return cls._of(_vision(side, large), _text(), None, fields, temperature=None, queue=0)

    @classmethod
    def captioner(cls, side: int = 384, large: bool = False, **fields: Any) -> Self:
        return cls._of(_vision(side, large), None, _decoder(), fields, **ALONE)

    @classmethod
    def vqa(cls, side: int = 480, **fields: Any) -> Self:
        """The encoder of questions and the decoder of answers share nothing."""
        return cls._of(_vision(side, drop_path=0.1), _text(), _decoder(), fields, **ALONE)

    @classmethod
    def nlvr(cls, side: int = 384, **fields: Any) -> Self:
        """NLVR2: texts of two images."""
        return cls._of(_vision(side, drop_path=0.1), _text(merge_from=6), None, fields, **ALONE, classes=2)

    @classmethod
    def _pretrained(cls, vision: ViTConfig, fields: dict[str, Any]) -> Self:
        return cls._of(vision, _text(), _decoder(), fields, shared=True)

    @classmethod
    def _of(
        cls,
        vision: ViTConfig,
        text: BertConfig | None,
        decoder: BertConfig | None,
        fields: dict[str, Any],
        **kind: Any,
    ) -> Self:
        return cls(**({"vision": vision, "text": text, "decoder": decoder} | kind | fields))

    @property
    def two_images(self) -> bool:
        """Whether texts are of two images."""
        return self.text is not None and self.text.merge_from is not None

    @property
    def answers(self) -> bool:
        """Whether the decoder reads the states of a question and its image, instead of the image's tokens."""
        return self.text is not None and self.decoder is not None and not self.shared

    @property
    def vocab_size(self) -> int:
        text = self.text or self.decoder
        assert text is not None
        return text.vocab_size

    # ------------------------------------------------------- what `mmjax.training.image_text.ImageTextConfig` declares

    @property
    def momentum_parts(self) -> tuple[str, ...]:
        return MOMENTUM

    def network(self, axis_name: str | None = None) -> "Blip":
        return Blip(self, axis_name)

    def module_params(self, params: Params) -> Params:
        """The parameters with what the decoder shares with the encoder in both. Gradients of all roles add up."""
        return {**params, "decoder": tree.overlay(params["text"], params["decoder"])} if self.shared else params

    def stored_params(self, params: Params) -> Params:
        """The parameters with what the decoder shares with the encoder in the encoder alone."""
        if not self.shared:
            return params
        unshared = (path for path in tree.flatten(params["decoder"]) if is_unshared(path))
        return {**params, "decoder": tree.split(params["decoder"], unshared)[0]}


ALONE: dict[str, Any] = {"embed_dim": 0, "matching": False, "temperature": None, "queue": 0}
"""The fields of a network without contrast and matching."""


def is_unshared(path: str) -> bool:
    """Whether the decoder has its own parameter at this path where it shares the others with the text encoder."""
    return any(tree.matches(path, glob) for glob in UNSHARED)


def _vision(side: int, large: bool = False, drop_path: float = 0.0) -> ViTConfig:
    """ViT-L has stochastic depth in every task (blip.py:205)."""
    size = ViTConfig.l16 if large else ViTConfig.b16
    return size(image_size=(side, side), init="timm", rule="bicubic", drop_path=0.1 if large else drop_path)


def _text(**fields: Any) -> BertConfig:
    """BERT-base's size, without token types, with cross attention in each layer (configs/med_config.json)."""
    return BertConfig(**{"vocab_size": 30524, "types": 0, "pooler": False, "cross_from": 0, "init": "normal", **fields})


def _decoder() -> BertConfig:
    return _text(causal=True, mlm=True)


class Blip(ImageTextHeads):
    """Params: vision, and as configured text, vision_proj, text_proj, temperature, itm_head, cls_hidden and cls_head,
    decoder.

    axis_name: the mapped axis that cuts the batch, for dropout.
    """

    config: BlipConfig
    axis_name: str | None = None

    def setup(self) -> None:
        c = self.config
        dtype: Any = {"dtype": c.dtype}
        self.vision = ViT(replace(c.vision, **dtype), self.axis_name)
        if c.text is not None:
            self.text = Bert(replace(c.text, **dtype), self.axis_name)
            self.set_up_heads(c)
        if c.temperature is not None:
            self.temperature = self.param("temperature", nn.initializers.constant(c.temperature), ())
        if c.decoder is not None:
            self.decoder = Bert(replace(c.decoder, **dtype), self.axis_name)

    def __call__(
        self,
        images: Float[Array, "b height width 3"],
        ids: Int[Array, "b l"],
        mask: Int[Array, "b l"] | None = None,
        decoder_ids: Int[Array, "b t"] | None = None,
        decoder_mask: Int[Array, "b t"] | None = None,
        other_images: Float[Array, "b height width 3"] | None = None,
        train: bool = False,
    ) -> dict[str, Any]:
        """The outputs of all configured heads for images and their texts; logits are float32.

        ids: [CLS] text [SEP]; [ENC] replaces the first one here, where the image-grounded encoder takes them. Of a
        captioner they are the decoder's, [DEC] first. mask: 1 = a token, 0 = padding. decoder_ids: captions or answers,
        [DEC] first; None: those of `ids` with [DEC]. other_images: the second ones, of two. train: with dropout, which
        needs the rng "dropout".

        Returns "image_tokens" [b, n, d]; "text_states" [b, l, d], of the text alone; "states" [b, l, d], of text and
        image; "image_embeds" and "text_embeds" [b, e], of unit length; "itm_logits" [b, 2]; "logits" [b, c];
        "decoder_logits" [b, t, v].
        """
        c = self.config
        tokens = self.encode_image(images, train)
        outputs, states = {"image_tokens": tokens}, tokens
        if c.text is not None:
            if c.embed_dim:
                outputs["text_states"] = self.encode_text(ids, mask, train)
                outputs["image_embeds"] = self.image_embeds(tokens)
                outputs["text_embeds"] = self.text_embeds(outputs["text_states"])
            other_tokens = None if other_images is None else self.encode_image(other_images, train)
            states = self.encode_multimodal(with_first(ids, c.enc), mask, tokens, other_tokens, train)
            outputs["states"] = states
            if c.matching:
                outputs["itm_logits"] = self.itm_logits(states)
            if c.classes:
                outputs["logits"] = self.classify(states)
        if c.decoder is not None:
            if decoder_ids is None:
                decoder_ids, decoder_mask = with_first(ids, c.bos), mask
            context = (states, mask) if c.answers else (tokens, None)
            outputs["decoder_logits"] = self.decode(decoder_ids, decoder_mask, *context, train)
        return outputs

    def encode_image(
        self, images: Float[Array, "b *f height width 3"], train: bool = False
    ) -> Float[Array, "b *f n d"]:
        """The class token and the patches, after the final norm; of a video [b, f, height, width, 3] those of each
        frame."""
        if images.ndim == 4:
            return self.vision(images, train=train).tokens
        tokens = self.vision(images.reshape(-1, *images.shape[2:]), train=train).tokens
        return tokens.reshape(*images.shape[:2], *tokens.shape[1:])

    def encode_text(
        self, ids: Int[Array, "b l"], mask: Int[Array, "b l"] | None = None, train: bool = False
    ) -> Float[Array, "b l d"]:
        """The text alone: all layers without their cross attention. ids: [CLS] first."""
        return self.text.run(self.text.embed(ids, train=train), mask, train=train)[-1]

    def encode_multimodal(
        self,
        ids: Int[Array, "b l"],
        mask: Int[Array, "b l"] | None,
        image_tokens: Float[Array, "b n e"],
        other_tokens: Float[Array, "b n e"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b l d"]:
        """The text with cross attention to the image, from its ids: [ENC] first, which `with_first` puts there. Of a
        video [b, f, n, e] it attends to the tokens of all frames.

        other_tokens: of the second image. Raises MmjaxError for it in a network of one image, or none of two.
        """
        two = self.config.two_images
        if two != (other_tokens is not None):
            raise MmjaxError(f"blip: two_images={two}: images of a text: {1 + (other_tokens is not None)}")
        context = image_tokens if other_tokens is None else jnp.stack([image_tokens, other_tokens], axis=1)
        if context.ndim == 4 and not two:
            context = rearrange(context, "b f n e -> b (f n) e")
        return self.text.run(self.text.embed(ids, train=train), mask, context, train=train)[-1]

    def encode_pair(
        self,
        ids: Int[Array, "b l"],
        mask: Int[Array, "b l"] | None,
        text_states: Float[Array, "b l d"],
        image_states: Float[Array, "b n e"],
        other_states: Float[Array, "b n e"] | None = None,
    ) -> Float[Array, "b l d"]:
        """`encode_multimodal` with [ENC] first, with the arguments that `mmjax.interface.two_stage` has for every
        system."""
        return self.encode_multimodal(with_first(ids, self.config.enc), mask, image_states, other_states)

    def image_embeds(self, image_tokens: Float[Array, "b *f n d"]) -> Float[Array, "b e"]:
        """Unit-norm features, from the class token; of a video the mean over frames of the projections, normalised
        (eval_retrieval_video.py)."""
        x = self.vision_proj(image_tokens[..., 0, :])
        return l2_normalize(x if x.ndim == 2 else jnp.mean(x, axis=1))

    def decode(
        self,
        ids: Int[Array, "b t"],
        mask: Int[Array, "b t"] | None,
        context: Float[Array, "b s e"],
        context_mask: Int[Array, "b s"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b t v"]:
        """The decoder's logits of the token after each. ids: [DEC] first.

        context, context_mask: the image's tokens, or of `config.answers` the states of the question, one for each text.
        """
        x = self.decoder.embed(ids, train=train)
        return self.decoder.mlm_logits(self.decoder.run(x, mask, context, context_mask, train)[-1])


def with_first(ids: ArrayLike, first: int) -> Int[Array, "b l"]:
    """Texts whose first id, [CLS], is replaced: by [ENC] for the image-grounded encoder, by [DEC] for the decoder."""
    return jnp.asarray(ids).at[:, 0].set(first)
