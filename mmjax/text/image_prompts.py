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
    """The ids of a text with one placeholder for each image; see `encode_with_offsets`."""
    return encode_with_offsets(tokenizer, text, placeholder, add_special_tokens, image)[0]


def encode_with_offsets(
    tokenizer: Tokenizer, text: str, placeholder: int, add_special_tokens: bool = True, image: str = IMAGE
) -> tuple[list[int], list[int]]:
    """(ids of a text with one placeholder for each image, the index of the character that each begins with).

    Where `<image>` is a token of the vocabulary, and that token is the placeholder, the text is encoded as it is
    (transformers). Else the texts between the images are encoded one by one, each as if it began a text, and the
    beginnings of a sequence that the tokenizer adds are dropped but for the first (LLaVA's mm_utils.py,
    tokenizer_image_token). The original drops an id of each text too where the first begins with a bos that is written
    in it, as in SmolLM2's chats; here a text loses nothing.
    """
    encode = tokenizer.tokenizer.encode
    if tokenizer.tokenizer.token_to_id(image) == placeholder:
        encoded = encode(text, add_special_tokens=add_special_tokens)
        return encoded.ids, [start for start, _ in encoded.offsets]
    begins = int(add_special_tokens and encode("").ids[:1] == [tokenizer.bos])
    ids: list[int] = []
    starts: list[int] = []
    position = 0
    for number, part in enumerate(text.split(image)):
        if number:
            ids.append(placeholder)
            starts.append(position)
            position += len(image)
        encoded = encode(part, add_special_tokens=add_special_tokens)
        first = begins if number else 0
        ids += encoded.ids[first:]
        starts += [position + start for start, _ in encoded.offsets[first:]]
        position += len(part)
    return ids, starts


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
