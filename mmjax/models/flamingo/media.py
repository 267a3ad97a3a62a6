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


def arranged(ids: Int[np.ndarray, "b l"], values: Array, image_token: int, listed: bool = False) -> Array:
    """Values of media -> [b, t, ...]: those of each prompt, with zeros behind.

    values: pixels [b, t, h, w, 3] or [b, t, f, h, w, 3] by prompt, or [n, h, w, 3], of all prompts in a row.
    listed: values are of all prompts in a row, [n, f, ...].
    Raises MmjaxError for fewer media than `<image>`, and of all prompts in a row also for more.
    """
    counts = (ids == image_token).sum(1) if ids.ndim == 2 else np.zeros(0, int)
    if values.ndim == 4 and not listed:
        values, listed = values[:, None], True
    if not listed:
        values = values[:, :, None] if values.ndim == 5 else values
        if len(values) == len(counts) and counts.max(initial=0) > values.shape[1]:
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
