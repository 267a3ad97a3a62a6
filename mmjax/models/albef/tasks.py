"""AlbefModel: features, image-text matching, classification of image-text pairs, and answers from a list."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.evaluation.features import similarities
from mmjax.interface.answers import AnsweringModel, AnswerRules
from mmjax.interface.grounding import GroundingModel, GroundingRules
from mmjax.interface.inputs import IMAGES_AND_TEXTS, Input
from mmjax.models.albef.network import Albef, AlbefConfig
from mmjax.models.bert.decode import BertDecodable
from mmjax.text.captions import ALBEF_RULES, TextRules
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.types import Array


class AlbefModel(GroundingModel, AnsweringModel):
    """A loaded ALBEF: image and text features, matching, pair classification, retrieval, answers, and grounding.

    The published files hold no tokenizer: put bert-base-uncased's vocab.txt beside them. Texts are cleaned as the
    original does (`mmjax.text.captions`) and encoded as [CLS] text, without [SEP]. The original only ranks answers.

    stats: with `config.holds_state`, "momentum" (parameters) and "queue" {"image", "text" [q, e], "cursor", for
    retrieval also "ids" [q, 1]}, so that an export writes back everything that was loaded.
    """

    system: ClassVar[str] = "albef"
    config_class: ClassVar[type] = AlbefConfig
    config: AlbefConfig
    rules: ClassVar[TextRules] = ALBEF_RULES
    answer_rules: ClassVar[AnswerRules] = AnswerRules(add_first_token=True)
    grounding_rules: ClassVar[GroundingRules] = GroundingRules(block=8, words_only=False)

    @classmethod
    def build(cls, config: AlbefConfig) -> nn.Module:
        return Albef(config)

    @classmethod
    def inputs(cls, config: AlbefConfig) -> Mapping[str, Input]:
        decoder = {"decoder_input_ids": Input("texts t"), "decoder_attention_mask": Input("texts t")}
        return IMAGES_AND_TEXTS | (decoder if config.decoder else {})

    @classmethod
    def example(cls, config: AlbefConfig) -> dict[str, jax.ShapeDtypeStruct]:
        pixels = jax.ShapeDtypeStruct((2 if config.two_images else 1, *config.vision.image_size, 3), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids}

    @classmethod
    def shapes(cls, config: AlbefConfig) -> dict[str, Any]:
        module, inputs = Albef(config), cls.example(config)

        def init(rng: Any, inputs: Any) -> Any:
            images, other = _images(inputs["pixel_values"], config)
            return module.init(rng, images, inputs["input_ids"], inputs["attention_mask"], other_images=other)

        params = config.stored_params(jax.eval_shape(init, jax.random.key(0), inputs)["params"])
        if not config.holds_state:
            return {"params": params}
        stats: dict[str, Any] = {"momentum": {part: params[part] for part in config.momentum_parts if part in params}}
        if config.queue:
            keys = jax.ShapeDtypeStruct((config.queue, config.embed_dim), jnp.float32)
            stats["queue"] = {"image": keys, "text": keys, "cursor": jax.ShapeDtypeStruct((), jnp.int32)}
            if config.by_image:
                stats["queue"]["ids"] = jax.ShapeDtypeStruct((config.queue, 1), jnp.int32)
        return {"params": params, "stats": stats}

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.config.module_params(self.params)}

    def weights(self) -> dict[str, Any]:
        """{"params", "stats"}, and "ema" and "queues" where the file has momentum encoders and queues."""
        weights: dict[str, Any] = {"params": self.params, "stats": {}}
        momentum, queue = self.stats.get("momentum"), dict(self.stats.get("queue", {}))
        if momentum:
            weights["ema"] = momentum
        if queue:
            cursor = queue.pop("cursor")
            weights["queues"] = {name: {"keys": keys, "cursor": cursor} for name, keys in queue.items()}
        return weights

    @classmethod
    def default_preprocess(cls, config: AlbefConfig, layout: str) -> ImagePreprocessing:
        """Resized to a square, bicubic, with CLIP's means and deviations (dataset/__init__.py)."""
        return ImagePreprocessing.albef(config.vision.image_size[0])

    @classmethod
    def num_classes(cls, config: AlbefConfig) -> int:
        return config.classes

    @classmethod
    def default_labels(cls, config: AlbefConfig) -> tuple[str, ...]:
        """The labels of NLVR2 for two images, of SNLI-VE (dataset/ve_dataset.py:14) for one."""
        labels = ("False", "True") if config.two_images else ("contradiction", "neutral", "entailment")
        return labels if config.classes == len(labels) else ()

    @classmethod
    def load_tokenizer(cls, file: pathlib.Path) -> WordPieceTokenizer | None:
        """Reads tokenizer.json, or vocab.txt in the same folder."""
        return WordPieceTokenizer.from_file_or_vocab(file)

    def answer_decoder(self) -> tuple[BertDecodable, dict[str, Any]]:
        assert self.config.decoder is not None
        config = dataclasses.replace(self.config.decoder, dtype=self.config.dtype)
        return BertDecodable(config), {"params": self.params["decoder"]}

    # ----------------------------------------------------------------------------------------------------------- arrays

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """The outputs that the inputs allow, by transformers' names.

        Images give vision_model_output and, with projections (`embed_dim`), image_embeds. Texts give text_model_output
        and, with projections, text_embeds. Images with texts also give logits_per_image and logits_per_text. The i-th
        image with the i-th text gives last_hidden_state [b, l, d] and the outputs of the heads: itm_score [b, 2],
        prediction_logits [b, l, v] of the MLM head, assignment_logits [b, 3] (first image, second image, neither),
        logits [b, c] of the classifier, or logits [b, t, v] of the decoder for decoder_input_ids.

        pixel_values of pairs: [2 b, height, width, 3], the first images of all pairs, then the second images.
        """
        c, outputs = self.config, dict[str, Any]()

        def apply(name: str, *arrays: Any) -> Any:
            return self.module.apply(variables, *arrays, method=name)

        tokens: list[Array] = []
        mask = inputs.get("attention_mask")
        if "pixel_values" in inputs:
            tokens = [apply("encode_image", x) for x in _images(inputs["pixel_values"], c) if x is not None]
            outputs["vision_model_output"] = {"last_hidden_state": jnp.concatenate(tokens)}
            outputs |= {"image_embeds": apply("image_embeds", tokens[0])} if c.embed_dim else {}
        if "input_ids" in inputs:
            states = apply("encode_text", inputs["input_ids"], mask)
            outputs["text_model_output"] = {"last_hidden_state": states}
            outputs |= {"text_embeds": apply("text_embeds", states)} if c.embed_dim else {}
        if not tokens or "input_ids" not in inputs:
            return outputs
        if c.embed_dim:
            cosines = similarities(outputs["image_embeds"], outputs["text_embeds"])
            logits = cosines / variables["params"]["temperature"]
            outputs |= {"logits_per_image": logits, "logits_per_text": logits.T}
        if len(tokens[0]) != len(states):
            raise MmjaxError(f"{len(tokens[0])} images and {len(states)} texts: ALBEF reads them in pairs")
        states = apply("encode_multimodal", states, mask, *tokens)
        outputs["last_hidden_state"] = states
        outputs |= {"itm_score": apply("itm_logits", states)} if c.matching else {}
        outputs |= {"prediction_logits": apply("mlm_logits", states)} if c.text.mlm else {}
        outputs |= {"assignment_logits": apply("assign", states)} if c.assigning else {}
        outputs |= {"logits": apply("classify", states)} if c.classes else {}
        if c.decoder is not None and "decoder_input_ids" in inputs:
            answers = inputs["decoder_input_ids"], inputs.get("decoder_attention_mask")
            outputs["logits"] = apply("decode", *answers, states, mask)
        return outputs


def _images(pixels: Array, config: AlbefConfig) -> tuple[Array, Array | None]:
    """The first images, and the second images or None. Raises MmjaxError for an odd number of images of pairs."""
    if not config.two_images:
        return pixels, None
    if len(pixels) % 2:
        raise MmjaxError(f"{len(pixels)} images: of pairs there are the first ones of all, then the second ones")
    half = len(pixels) // 2
    return pixels[:half], pixels[half:]
