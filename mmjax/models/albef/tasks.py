"""AlbefModel: features, image-text matching, classification of image-text pairs, and answers from a list."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.evaluation.features import similarities
from mmjax.interface.answers import AnswerRules
from mmjax.interface.grounding import GroundingModel, GroundingRules
from mmjax.interface.inputs import IMAGES_AND_TEXTS, Input
from mmjax.interface.momentum import MomentumModel, image_pairs
from mmjax.models.albef.network import AlbefConfig
from mmjax.models.bert.decode import BertDecodable
from mmjax.text.captions import ALBEF_RULES, TextRules
from mmjax.types import Array


class AlbefModel(GroundingModel, MomentumModel):
    """A loaded ALBEF: image and text features, matching, pair classification, retrieval, answers, and grounding.

    The published files hold no tokenizer: put bert-base-uncased's vocab.txt beside them. Texts are cleaned as the
    original does (`mmjax.text.captions`) and encoded as [CLS] text, without [SEP]. The original only ranks answers.
    """

    system: ClassVar[str] = "albef"
    config_class: ClassVar[type] = AlbefConfig
    config: AlbefConfig
    rules: ClassVar[TextRules] = ALBEF_RULES
    answer_rules: ClassVar[AnswerRules] = AnswerRules(add_first_token=True)
    grounding_rules: ClassVar[GroundingRules] = GroundingRules(block=8, words_only=False)

    @classmethod
    def inputs(cls, config: AlbefConfig) -> Mapping[str, Input]:
        decoder = {"decoder_input_ids": Input("texts t"), "decoder_attention_mask": Input("texts t")}
        return IMAGES_AND_TEXTS | (decoder if config.decoder else {})

    @classmethod
    def default_labels(cls, config: AlbefConfig) -> tuple[str, ...]:
        """The labels of NLVR2 for two images, of SNLI-VE (dataset/ve_dataset.py:14) for one."""
        labels = ("False", "True") if config.two_images else ("contradiction", "neutral", "entailment")
        return labels if config.classes == len(labels) else ()

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
            tokens = [apply("encode_image", x) for x in image_pairs(inputs["pixel_values"], c.two_images)]
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
