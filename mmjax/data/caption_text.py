"""Captions, questions and answers in a pipeline, for BERT's tokenizer: cleaned, then ids of one length with their mask.

transforms=(..., CleanText(albef_caption), EncodeCaption(tokenizer, 25, sep=False))                     # ALBEF
transforms=(..., CleanText(blip_caption), EncodeCaption(tokenizer, 40, template="a picture of {}"))     # BLIP
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from grain import transforms

from mmjax.data.decoding import BadRecord, clean_caption
from mmjax.data.sources import Record
from mmjax.data.transforms import drawn_text
from mmjax.errors import MmjaxError
from mmjax.text.captions import caption_columns, vqa_answer_columns
from mmjax.text.wordpiece import WordPieceTokenizer


@dataclass(frozen=True)
class CleanText(transforms.Map):
    """`text`, and each of `texts` where there are several: cleaned by one of `mmjax.text.captions`.

    Raises BadRecord "caption: empty" where nothing is left, on which the originals would train.
    """

    clean: Callable[[str], str]

    def map(self, element: Record) -> Record:
        cleaned: Record = {"texts": tuple(map(self._one, element["texts"]))} if "texts" in element else {}
        return element | cleaned | ({"text": self._one(element["text"])} if "text" in element else {})

    def _one(self, text: str) -> str:
        cleaned = self.clean(clean_caption(text))
        if not cleaned.strip():
            raise BadRecord("caption: empty", detail=f"nothing is left of {text!r}")
        return cleaned


@dataclass(frozen=True)
class EncodeCaption(transforms.RandomMap):
    """`text` (or one of `texts`, sampled, where a record has several) -> `input_ids`, `attention_mask`: int32
    [length], as from `mmjax.text.captions.caption_columns`.

    sep: whether [SEP] ends the text: BLIP has it, ALBEF does not.
    several: samples from `texts`; False: always takes `text`.
    template: with "{}" for the text; captioning with BLIP has "a picture of {}".
    """

    tokenizer: WordPieceTokenizer
    length: int
    sep: bool = True
    several: bool = True
    template: str = "{}"

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        text = self.template.replace("{}", drawn_text(element, self.several, rng))
        columns = caption_columns(self.tokenizer, [text], self.length, self.sep)
        return element | {name: column[0] for name, column in columns.items()}


@dataclass(frozen=True)
class EncodeAnswers(transforms.Map):
    """`answers` and `answer_weights` of a question -> `answer_ids`, `answer_mask`: int32 [slots, length], and
    `answer_weights`: float32 [slots], as from `mmjax.text.captions.vqa_answer_columns`.

    slots: the maximum of different answers; ten people answered each question of VQA.
    length: of an answer, [CLS] and [SEP] included; the originals truncate none.
    """

    tokenizer: WordPieceTokenizer
    slots: int = 10
    length: int = 16

    def __post_init__(self) -> None:
        """Raises MmjaxError without a slot."""
        if self.slots < 1:
            raise MmjaxError(f"slots={self.slots}: at least one answer")

    def map(self, element: Record) -> Record:
        if not element.get("answers"):
            raise BadRecord("answer: missing")
        return element | vqa_answer_columns(
            self.tokenizer, element["answers"], element["answer_weights"], self.slots, self.length
        )
