"""Texts with images in them, as OpenFlamingo trains on them (open_flamingo's train/data.py, train/train_utils.py).

An image is `<image>`; the text about it ends with `<|endofchunk|>`. Labels are ids, IGNORED where nothing is learned.

    >>> pair_text(" a hen ")
    '<image>a hen<|endofchunk|>'
    >>> document_text(["See:", "a hen.", "Two boats!"], [1, 2])
    'See:<image>a hen.<|endofchunk|><image>Two boats!<|endofchunk|>'
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mmjax.errors import MmjaxError

IMAGE, END_OF_CHUNK = "<image>", "<|endofchunk|>"
AROUND_IMAGE = "<fake_token_around_image>"
"""Before and after an image, or several in a row, in Idefics."""
IGNORED = -100


def pair_text(caption: str) -> str:
    """An image and its caption."""
    return f"{IMAGE}{caption.strip()}{END_OF_CHUNK}"


def document_text(sentences: Sequence[str], illustrated: Sequence[int]) -> str:
    """A document whose sentences at the indices `illustrated` have an image before them.

    A chunk ends before each image but the first. Sentences are joined by a space, of which none stands beside
    `<image>` or before `<|endofchunk|>`. Raises MmjaxError for an index outside the document.
    """
    wrong = [index for index in illustrated if not 0 <= index < len(sentences)]
    if wrong:
        raise MmjaxError(f"a document of {len(sentences)} sentences has an image before sentence {wrong[0]}")
    marked = set(illustrated)
    text = " ".join(
        f"{END_OF_CHUNK}{IMAGE}{sentence}" if i in marked else sentence for i, sentence in enumerate(sentences)
    )
    text = text.replace(END_OF_CHUNK, "", 1).replace(f" {END_OF_CHUNK}", END_OF_CHUNK)
    return text.replace(f"{IMAGE} ", IMAGE).replace(f" {IMAGE}", IMAGE) + END_OF_CHUNK


def around_images(text: str) -> str:
    """The text with Idefics' tokens around its images, without spaces beside them; a text with such tokens as it is.

    >>> around_images("User: <image> <image> What?").replace(AROUND_IMAGE, "|")
    'User:|<image>|<image>|What?'
    """
    if AROUND_IMAGE in text:
        return text
    return re.sub(
        rf" *{IMAGE}(?: *{IMAGE})* *",
        lambda match: AROUND_IMAGE + f"{IMAGE}{AROUND_IMAGE}" * match[0].count(IMAGE),
        text,
    )


def pair_labels(
    ids: Int[np.ndarray, "*b l"], mask: Int[np.ndarray, "*b l"], image_token: int
) -> Int[np.ndarray, "*b l"]:
    """Everything is learned but `<image>`."""
    return np.where((mask == 1) & (ids != image_token), ids, IGNORED).astype(np.int32)


def document_labels(
    ids: Int[np.ndarray, "*b l"], mask: Int[np.ndarray, "*b l"], image_token: int, end_of_chunk: int
) -> Int[np.ndarray, "*b l"]:
    """Only texts about images are learned: from behind an `<image>` up to and with the next `<|endofchunk|>`.

    >>> document_labels(np.array([5, 9, 1, 6, 8, 5, 9, 7]), np.ones(8, int), image_token=9, end_of_chunk=8).tolist()
    [-100, -100, 1, 6, 8, -100, -100, 7]
    """
    index = np.broadcast_to(np.arange(ids.shape[-1]), ids.shape)
    image = np.maximum.accumulate(np.where(ids == image_token, index, -1), axis=-1)
    ended = np.maximum.accumulate(np.where(ids == end_of_chunk, index, -1), axis=-1)
    before = np.concatenate([np.full_like(ended[..., :1], -1), ended[..., :-1]], axis=-1)
    inside = (image >= 0) & (before <= image) & (ids != image_token) & (mask == 1)
    return np.where(inside, ids, IGNORED).astype(np.int32)
