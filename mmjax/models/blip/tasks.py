"""BlipModel: captions, answers, image and text features, matching, retrieval, and pairs of images."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.evaluation.features import similarities
from mmjax.generation.options import BeamRules, GenerationOptions
from mmjax.interface.answers import AnswerRules
from mmjax.interface.captioning import CaptioningModel
from mmjax.interface.generation import are_strings
from mmjax.interface.grounding import GroundingModel, GroundingRules
from mmjax.interface.inputs import IMAGES_AND_TEXTS, PIXELS, Input
from mmjax.interface.momentum import MomentumModel, image_pairs
from mmjax.models.bert.decode import BertDecodable
from mmjax.models.blip.decode import BlipDecodable
from mmjax.models.blip.network import BlipConfig, with_first
from mmjax.text.captions import BLIP_RULES, TextRules
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.types import Array, ArrayLike

ADDED = ("[DEC]", "[ENC]")
"""The ids that follow BERT's vocabulary (blip.py:186-191)."""
ANSWERS = GenerationOptions(max_new_tokens=9, num_beams=3, beam_rules=BeamRules.v4_15())
"""Of written answers (blip_vqa.py:94-113): max_length=10 counts [DEC], and min_length=1 is [DEC] itself."""
PROMPT = "a picture of"
"""The beginning of captions, in fine-tuning and in use (configs/caption_coco.yaml)."""
NUCLEUS: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "repetition_penalty": 1.1}
"""What the original samples with beside top_p (blip.py:147-157): transformers 4.15 has an implicit top_k of 50."""


class BlipModel(GroundingModel, MomentumModel, CaptioningModel):
    """A loaded BLIP: captions, answers, features, matching, retrieval, grounding, and classes of image pairs.

        model = mmjax.load("Salesforce/blip-image-captioning-base")
        model.caption([image])                                        # ["a woman sitting on the beach with her dog"]
        model.generate(["a picture of"], images=[image], num_beams=3)

    The original's files hold no tokenizer: put bert-base-uncased's vocab.txt beside them; [DEC] and [ENC] are appended.
    Strings are cleaned as the original does (`mmjax.text.captions`); captions begin with [CLS], texts with an image
    with [ENC], which the ITM head was trained with (blip_itm.py and transformers use [CLS]). Ids are used unchanged.
    """

    system: ClassVar[str] = "blip"
    config_class: ClassVar[type] = BlipConfig
    config: BlipConfig
    rules: ClassVar[TextRules] = BLIP_RULES
    answer_rules: ClassVar[AnswerRules] = AnswerRules(label_smoothing=0.1, generation=ANSWERS)
    grounding_rules: ClassVar[GroundingRules] = GroundingRules(block=7, words_only=True)
    add_similarity: ClassVar[bool] = True

    @classmethod
    def inputs(cls, config: BlipConfig) -> Mapping[str, Input]:
        if config.text is None:
            return PIXELS | {"input_ids": Input("b l"), "attention_mask": Input("b l")}
        decoder = {"decoder_input_ids": Input("texts t"), "decoder_attention_mask": Input("texts t")}
        return IMAGES_AND_TEXTS | (decoder if config.decoder else {})

    @classmethod
    def default_labels(cls, config: BlipConfig) -> tuple[str, ...]:
        """The labels of NLVR2."""
        return ("False", "True") if config.two_images and config.classes == 2 else ()

    @classmethod
    def load_tokenizer(cls, file: pathlib.Path) -> WordPieceTokenizer | None:
        """Reads tokenizer.json, or vocab.txt in the same folder, and appends [DEC] and [ENC] where they are missing."""
        tokenizer = super().load_tokenizer(file)
        return None if tokenizer is None else tokenizer.with_appended(ADDED)

    def fitting_tokenizer(self) -> WordPieceTokenizer:
        """The tokenizer. Raises MmjaxError where there is none, or one whose ids are not the model's."""
        tokenizer, c = super().fitting_tokenizer(), self.config
        ids = {"[SEP]": (tokenizer.sep, c.sep), "[PAD]": (tokenizer.pad, c.pad)}
        ids |= {name: (tokenizer.tokenizer.token_to_id(name), id) for name, id in zip(ADDED, (c.bos, c.enc))}
        wrong = [f"{name} is {a}, the model's {b}" for name, (a, b) in ids.items() if None not in (a, b) and a != b]
        if wrong:
            raise MmjaxError(f"the tokenizer does not fit this blip: its {'; its '.join(wrong)}")
        return tokenizer

    @property
    def text_config(self) -> Any:
        return self.config.text or self.config.decoder

    @property
    def abilities(self) -> tuple[str, ...]:
        heads = {"generate": self.config.decoder is not None, "caption": self.writes_captions}
        return tuple(name for name in super().abilities if heads.get(name, True))

    def frames(self, video: Any, count: int = 8) -> Array:
        """Pixel values [count, height, width, 3] of equally spaced frames, for `encode_image` and `retrieve`:

            videos = np.stack([model.frames(video) for video in videos])        # [n, 8, height, width, 3]
            model.retrieve(texts, videos, k=10, rerank=128)

        That is BLIP's zero-shot video-text retrieval (eval_retrieval_video.py): features are the mean over frames, and
        the ITM head reads the tokens of all frames. Frame i is that of index i * floor(length / count).
        video: images as `preprocess` takes them. Raises MmjaxError for fewer frames than `count`.
        """
        if len(video) < count:
            raise MmjaxError(f"a video of {len(video)} frames: {count} are taken")
        step = len(video) // count
        return self.pixels([video[i * step] for i in range(count)])

    # ----------------------------------------------------------------------------------------------------------- arrays

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """The outputs that the inputs allow, by transformers' names; ids are used unchanged.

        Images give last_hidden_state [b, n, d], and image_embeds: with projections (`embed_dim`) the unit-norm features
        [b, e], without the same as last_hidden_state, as transformers' captioner and VQA name it. Texts give, with
        projections, text_embeds [b, e] and text_model_output; images with texts, with a temperature, logits_per_image
        and logits_per_text. The i-th image with the i-th text, [ENC] first (blip_itm.py and transformers: [CLS]), gives
        question_embeds [b, l, d], their states, and itm_score [b, 2] or logits [b, c] of the heads. decoder_input_ids,
        [DEC] first, or input_ids of a captioner, give logits [b, t, v] of captions or answers.

        pixel_values of pairs: [2 b, height, width, 3], the first images of all pairs, then the second images.
        """
        c, outputs = self.config, dict[str, Any]()
        apply = functools.partial(self.apply, variables)
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        tokens: list[Array] = []
        if "pixel_values" in inputs:
            tokens = [apply("encode_image", x) for x in image_pairs(inputs["pixel_values"], c.two_images)]
            outputs["last_hidden_state"] = jnp.concatenate(tokens)
            features = apply("image_embeds", tokens[0]) if c.embed_dim else outputs["last_hidden_state"]
            outputs["image_embeds"] = features
        if ids is not None and c.embed_dim:
            states = apply("encode_text", ids, mask)
            outputs |= {"text_model_output": {"last_hidden_state": states}, "text_embeds": apply("text_embeds", states)}
        if not tokens:
            return outputs
        if "text_embeds" in outputs and c.temperature is not None:
            cosines = similarities(outputs["image_embeds"], outputs["text_embeds"])
            logits = cosines / variables["params"]["temperature"]
            outputs |= {"logits_per_image": logits, "logits_per_text": logits.T}
        context, context_mask = tokens[0], None
        if ids is not None and c.text is not None:
            _check_pairs(tokens[0], ids)
            context, context_mask = apply("encode_multimodal", ids, mask, *tokens), mask
            outputs["question_embeds"] = context
            outputs |= {"itm_score": apply("itm_logits", context)} if c.matching else {}
            outputs |= {"logits": apply("classify", context)} if c.classes else {}
        if not c.answers:
            context, context_mask = tokens[0], None
        prefix = "" if c.text is None else "decoder_"
        decoder_ids, decoder_mask = (inputs.get(f"{prefix}{name}") for name in ("input_ids", "attention_mask"))
        if decoder_ids is not None:
            _check_pairs(tokens[0], decoder_ids)
            outputs["logits"] = apply("decode", decoder_ids, decoder_mask, context, context_mask)
        return outputs

    # ------------------------------------------------------------------------------------------------------ generation

    @property
    def writes_captions(self) -> bool:
        """Whether there is a decoder of captions."""
        return self.config.decoder is not None and not self.config.answers

    @property
    def answers_questions(self) -> bool:
        return self.config.answers

    def decodable(self) -> BlipDecodable:
        """The `Decodable` for generation. Raises MmjaxError for a network without a decoder."""
        return BlipDecodable(self.config)

    def beginning(self) -> int:
        """[DEC], of captions. Raises MmjaxError where the decoder answers questions."""
        return self.config.bos if self.writes_captions else super().beginning()

    def check_room(self, length: int, new_tokens: int) -> None:
        """`length`: of the prompt; of a question no matter, since [DEC] begins its answer."""
        assert self.config.decoder is not None
        positions, needed = self.config.decoder.positions, (1 if self.config.answers else length) + new_tokens
        if needed > positions:
            raise MmjaxError(f"a prompt and {new_tokens} new tokens: {needed} are more than positions={positions}")

    def prompt_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        if "pixel_values" not in inputs:
            raise MmjaxError("generate needs images or pixel_values, one for each prompt")
        _check_pairs(inputs["pixel_values"], inputs["input_ids"])
        if not self.config.answers:
            return dict(inputs)
        start = jnp.full((len(inputs["input_ids"]), 1), self.config.bos, jnp.int32)
        return {**inputs, "decoder_input_ids": start}

    def _prepare(self, prompts: Any, mask: Any, add_special_tokens: bool, *others: Any) -> dict[str, Any]:
        """Of questions that are strings the decoder does not see the padding, so that an answer does not depend on the
        other questions. Of ids it sees every column, as in the original and in transformers."""
        self.decodable()
        inputs = super()._prepare(prompts, mask, add_special_tokens, *others)
        questions = self.config.answers and are_strings(prompts)
        return inputs | ({"encoder_attention_mask": inputs["attention_mask"]} if questions else {})

    def _encode(self, prompts: Any, add_special_tokens: bool) -> tuple[np.ndarray, np.ndarray]:
        """Questions: [ENC] text [SEP], cleaned. Prompts of captions: [DEC] text, unchanged, padded on the left.

        add_special_tokens: False: without [DEC]; questions always have theirs.
        """
        if not self.config.answers:
            return super()._encode(prompts, add_special_tokens)
        ids, mask = self.columns([prompts] if isinstance(prompts, str) else list(prompts), question=True)
        return np.asarray(with_first(ids, self.config.enc)), mask

    def caption(
        self,
        images: Any,
        prompt: str | None = PROMPT,
        *,
        max_length: int = 20,
        min_length: int = 5,
        num_beams: int = 3,
        top_p: float | None = None,
        seed: int = 0,
        batch_size: int = 16,
        **options: Any,
    ) -> list[Any]:
        """A caption of each image, without the prompt, by the original's beam search or nucleus sampling.

            model.caption([image])                              # as its scores on COCO: 3 beams
            model.caption([image], top_p=0.9, seed=1)           # as CapFilt writes synthetic captions
            model.caption([image], repetition_penalty=1.1)      # as on NoCaps (eval_nocaps.py:44)

        images: as `preprocess` takes them, or pixel values [b, height, width, 3].
        prompt: the beginning of each caption, after [DEC]; None: [DEC] alone.
        max_length, min_length: both count [DEC] and the prompt, as in the original: with "a picture of", 4 ids, a
            caption has at most 16 new tokens, [SEP] included, and at least one before [SEP].
        num_beams: 1: greedy. A finished beam's length counts the prompt and not [SEP] (transformers 4.15).
        top_p: samples instead, with temperature 1, top_k=50 and a repetition penalty of 1.1. A sample depends on the
            seed, and on `batch_size`, the number of images that are captioned at a time.
        options: further ones of `mmjax.generation.options.GenerationOptions`. With num_return_sequences above 1 the
            result has a list for each image.
        Raises MmjaxError for a network without a decoder of captions, no tokenizer, or a prompt as long as max_length.
        """
        if not self.writes_captions:
            raise MmjaxError("this blip has no decoder of captions: pre-trained ones and captioners have one")
        ids, settings = self.caption_start(prompt, max_length, min_length)
        if top_p is None:
            settings |= {"num_beams": num_beams, "beam_rules": BeamRules.v4_15()}
        else:
            settings |= {"top_p": top_p, **NUCLEUS}
        return self.captions_of(images, ids, self.options(**(settings | options)), seed, batch_size)

    def answer_decoder(self) -> tuple[BertDecodable, dict[str, Any]]:
        return self.decodable().decoder, {"params": self.params["decoder"]}

    def answer_start(self) -> int:
        return self.config.bos


def _check_pairs(images: ArrayLike, texts: ArrayLike) -> None:
    if len(images) != len(texts):
        raise MmjaxError(f"{len(images)} images and {len(texts)} texts: blip reads them in pairs")
