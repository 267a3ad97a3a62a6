"""Images and videos of prompts, arranged by prompt on the host."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from mmjax.errors import MmjaxError
from mmjax.text.interleaved import IMAGE
from mmjax.types import Array


def flattened(texts: Sequence[str] | None, images: Any) -> list[Any] | None:
    """The images of all prompts in one list; None for none.

    texts: the prompts, None if they are ids. Raises MmjaxError for lists of images that do not fit the prompts.
    """
    if images is None:
        return None
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4:
        images = list(images)
    if not isinstance(images, list | tuple):
        images = [images]
    if not any(isinstance(each, list | tuple) for each in images):
        return list(images) or None
    if texts is None or len(texts) != len(images):
        raise MmjaxError(f"images: {len(images)} lists for {len(texts or ())} prompts; one list for each string")
    for text, each in zip(texts, images):
        if not isinstance(each, list | tuple) or text.count(IMAGE) != len(each):
            count = len(each) if isinstance(each, list | tuple) else 1
            raise MmjaxError(f"a prompt has {text.count(IMAGE)} times {IMAGE} for {count} images: {text[:200]!r}")
    return [image for each in images for image in each] or None


def arranged(
    ids: Int[np.ndarray, "b l"], values: Array, image_token: int, listed: bool = False, counted: bool = True
) -> Array:
    """Values of media -> [b, t, ...]: those of each prompt, with zeros behind.

    values: pixels [b, t, h, w, 3] or [b, t, f, h, w, 3] by prompt, or [n, h, w, 3], of all prompts in a row.
    listed: values are of all prompts in a row, [n, f, ...]. counted: False: a mask determines who attends to them.
    Raises MmjaxError for fewer media than `<image>`, and of all prompts in a row also for more.
    """
    counts = (ids == image_token).sum(1) if ids.ndim == 2 else np.zeros(0, int)
    if values.ndim == 4 and not listed:
        values, listed = values[:, None], True
    if not listed:
        values = values[:, :, None] if values.ndim == 5 else values
        if counted and len(values) == len(counts) and counts.max(initial=0) > values.shape[1]:
            row = int(counts.argmax())
            raise MmjaxError(f"prompt {row} has {counts[row]} times the image id for {values.shape[1]} images")
        return values
    if counts.sum() != len(values):
        each = ", ".join(map(str, counts))
        raise MmjaxError(f"the prompts have {counts.sum()} times {IMAGE} ({each}) for {len(values)} images")
    index = np.full((len(counts), max(counts.max(initial=0), 1)), len(values))
    index[np.arange(index.shape[1]) < counts[:, None]] = np.arange(len(values))
    padded = jnp.concatenate([values, jnp.zeros_like(values[:1]) if len(values) else jnp.zeros((1, *values.shape[1:]))])
    return padded[index]


def image_attention_mask(
    ids: Int[np.ndarray, "b l"],
    image_token: int,
    end_of_text: int,
    images: int,
    earlier: int = 0,
    attending: bool = False,
) -> Int[np.ndarray, "b l images"]:
    """1 where a token attends to an image: the last one before it. No token behind an end of text does, until the next
    `<image>`; the end itself does (transformers' processing_idefics.py).

    images: their number, the earlier ones included. earlier: images before the first token. attending: whether the
    token before the first one attends to the last of them.

    >>> image_attention_mask(np.array([[5, 9, 5, 2, 5, 9]]), 9, 2, 2)[0].tolist()
    [[0, 0], [1, 0], [1, 0], [1, 0], [0, 0], [0, 1]]
    """
    index, starts = np.arange(ids.shape[1]), ids == image_token
    start = np.maximum.accumulate(np.where(starts, index, -1), axis=1)
    end = np.maximum.accumulate(np.where(ids == end_of_text, index, -1), axis=1)
    end = np.concatenate([np.full_like(end[:, :1], -1), end[:, :-1]], axis=1)
    count = earlier + np.cumsum(starts, axis=1)
    visible = (end <= start) & (attending | (start >= 0))
    return (visible[..., None] & (count[..., None] == 1 + np.arange(images))).astype(np.int32)
