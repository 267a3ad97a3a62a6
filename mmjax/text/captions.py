"""How ALBEF and BLIP clean captions and questions, and the ids that come of them (ALBEF `dataset/utils.py`,
`tokenization_bert.py`; BLIP `data/utils.py`).

                            ALBEF                       BLIP
    , ' ?                   deleted                     kept
    . ! " ( ) * # : ; ~     deleted                     blanks in captions, deleted from questions
    - /                     blanks                      kept
    <person>                person (captions only)      kept
    words kept              30, questions at test 50    30 (NLVR2 and videos 40), questions 50
    ids                     [CLS] text                  [CLS] text [SEP]

All four make letters small. Captions then have two or more blanks in a row made one; questions do not, so that between
two spaces there is an empty word, which counts. Words are what stands between spaces: a tab does not end one.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from mmjax.errors import MmjaxError
from mmjax.text.wordpiece import WordPieceTokenizer

BOTH = '.!"()*#:;~'
ALBEF = str.maketrans("-/", "  ", BOTH + ",'?")
BLIP_CAPTION = str.maketrans(BOTH, " " * len(BOTH))
BLIP_QUESTION = str.maketrans("", "", BOTH)
BLANKS = re.compile(r"\s{2,}")
OTHER_SIDE = {"left": "right", "right": "left"}


def albef_caption(text: str, words: int = 30) -> str:
    """A caption as ALBEF reads it."""
    return _first(_joined(text.lower().translate(ALBEF).replace("<person>", "person")), words)


def albef_question(text: str, words: int = 30) -> str:
    """A question as ALBEF reads it; at test it keeps 50 words."""
    return _first(text.lower().translate(ALBEF).rstrip(" "), words)


def blip_caption(text: str, words: int = 30) -> str:
    """A caption as BLIP reads it."""
    return _first(_joined(text.lower().translate(BLIP_CAPTION)), words)


def blip_question(text: str, words: int = 50) -> str:
    """A question as BLIP reads it."""
    return _first(text.lower().translate(BLIP_QUESTION).rstrip(" "), words)


def _joined(text: str) -> str:
    return BLANKS.sub(" ", text).rstrip("\n").strip(" ")


def _first(text: str, words: int) -> str:
    return " ".join(text.split(" ")[:words])


def exchange_sides(text: str) -> str:
    """A cleaned sentence about two images that changed places: "left" becomes "right" and "right" becomes "left".

    As in BLIP's `nlvr_dataset.py` only what stands alone between spaces is a word: "leftmost" and "left," stay.
    """
    return " ".join(OTHER_SIDE.get(word, word) for word in text.split(" "))


def caption_columns(
    tokenizer: WordPieceTokenizer, texts: Sequence[str], length: int, sep: bool, multiple: int | None = None
) -> dict[str, Int[np.ndarray, "n l"]]:
    """[CLS] text, and [SEP] with `sep`: "input_ids", "attention_mask", int32 [n, length]; a text's end is cut.

    multiple: l is that of the longest text, brought up to a multiple of so many, and `length` only the most.

    ALBEF has no [SEP] and lengths of 25 in pre-training, 30 to evaluate retrieval; BLIP has one, and 30 in
    pre-training, 35 in retrieval, 40 for captions. In their other fine-tuning the originals cut nothing: a length that
    all texts fit in (64) is the same, since padding is masked.
    Raises MmjaxError for a length without room for a piece, or what is no text.
    """
    room = length - 1 - sep
    if room < 1:
        raise MmjaxError(f"length={length} leaves no room beside [CLS]{' and [SEP]' if sep else ''}")
    end = [tokenizer.sep] if sep else []
    rows = [[tokenizer.cls, *pieces[:room], *end] for pieces in tokenizer.pieces(texts)]
    if multiple is not None:
        length = min(length, -(-max(map(len, rows), default=1) // multiple) * multiple)
    columns = tokenizer.batch([(ids, [0] * len(ids)) for ids in rows], length)
    return {name: columns[name] for name in ("input_ids", "attention_mask")}


def answer_rows(
    tokenizer: WordPieceTokenizer, answers: Sequence[str], weights: Sequence[float], slots: int, length: int
) -> dict[str, Int[np.ndarray, "s l"] | Float[np.ndarray, " s"]]:
    """The answers to one question, which both systems read as [CLS] answer [SEP]: "answer_ids" and "answer_mask", int32
    [slots, length], and "answer_weights", float32 [slots].

    With more answers than slots the lightest are left out. Empty slots weigh 0 and hold [CLS] [SEP], so that no row is
    without a token to attend to.
    """
    kept = sorted(zip(answers, weights), key=lambda pair: -pair[1])[:slots]
    kept += [("", 0.0)] * (slots - len(kept))
    columns = caption_columns(tokenizer, [answer for answer, _ in kept], length, sep=True)
    told = np.array([weight for _, weight in kept], np.float32)
    return {"answer_ids": columns["input_ids"], "answer_mask": columns["attention_mask"], "answer_weights": told}
