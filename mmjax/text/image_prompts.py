"""Prompts with images: text with `<image>` in it, as ids with placeholders, one for each feature of an image."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mmjax.errors import MmjaxError
from mmjax.text.interleaved import IMAGE
from mmjax.text.tokenizer import Tokenizer


def encode_with_images(
    tokenizer: Tokenizer, text: str, placeholder: int, add_special_tokens: bool = True, image: str = IMAGE
) -> list[int]:
    """The ids of a text with one placeholder for each image.

    Where `<image>` is a token of the vocabulary, and that token is the placeholder, the text is encoded as it is
    (transformers). Else the texts between the images are encoded one by one, each as if it began a text, and their
    beginnings of a sequence are dropped but for the first (LLaVA's mm_utils.py, tokenizer_image_token).
    """
    if tokenizer.tokenizer.token_to_id(image) == placeholder:
        return tokenizer.encode([text], add_special_tokens)[0]
    first, *others = tokenizer.encode(text.split(image), add_special_tokens)
    begins = int(bool(first) and first[0] == tokenizer.bos)
    return list(itertools.chain(first, *([placeholder, *ids[begins:]] for ids in others)))


def expand(ids: Sequence[int], placeholder: int, lengths: Sequence[int], text: str = "") -> list[int]:
    """Each placeholder as often as its image has features. text: of the prompt, for the message.

    Raises MmjaxError for another number of images than of placeholders.

    >>> expand([1, -200, 5, -200], -200, [2, 3])
    [1, -200, -200, 5, -200, -200, -200]
    """
    places = sum(id == placeholder for id in ids)
    if places != len(lengths):
        quoted = f": {text[:200]!r}" if text else ""
        raise MmjaxError(f"a prompt has {places} times {IMAGE} for {len(lengths)} images{quoted}")
    counts = iter(lengths)
    parts = ([id] * next(counts) if id == placeholder else [id] for id in ids)
    return list(itertools.chain.from_iterable(parts))


def feature_index(
    ids: Int[np.ndarray, "b l"], placeholder: int, rows: Sequence[Int[np.ndarray, "m"]]
) -> Int[np.ndarray, "b l"]:
    """int32: -1 for tokens, at placeholders the rows of the images one after the other, through row 0, row 1, ...

    Raises MmjaxError for another number of placeholders than of features.
    """
    visual = ids == placeholder
    table = np.concatenate(rows) if rows else np.zeros(0, np.int32)
    if visual.sum() != len(table):
        lengths = ", ".join(str(len(each)) for each in rows)
        raise MmjaxError(
            f"input_ids have {visual.sum()} times the image id {placeholder}; the images have {len(table)} features"
            + (f" ({lengths})" if rows else "")
        )
    index = np.full(ids.shape, -1, np.int32)
    index[visual] = table
    return index
