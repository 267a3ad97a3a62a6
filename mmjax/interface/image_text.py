"""Loaded models that embed images and texts in one space."""

import abc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.evaluation.features import similarities
from mmjax.interface.model import Model
from mmjax.nn.norm import l2_normalize
from mmjax.types import Array, ArrayLike, Float


class ImageTextModel(Model):
    """Unit-norm features of images and texts, whose dot products are their cosine similarities."""

    @abc.abstractmethod
    def encode_image(self, images: Any) -> Float[Array, "b e"]:
        """Features of images as `preprocess` takes them, or of pixel values [b, height, width, 3]."""

    @abc.abstractmethod
    def encode_text(self, texts: Any) -> Float[Array, "b e"]:
        """Features of strings, or of ids [b, l]."""

    def retrieve(self, queries: Any, candidates: Any, k: int = 5) -> list[list[tuple[int, float]]]:
        """For each query the k nearest candidates as (index, cosine), the best first.

        Each of the two: strings or ids (texts), or anything else (images), or features [n, embed_dim] computed before.
        Strings are always texts: open image files first.
        """
        queries, candidates = self._features(queries), self._features(candidates)
        return ranked(self.similarity(queries, candidates), k)

    def similarity(self, queries: ArrayLike, candidates: ArrayLike) -> Float[Array, "n m"]:
        """Of features of images or of texts with those of images or of texts; pure."""
        return similarities(jnp.asarray(queries), jnp.asarray(candidates))

    def _features(self, items: Any) -> Array:
        if are_texts(items):
            return self.encode_text(items)
        return l2_normalize(jnp.asarray(items)) if are_features(items) else self.encode_image(items)


def are_texts(items: Any) -> bool:
    """Whether items are strings, or ids [b, l]."""
    if isinstance(items, np.ndarray | jax.Array):
        return items.ndim == 2 and items.dtype != np.uint8 and items.dtype.kind in "iu"
    return isinstance(items, str) or (isinstance(items, Sequence) and bool(items) and isinstance(items[0], str))


def are_features(items: Any) -> bool:
    """Whether items are features, floats [n, e], or several of an item, [n, q, e]."""
    arrays = isinstance(items, np.ndarray | jax.Array) and items.ndim in (2, 3)
    return arrays and jnp.issubdtype(items.dtype, jnp.floating)


def ranked(scores: Float[Array, "n m"], k: int) -> list[list[tuple[int, float]]]:
    """For each row the k highest as (column, score), the highest first."""
    values, indices = jax.lax.top_k(scores, min(k, scores.shape[1]))
    return [list(zip(*row)) for row in zip(indices.tolist(), values.tolist())]
