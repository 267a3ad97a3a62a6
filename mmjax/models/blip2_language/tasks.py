"""Blip2LanguageModel: captions, answers and chats of BLIP-2's second stage, and of InstructBLIP."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.generation.decodable import DecodeState
from mmjax.generation.engine import generate
from mmjax.generation.options import BeamRules
from mmjax.interface.chat import ChatPrompt
from mmjax.interface.generation import BUCKETS, are_strings
from mmjax.interface.inputs import Input, check_ids
from mmjax.interface.vision_language import VisionLanguageModel
from mmjax.models.language.decode import PrefixCache, compiled_remember, empty_prefix
from mmjax.models.vision_language.decode import LanguageSteps
from mmjax.models.vision_language.network import QueryConnector, VisionLanguage, VisionLanguageConfig
from mmjax.text.batches import Side, padded
from mmjax.text.captions import BLIP2_RULES
from mmjax.text.chat_template import Message
from mmjax.text.image_prompts import IMAGE
from mmjax.types import Array, ArrayLike

CAPTION = "a photo of"
"""The prompt of captions (configs/models/blip2/blip2_caption_opt2.7b.yaml)."""
QUESTION = "Question: {} Short answer:"
"""The prompt of questions (projects/blip2/eval/vqav2_zeroshot_*.yaml)."""
QUERY_TEXT = ("qformer_input_ids", "qformer_attention_mask")
INPUTS = {
    "pixel_values": Input("images height width 3", "float"),
    "input_ids": Input("b l", required=True),
    "attention_mask": Input("b l"),
}


class Blip2LanguageModel(VisionLanguageModel):
    """A loaded BLIP-2 of the second stage, over a decoder (OPT) or an encoder-decoder (Flan-T5); or an InstructBLIP.

        model = mmjax.load("Salesforce/blip2-opt-2.7b")
        model.caption([image])                                          # after "a photo of", 5 beams
        model.answer([image], ["what colour is the hen?"])              # "Question: {} Short answer:"
        model.generate("Question: which city is it? Answer:", images=[image])
        model.chat("which city is it?", images=[image])

    The features of an image, one for each query, precede the whole text, its beginning of a sequence too. So a string
    needs no `<image>`, and ids no places for the queries; where they have them, they are `config.image_token`. Files of
    LAVIS lack the language model: `mmjax.models.blip2_language.start.load_trained`.
    """

    system: ClassVar[str] = "blip2_language"
    config_class: ClassVar[type] = VisionLanguageConfig
    config: VisionLanguageConfig
    int8_channels: ClassVar[Mapping[str, int]] = {
        "language/**/kernel": 1,
        **dict.fromkeys(("language/token_embedding", "language/embedding", "language/head"), 0),
    }

    @classmethod
    def build(cls, config: VisionLanguageConfig) -> nn.Module:
        return VisionLanguage(config)

    @classmethod
    def inputs(cls, config: VisionLanguageConfig) -> Mapping[str, Input]:
        texts = {"decoder_input_ids": Input("b t")} if config.encodes else {}
        return INPUTS | texts | ({name: Input("images s") for name in QUERY_TEXT} if _sees_text(config) else {})

    @classmethod
    def example(cls, config: VisionLanguageConfig) -> dict[str, Any]:
        ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        pixels = jax.ShapeDtypeStruct((1, *config.vision.image_size, 3), jnp.float32)
        inputs: dict[str, Any] = {"pixel_values": pixels, "input_ids": ids, "index": ids, "attention_mask": ids}
        inputs["decoder_input_ids"] = ids if config.encodes else None
        return inputs | (dict.fromkeys(QUERY_TEXT, ids) if _sees_text(config) else {})

    @classmethod
    def default_preprocess(cls, config: VisionLanguageConfig, layout: str) -> ImagePreprocessing:
        """Resized to a square, bicubic, with CLIP's means and deviations (processors/blip_processors.py)."""
        return ImagePreprocessing.albef(config.vision.image_size[0])

    @property
    def abilities(self) -> tuple[str, ...]:
        """An InstructBLIP generates from ids alone, since its texts are for two tokenizers."""
        texts = ("caption", "answer", "chat") if _sees_text(self.config) else ()
        return tuple(name for name in super().abilities if name not in texts)

    # ----------------------------------------------------------------------------------------------------------- arrays

    def forward(
        self,
        pixel_values: ArrayLike | None = None,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        **others: ArrayLike | None,
    ) -> dict[str, Array]:
        """The network on preprocessed arrays; compiled once for each shape.

        pixel_values: float32 [images, h, w, 3], those of all texts, in their order. None: texts alone.
        input_ids: int [b, l]: the prompts and what follows, of an encoder-decoder the encoder's. An image is as many
            ids `config.image_token` as there are queries; of ids without any the queries of one image each come first,
            and the logits are of these too. attention_mask: int [b, l], 1 = a token.
        decoder_input_ids: int [b, t], of an encoder-decoder: the start token and what follows.
        qformer_input_ids, qformer_attention_mask: int [images, s], of InstructBLIP: the instruction as BERT's ids.
        Returns logits float32 [b, l, v], of an encoder-decoder [b, t, v]; vision_outputs and qformer_outputs, each
            {"last_hidden_state"}; image_hidden_states [images, q, d], the features; last_hidden_state and
            hidden_states, of an encoder-decoder encoder_last_hidden_state, encoder_hidden_states and, with
            decoder_input_ids, decoder_hidden_states.
        Raises MmjaxError for another number of image ids than of features, and as for every model.
        """
        if pixel_values is not None and input_ids is not None and np.ndim(input_ids) == 2:
            images = len(np.asarray(pixel_values))
            input_ids, attention_mask = self.with_queries(input_ids, attention_mask, images)
        return super().forward(pixel_values, input_ids, attention_mask, **others)

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """See `forward`. inputs: as of `VisionLanguageModel.outputs`."""
        names = ("pixel_values", "input_ids", "index", "attention_mask", "decoder_input_ids", *QUERY_TEXT)
        arrays = [inputs.get(name) for name in names]
        if arrays[0] is None:
            embeds = self.module.apply(variables, arrays[1], method="embed")
            outputs: Any = self.module.apply(variables, embeds, *arrays[3:5], method="decode")
            named: dict[str, Any] = {}
        else:
            outputs = self.module.apply(variables, *arrays)
            parts = {"vision_outputs": outputs["vision"], "qformer_outputs": outputs["queries"]}
            named = {name: {"last_hidden_state": states} for name, states in parts.items()}
            named["image_hidden_states"] = outputs["features"]
        if not self.config.encodes:
            states = tuple(outputs["states"])
            return named | {"logits": outputs["logits"], "last_hidden_state": states[-1], "hidden_states": states}
        states = tuple(outputs["encoder"])
        named |= {"encoder_last_hidden_state": states[-1], "encoder_hidden_states": states}
        if "logits" in outputs:
            named |= {"logits": outputs["logits"], "decoder_hidden_states": tuple(outputs["decoder"])}
        return named

    def pictures(self, inputs: Mapping[str, Array]) -> tuple[Array, list[np.ndarray]]:
        pixels, q = inputs["pixel_values"], self.config.tile_tokens
        return pixels, list(np.arange(len(pixels) * q, dtype=np.int32).reshape(len(pixels), q))

    def _indexed(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        others = {name: inputs[name] for name in ("decoder_input_ids", *QUERY_TEXT) if name in inputs}
        connector = self.config.connector
        assert isinstance(connector, QueryConnector)
        counts = {"decoder_input_ids": self.num_ids, "qformer_input_ids": connector.qformer.vocab_size}
        check_ids(others, counts)
        if "pixel_values" in inputs and _sees_text(self.config) and "qformer_input_ids" not in inputs:
            raise MmjaxError("the queries of an InstructBLIP see the instruction: qformer_input_ids, as BERT's ids")
        return super()._indexed(inputs) | others

    def with_queries(self, ids: ArrayLike, mask: ArrayLike | None, images: int) -> tuple[np.ndarray, Any]:
        """The ids and mask, with places for the queries before the text where there are none."""
        ids, token = np.asarray(ids), self.config.image_token
        if not images or (ids == token).any():
            return ids, mask
        if images != len(ids):
            raise MmjaxError(f"{images} images and {len(ids)} texts without places of images: one image for each text")
        shape = (len(ids), self.config.tile_tokens)
        longer = np.concatenate([np.full(shape, token, ids.dtype), ids], axis=1)
        if mask is not None:
            mask = np.asarray(mask)
            mask = np.concatenate([np.ones(shape, mask.dtype), mask], axis=1)
        return longer, mask

    # ------------------------------------------------------------------------------------------------------ generation

    @property
    def padding_side(self) -> Side:  # type: ignore[override]
        """Results of a decoder are the same either way; an encoder-decoder does not continue its prompts."""
        return "right" if self.config.encodes else "left"

    def decodable(self) -> LanguageSteps:
        return LanguageSteps(self.config.decoder)

    def beginning(self) -> int:
        """What the tokenizer makes of an empty text: the beginning of a sequence, or T5's end of one."""
        return self.eos[0] if self.config.encodes else self.config.bos or 0

    def generate(self, prompts: Any = None, *, images: Any = None, **options: Any) -> Any:
        """Continues prompts, or answers them (Flan-T5).

            model.generate(["a photo of"], images=[image], num_beams=5, max_new_tokens=30)

        prompts: strings, of one image each, or with `<image>` as often as there are images; or ids, see `forward`.
            None: without a prompt, once for each image.
        images: those of all prompts, in their order; or for each prompt a list of its images.
        options: further arguments as of every generating model. For InstructBLIP pixel_values={"pixel_values",
            "qformer_input_ids", "qformer_attention_mask"} goes with ids.
        Raises MmjaxError as these do.
        """
        return super().generate(_marked(prompts, images, options), images=images, **options)

    def stream(self, prompt: str | None = None, *, images: Any = None, **options: Any) -> Iterator[str]:
        """The text of `generate`, piece by piece."""
        return super().stream(_marked(prompt, images, options), images=images, **options)

    def prompt_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        """Ids and masks with places for the queries, and the embeddings of all of it."""
        images = len(inputs["pixel_values"]) if "pixel_values" in inputs else 0
        ids, mask = self.with_queries(inputs["input_ids"], inputs["attention_mask"], images)
        network = self._indexed({**inputs, "input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)})
        texts = {name: network[name] for name in ("input_ids", "attention_mask")}
        arrays = [network.get(name) for name in ("pixel_values", *QUERY_TEXT)]
        features = None if arrays[0] is None else self._encoded(self.variables, *arrays)
        embeds = self._embedded(self.variables, texts["input_ids"], network.get("index"), features)
        if self.config.encodes:
            start = self.config.decoder.start
            texts["decoder_input_ids"] = jnp.full((len(ids), 1), start, jnp.int32)
        return {**texts, "inputs_embeds": embeds}

    def encode_prompt(self, text: str, lengths: Sequence[int], add_special_tokens: bool = True) -> list[int]:
        """The ids of a text without its `<image>`, after those of all its images."""
        if self.tokenizer is None:
            raise MmjaxError(
                f"this {self.system} came without a tokenizer: pass ids, or set one: vlm.replace(tokenizer=)"
            )
        if lengths and _sees_text(self.config):
            raise MmjaxError(
                "the instruction of an InstructBLIP is for two tokenizers: pass input_ids and qformer_input_ids"
            )
        ids = self.tokenizer.encode([text.replace(IMAGE, "")], add_special_tokens)[0]
        return [self.config.image_token] * sum(lengths) + ids

    # ------------------------------------------------------------------------------------------- captions and answers

    def caption(
        self,
        images: Any,
        prompt: str = CAPTION,
        *,
        max_length: int = 30,
        min_length: int = 8,
        num_beams: int = 5,
        top_p: float | None = None,
        seed: int = 0,
        batch_size: int = 16,
        **options: Any,
    ) -> list[Any]:
        """A caption of each image, without the prompt, as LAVIS scores them on COCO (tasks/captioning.py:47-48).

            model.caption([image])                                     # 5 beams, repetition 1.15, length penalty 0
            model.caption([image], top_p=0.9, seed=1)                  # sampled

        images: as `preprocess` takes them, or pixel values [b, height, width, 3].
        max_length, min_length: of new tokens with their end and, but for an encoder-decoder's max_length, with the
            beginning of a sequence; the prompt is not counted.
        num_beams: 1: greedy. Beams are compared as in transformers 4.33.
        top_p: samples instead, with temperature 1 and top_k=50, that version's default. A sample depends on the seed
            and on `batch_size`, the number of images that are captioned at a time.
        options: further ones of `mmjax.generation.options.GenerationOptions`. With num_return_sequences above 1 the
            result has a list for each image.
        """
        new = max_length if self.config.encodes else max_length - 1
        settings: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": min(max(min_length - 1, 0), new)}
        settings |= {"repetition_penalty": 1.15, "length_penalty": 0.0}
        if top_p is None:
            settings["num_beams"] = num_beams
        else:
            settings |= {"temperature": 1.0, "top_k": 50, "top_p": top_p}
        pixels = self.pixels(images)
        return self._texts([prompt] * len(pixels), pixels, settings | options, seed, batch_size)

    def answer(
        self,
        images: Any,
        questions: Sequence[str],
        prompt: str = QUESTION,
        *,
        num_beams: int = 5,
        max_new_tokens: int = 10,
        batch_size: int = 16,
        **options: Any,
    ) -> list[Any]:
        """A short answer to each question, about the image of the same index, as LAVIS scores zero-shot VQA.

            model.answer([image], ["what colour is the hen?"])

        questions: cleaned as the original does (`mmjax.text.captions`). prompt: with "{}" for the question.
        options: further ones of `mmjax.generation.options.GenerationOptions`; length_penalty is 0 by default, of an
            encoder-decoder -1, which prefers short answers (blip2_opt.py:306, blip2_t5.py:245).
        Raises MmjaxError for another number of questions than of images.
        """
        pixels = self.pixels(images)
        if len(pixels) != len(questions):
            raise MmjaxError(f"{len(pixels)} images and {len(questions)} questions: one image for each")
        settings: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
        settings["length_penalty"] = -1.0 if self.config.encodes else 0.0
        texts = [prompt.replace("{}", BLIP2_RULES.question(question)) for question in questions]
        return self._texts(texts, pixels, settings | options, 0, batch_size)

    def _texts(
        self, prompts: Sequence[str], pixels: Array, settings: Mapping[str, Any], seed: int, batch_size: int
    ) -> list[Any]:
        """What follows each prompt with its image, as in transformers 4.33: a decoder's prompt counts as one id."""
        if not len(pixels):
            return []
        options = self.options(**{"beam_rules": BeamRules.v4_33(), "bos": self.config.bos, **settings})
        sequences = [self.encode_prompt(prompt, [self.config.tile_tokens]) for prompt in prompts]
        longest = max(map(len, sequences))
        self.check_room(longest, options.max_new_tokens)
        width = next(size for size in BUCKETS if size >= longest)
        ids, mask = padded(sequences, width, self.pad, self.padding_side)
        generated: list[np.ndarray] = []
        size, key = min(batch_size, len(ids)), jax.random.key(seed)
        for start in range(0, len(ids), size):
            rows = np.minimum(np.arange(start, start + size), len(ids) - 1)  # the last batch with copies
            batch = {"pixel_values": pixels[rows], "input_ids": ids[rows], "attention_mask": mask[rows]}
            inputs = self.prompt_inputs(batch)
            del inputs["input_ids"]
            rng = jax.random.fold_in(key, start)
            generated += list(np.asarray(generate(self.decodable(), self.variables, inputs, options, rng).ids))
        texts = [[self._text(row, options.eos, ()).strip() for row in item] for item in generated[: len(ids)]]
        return [item[0] if options.num_return_sequences == 1 else item for item in texts]

    # --------------------------------------------------------------------------------------------------- conversations

    def chat_prompt(self, messages: Sequence[Message]) -> ChatPrompt:
        """As in the original's examples (projects/blip2): "Question: .. Answer: .. . Question: .. Answer:"."""
        parts = []
        for message in messages:
            text = _text(message).strip()
            forms = {"user": f"Question: {text} Answer:", "assistant": f"{text.rstrip('.')}."}
            parts.append(forms.get(str(message.get("role")), text))
        images = sum(_image_count(message) for message in messages)
        return ChatPrompt(IMAGE * images + " ".join(parts), True)

    def empty_past(self, size: int) -> PrefixCache | None:
        return None if self.config.encodes else empty_prefix(self.config.decoder, size)

    def remember(self, state: DecodeState, size: int) -> PrefixCache | None:
        return None if self.config.encodes else compiled_remember(state, size)

    @property
    def reuses(self) -> bool:
        return not self.config.encodes and not self.config.decoder.keys_depend_on_length

    def for_layout(self, layout: str) -> Self:
        """Hugging Face's newer files have an id of the vocabulary for a query; what was read from its older ones stays
        as it is."""
        return self.with_image_id() if layout == "hf" != self.layout and self.config.image_token < 0 else self


def _sees_text(config: VisionLanguageConfig) -> bool:
    """Whether the queries see a text: InstructBLIP."""
    return isinstance(config.connector, QueryConnector) and config.connector.qformer.vocab_size > 0


def _marked(prompts: Any, images: Any, options: Mapping[str, Any]) -> Any:
    """Strings with `<image>` for each of their images, where none has any."""
    if not are_strings(prompts) or (images is None and options.get("pixel_values") is None):
        return prompts
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if any(IMAGE in text for text in texts):
        return prompts
    counts = [1] * len(texts)
    if isinstance(images, list | tuple) and len(images) == len(texts):
        counts = [len(each) if isinstance(each, list | tuple) else 1 for each in images]
    marked = [IMAGE * count + text for count, text in zip(counts, texts)]
    return marked[0] if isinstance(prompts, str) else marked


def _text(message: Message) -> str:
    """A message's content without its images."""
    content = message["content"]
    if isinstance(content, str):
        return content.replace(f"{IMAGE}\n", "").replace(IMAGE, "")
    return "".join(part["text"] for part in content if part["type"] == "text")


def _image_count(message: Message) -> int:
    content = message["content"]
    if isinstance(content, str):
        return content.count(IMAGE)
    return sum(part["type"] == "image" for part in content)
