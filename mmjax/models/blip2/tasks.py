"""Blip2Model: image and text features, matching, retrieval, grounding and captions of BLIP-2's first stage."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.evaluation.features import nearest_similarities
from mmjax.generation.options import BeamRules
from mmjax.interface.captioning import CaptioningModel
from mmjax.interface.grounding import GroundingModel, GroundingRules
from mmjax.interface.inputs import IMAGES_AND_TEXTS, Input
from mmjax.models.blip2.decode import Blip2Decodable
from mmjax.models.blip2.network import Blip2Config
from mmjax.text.captions import BLIP2_RULES, TextRules
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.types import Array, ArrayLike, Float

DEC = "[DEC]"
"""The id that follows BERT's vocabulary (blip2.py:31)."""


class Blip2Model(GroundingModel, CaptioningModel):
    """A loaded BLIP-2 of the first stage: features, matching, retrieval, grounding, and with an LM head captions.

        model = mmjax.load("Salesforce/blip2-itm-vit-g")
        model.retrieve("a red hen", images, rerank=128)          # ITM logit + the cosine of the nearest query
        mmjax.load("blip2_pretrained.pth").caption(images)       # eva_vit_g.pth beside it

    LAVIS' files hold no tokenizer: put bert-base-uncased's vocab.txt beside them. Strings are cleaned as the original
    does (`mmjax.text.captions`); ids are used unchanged. Features of an image are several, one for each query
    [b, q, e], and its similarity to a text is that of the nearest (LAVIS blip2.py:202-315).
    """

    system: ClassVar[str] = "blip2"
    config_class: ClassVar[type] = Blip2Config
    config: Blip2Config
    rules: ClassVar[TextRules] = BLIP2_RULES
    grounding_rules: ClassVar[GroundingRules] = GroundingRules(block=8, words_only=False)
    cross_attends: ClassVar[str] = "qformer/encoder"
    add_similarity: ClassVar[bool] = True

    @classmethod
    def build(cls, config: Blip2Config) -> nn.Module:
        return config.network()

    @classmethod
    def inputs(cls, config: Blip2Config) -> Mapping[str, Input]:
        decoder = {"decoder_input_ids": Input("images t"), "decoder_attention_mask": Input("images t")}
        return IMAGES_AND_TEXTS | (decoder if config.qformer.mlm else {})

    @classmethod
    def example(cls, config: Blip2Config) -> dict[str, jax.ShapeDtypeStruct]:
        pixels = jax.ShapeDtypeStruct((1, *config.vision.image_size, 3), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids}

    @classmethod
    def default_preprocess(cls, config: Blip2Config, layout: str) -> ImagePreprocessing:
        """Resized to a square, bicubic, with CLIP's means and deviations (processors/blip_processors.py)."""
        return ImagePreprocessing.albef(config.vision.image_size[0])

    @classmethod
    def load_tokenizer(cls, file: pathlib.Path) -> WordPieceTokenizer | None:
        """Reads tokenizer.json, or vocab.txt in the same folder."""
        return WordPieceTokenizer.from_file_or_vocab(file)

    def fitting_tokenizer(self) -> WordPieceTokenizer:
        """The tokenizer, which may lack [DEC]: no text has it. Raises MmjaxError where there is none, or one whose ids
        are not the model's."""
        tokenizer, c = self.tokenizer, self.config
        beyond = c.image_token is not None and c.image_token >= c.vocab_size  # transformers' placeholder
        if tokenizer is None or tokenizer.vocab_size > c.vocab_size + beyond:
            return super().fitting_tokenizer()
        ids = {"[SEP]": (tokenizer.sep, c.sep), "[PAD]": (tokenizer.pad, c.pad)}
        ids |= {DEC: (tokenizer.tokenizer.token_to_id(DEC), c.bos)}
        wrong = [f"{name} is {a}, the model's {b}" for name, (a, b) in ids.items() if None not in (a, b) and a != b]
        if wrong:
            raise MmjaxError(f"the tokenizer does not fit this blip2: its {'; its '.join(wrong)}")
        return tokenizer

    @property
    def text_config(self) -> Any:
        return self.config.qformer

    @property
    def abilities(self) -> tuple[str, ...]:
        generates = self.config.qformer.mlm
        return tuple(name for name in super().abilities if generates or name not in ("generate", "caption"))

    def similarity(self, queries: ArrayLike, candidates: ArrayLike) -> Float[Array, "n m"]:
        """Of the nearest pair of features, of items that have several: images."""
        return nearest_similarities(jnp.asarray(queries), jnp.asarray(candidates))

    # ----------------------------------------------------------------------------------------------------------- arrays

    def forward(
        self,
        pixel_values: ArrayLike | None = None,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        **others: ArrayLike | None,
    ) -> dict[str, Array]:
        """As `Model.forward`. input_ids may begin with the placeholders that transformers' processor puts there, one
        for each query, where the model has `config.image_token`; they and their mask are dropped."""
        q, token = self.config.queries, self.config.image_token
        ids = None if input_ids is None or token is None else np.asarray(input_ids)
        if ids is not None and ids.ndim == 2 and ids.shape[1] > q and (ids[:, :q] == token).all():
            input_ids = ids[:, q:]
            attention_mask = None if attention_mask is None else np.asarray(attention_mask)[:, q:]
        return super().forward(pixel_values, input_ids, attention_mask, **others)

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """The outputs that the inputs allow, by transformers' names; ids are used unchanged.

        Images give vision_model_output, the image's tokens [b, n, e]; qformer_outputs, the states of the queries alone
        [b, q, d]; and image_embeds [b, q, e], unit-norm features. Texts give text_model_output [b, l, d] and
        text_embeds [b, e]. Images with texts give logits_per_image and logits_per_text, the cosines of the nearest
        query; as many images as texts also multimodal_embeds [b, q, d], the states of the queries with the text, and
        itm_logits [b, 2], which transformers calls logits_per_image with `use_image_text_matching_head`.
        decoder_input_ids, [DEC] first, give logits [b, t, v] of captions.
        """
        apply = functools.partial(self.apply, variables)
        outputs: dict[str, Any] = {}
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is not None:
            states = apply("encode_text", ids, mask)
            outputs |= {"text_model_output": {"last_hidden_state": states}, "text_embeds": apply("text_embeds", states)}
        if "pixel_values" not in inputs:
            return outputs
        tokens = apply("encode_image", inputs["pixel_values"])
        queries, caches = apply("encode_queries", tokens)
        outputs |= {"vision_model_output": {"last_hidden_state": tokens}}
        outputs |= {"qformer_outputs": {"last_hidden_state": queries}}
        outputs["image_embeds"] = apply("project_queries", queries)
        if ids is not None:
            cosines = self.similarity(outputs["image_embeds"], outputs["text_embeds"])
            outputs |= {"logits_per_image": cosines, "logits_per_text": cosines.T}
            if len(ids) == len(tokens):
                states = apply("encode_multimodal", ids, mask, tokens)
                outputs |= {"multimodal_embeds": states, "itm_logits": apply("itm_logits", states)}
        if "decoder_input_ids" in inputs:
            texts = inputs["decoder_input_ids"], inputs.get("decoder_attention_mask")
            outputs["logits"] = apply("decode", *texts, caches)
        return outputs

    # -------------------------------------------------------------------------------------------------------- grounding

    def grounding_block(self, block: int | None = None) -> int:
        """Of the layers with cross attention, from 0; None: layer 8 of the published 12, or the last of a smaller one.

        Raises MmjaxError for another layer.
        """
        c = self.config.qformer
        crossed = range(0, c.depth, c.cross_every)
        chosen = max(i for i in crossed if i <= self.grounding_rules.block) if block is None else block
        if chosen not in crossed:
            raise MmjaxError(f"block={chosen}: the layers with cross attention are {', '.join(map(str, crossed))}")
        return chosen

    def map_rows(self, mask: Array) -> Float[Array, "b q"]:
        """All queries: the ITM head reads the mean of them."""
        return jnp.ones((len(mask), self.config.queries))

    # ------------------------------------------------------------------------------------------------------ generation

    def decodable(self) -> Blip2Decodable:
        """The `Decodable` for generation. Raises MmjaxError for a network without an LM head."""
        return Blip2Decodable(self.config)

    def beginning(self) -> int:
        """[DEC]."""
        return self.config.bos

    def check_room(self, length: int, new_tokens: int) -> None:
        positions, needed = self.config.qformer.positions, length + new_tokens
        if needed > positions:
            raise MmjaxError(f"a prompt and {new_tokens} new tokens: {needed} are more than positions={positions}")

    def prompt_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        if "pixel_values" not in inputs:
            raise MmjaxError("generate needs images or pixel_values, one for each prompt")
        images, texts = len(inputs["pixel_values"]), len(inputs["input_ids"])
        if images != texts:
            raise MmjaxError(f"{images} images and {texts} texts: blip2 reads them in pairs")
        return dict(inputs)

    def caption(
        self,
        images: Any,
        prompt: str | None = None,
        *,
        max_length: int = 30,
        min_length: int = 10,
        num_beams: int = 3,
        top_p: float | None = None,
        seed: int = 0,
        batch_size: int = 16,
        **options: Any,
    ) -> list[Any]:
        """A caption of each image, without the prompt, by the original's beam search or nucleus sampling.

            model.caption([image])                              # 3 beams (blip2_qformer.py, generate)
            model.caption([image], "a photo of", top_p=0.9, seed=1)

        images: as `preprocess` takes them, or pixel values [b, height, width, 3].
        prompt: the beginning of each caption, after [DEC]; None: [DEC] alone, as in the original.
        max_length, min_length: both count [DEC] and the prompt; [SEP] is one of the tokens.
        num_beams: 1: greedy. A finished beam's length is that of transformers 4.33.
        top_p: samples instead, with temperature 1. A sample depends on the seed, and on `batch_size`, the number of
            images that are captioned at a time.
        options: further ones of `mmjax.generation.options.GenerationOptions`. With num_return_sequences above 1 the
            result has a list for each image.
        Raises MmjaxError for a network without an LM head, no tokenizer, or a prompt as long as max_length.
        """
        self.decodable()
        ids, settings = self.caption_start(prompt, max_length, min_length)
        if top_p is None:
            settings |= {"num_beams": num_beams, "beam_rules": BeamRules.v4_33()}
        else:
            settings |= {"top_p": top_p, "temperature": 1.0}
        return self.captions_of(images, ids, self.options(**(settings | options)), seed, batch_size)
