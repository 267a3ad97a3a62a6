"""ALBEF's and BLIP's cleaning of captions and questions, and their ids (ALBEF `dataset/utils.py`,
`tokenization_bert.py`; BLIP `data/utils.py`).

    >>> albef_caption("A man's T-shirt, (red)!"), blip_caption("A man's T-shirt, (red)!")
    ('a mans t shirt red', "a man's t-shirt, red")

                            ALBEF                       BLIP
    , ' ?                   deleted                     kept
    . ! " ( ) * # : ; ~     deleted                     blanks in captions, deleted from questions
    - /                     blanks                      kept
    <person>                person (captions only)      kept
    words kept              30, questions at test 50    30 (NLVR2 and videos 40; BLIP-2 50), questions 50
    ids                     [CLS] text                  [CLS] text [SEP]

All four lower-case. In captions runs of blanks then become one; in questions they stay, so that there is an empty word
between two spaces, which counts. Words are separated by spaces: a tab does not end one.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mmjax.errors import MmjaxError
from mmjax.text.wordpiece import WordPieceTokenizer

REMOVED = '.!"()*#:;~'
ALBEF = str.maketrans("-/", "  ", REMOVED + ",'?")
BLIP_CAPTION = str.maketrans(REMOVED, " " * len(REMOVED))
BLIP_QUESTION = str.maketrans("", "", REMOVED)
BLANKS = re.compile(r"\s{2,}")
OTHER_SIDE = {"left": "right", "right": "left"}


def albef_caption(text: str, words: int = 30) -> str:
    """A caption as ALBEF cleans it."""
    return _first(_joined(text.lower().translate(ALBEF).replace("<person>", "person")), words)


def albef_question(text: str, words: int = 30) -> str:
    """A question as ALBEF cleans it; evaluation uses 50 words."""
    return _first(text.lower().translate(ALBEF).rstrip(" "), words)


def blip_caption(text: str, words: int = 30) -> str:
    """A caption as BLIP cleans it."""
    return _first(_joined(text.lower().translate(BLIP_CAPTION)), words)


def blip_question(text: str, words: int = 50) -> str:
    """A question as BLIP cleans it."""
    return _first(text.lower().translate(BLIP_QUESTION).rstrip(" "), words)


def _joined(text: str) -> str:
    return BLANKS.sub(" ", text).rstrip("\n").strip(" ")


def _first(text: str, words: int) -> str:
    return " ".join(text.split(" ")[:words])


def exchange_sides(text: str) -> str:
    """A cleaned sentence about two images that were swapped: "left" becomes "right" and "right" becomes "left".

    As in BLIP's `nlvr_dataset.py` only words separated by spaces change: "leftmost" and "left," stay.
    """
    return " ".join(OTHER_SIDE.get(word, word) for word in text.split(" "))


class TextRules(NamedTuple):
    """How a system makes ids of captions and questions.

    caption, question: the cleaning. sep: whether [SEP] ends a text. length: columns of a caption in retrieval.
    """

    caption: Callable[[str], str]
    question: Callable[[str], str]
    sep: bool
    length: int


ALBEF_RULES = TextRules(albef_caption, functools.partial(albef_question, words=50), sep=False, length=30)
BLIP_RULES = TextRules(blip_caption, blip_question, sep=True, length=35)
BLIP2_RULES = TextRules(functools.partial(blip_caption, words=50), blip_question, sep=True, length=35)


def caption_columns(
    tokenizer: WordPieceTokenizer, texts: Sequence[str], length: int, sep: bool, multiple: int | None = None
) -> dict[str, Int[np.ndarray, "n l"]]:
    """[CLS] text, and [SEP] with `sep`: "input_ids", "attention_mask", int32 [n, length]; long texts are truncated.

    multiple: if not None, the arrays have the longest text's length rounded up to this multiple, at most `length`.

    ALBEF has no [SEP] and lengths of 25 in pre-training, 30 to evaluate retrieval; BLIP has one, and 30 in
    pre-training, 35 in retrieval, 40 for captions. In other fine-tuning the originals do not truncate: any length that
    fits all texts (64) is equivalent, since padding is masked.
    Raises MmjaxError for a length too small for a piece, or an argument that is not text.
    """
    capacity = length - 1 - sep
    if capacity < 1:
        raise MmjaxError(f"length={length}: too short for a piece beside [CLS]{' and [SEP]' if sep else ''}")
    end = [tokenizer.sep] if sep else []
    sequences = [[tokenizer.cls, *pieces[:capacity], *end] for pieces in tokenizer.pieces(texts)]
    if multiple is not None:
        length = min(length, -(-max(map(len, sequences), default=1) // multiple) * multiple)
    columns = tokenizer.batch([(ids, [0] * len(ids)) for ids in sequences], length)
    return {name: columns[name] for name in ("input_ids", "attention_mask")}


def vqa_answer_columns(
    tokenizer: WordPieceTokenizer, answers: Sequence[str], weights: Sequence[float], slots: int, length: int
) -> dict[str, Int[np.ndarray, "s l"] | Float[np.ndarray, " s"]]:
    """The answers to one question as [CLS] answer [SEP], for both systems: "answer_ids" and "answer_mask", int32
    [slots, length], and "answer_weights", float32 [slots].

    With more answers than slots those of the smallest weights are dropped. Unused slots have weight 0 and contain
    [CLS] [SEP], so that attention always has a token.
    """
    selected = sorted(zip(answers, weights), key=lambda pair: -pair[1])[:slots]
    selected += [("", 0.0)] * (slots - len(selected))
    columns = caption_columns(tokenizer, [answer for answer, _ in selected], length, sep=True)
    weights_array = np.array([weight for _, weight in selected], np.float32)
    return {
        "answer_ids": columns["input_ids"],
        "answer_mask": columns["attention_mask"],
        "answer_weights": weights_array,
    }
