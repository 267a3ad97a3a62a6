"""Features of whole data sets, in batches of one shape with one compilation; the device never waits for the host.

>>> extract = Extractor(lambda params, state, images: images.reshape(len(images), -1) @ params, batch_size=2)
>>> extract(np.eye(4, 3), None, np.ones((5, 2, 2), np.float32)).shape
(5, 3)
"""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.pipeline import Pipeline
from mmjax.types import Array, ArrayLike, Float, Int, MmjaxError, Params

Encode: TypeAlias = Callable[[Params, Any, Any], Array]
"""A pure function (params, state, inputs [b, ...]) -> features [b, d]. `state` is the TrainState, or None."""
Inputs: TypeAlias = ArrayLike | Mapping[str, ArrayLike] | Pipeline
"""An array [n, ...], a dict of arrays that share n, or a pipeline whose batches are such dicts."""
Advance: TypeAlias = Callable[[int], Any]
"""Called after each batch with its number of items, for progress bars."""

IN_FLIGHT = 2
"""Batches dispatched ahead of the one whose features are copied to the host."""


@dataclass(frozen=True)
class Extractor:
    """Runs an encode function over data sets, compiled once for all data sets of one item shape and all parameters.

        extract = Extractor(lambda params, state, images: module.apply({"params": params}, images))
        features = extract(params, state, images)           # float32 [n, d]

    Attributes:
        encode: see `Encode`. Its inputs keep their dtype: uint8 images stay uint8 up to the device.
        batch_size: items per batch; a shorter last batch is padded with copies of its first item, dropped afterwards.
    """

    encode: Encode
    batch_size: int = 256

    @functools.cached_property
    def _compiled(self) -> Callable[[Params, Any, Any], Array]:
        return jax.jit(lambda params, state, inputs: self.encode(params, state, inputs).astype(jnp.float32))

    def __call__(
        self, params: Params, state: Any, inputs: Inputs, name: str = "inputs", advance: Advance | None = None
    ) -> Float[np.ndarray, "n ..."]:
        """Features of every item, in order. advance: see `Advance`.

        Raises MmjaxError, with `name`: no items, columns of different lengths, features that are not finite.
        """
        if isinstance(inputs, Pipeline):
            raise MmjaxError(f"{name}: a Pipeline has further columns: use from_pipeline")
        n = _length(inputs, name)
        size = min(self.batch_size, n)
        batches = (_slice(inputs, start, size) for start in range(0, n, size))
        return finite(name, self._gather(params, state, batches, size, advance))

    def from_pipeline(
        self, params: Params, state: Any, pipeline: Pipeline, key: str | tuple[str, ...] = "image"
    ) -> tuple[Float[np.ndarray, "n ..."], dict[str, np.ndarray]]:
        """Features of every readable record of a pipeline once, in the source's order, and its other columns.

        key: the column passed to `encode`, or several, passed as a dict.
        Order, epochs and last batch of the pipeline are set for evaluation. A record that replaces an unreadable one is
        dropped again, so no record counts twice; `columns["index"]` has the indices of those that were read.
        """
        once = pipeline.replace(
            shuffle=False, epochs=1, drop_remainder=False, batch_size=min(self.batch_size, len(pipeline.source))
        )
        keys = (key,) if isinstance(key, str) else key
        columns: list[dict[str, np.ndarray]] = []

        def batches() -> Iterator[Any]:
            for batch in once:
                missing = [name for name in keys if name not in batch]
                if missing:
                    raise MmjaxError(f"key: {pipeline.source.name} has no columns {missing}, only {sorted(batch)}")
                inputs = batch[key] if isinstance(key, str) else {name: batch[name] for name in keys}
                columns.append({name: value for name, value in batch.items() if name not in keys})
                yield inputs

        features = self._gather(params, state, batches(), once.batch_size)
        joined = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
        _, first = np.unique(joined["index"], return_index=True)
        return finite(pipeline.source.name, features[first]), {name: value[first] for name, value in joined.items()}

    def labelled(
        self, params: Params, state: Any, inputs: Inputs, labels: ArrayLike | None, name: str
    ) -> tuple[Float[np.ndarray, "n ..."], Int[np.ndarray, " n"]]:
        """Features and labels. If `labels` is None, the labels are the pipeline's column "label"."""
        if not isinstance(inputs, Pipeline):
            if labels is None:
                raise MmjaxError(f"{name}: an array of images needs labels")
            return self(params, state, inputs, name), np.asarray(labels)
        features, columns = self.from_pipeline(params, state, inputs)
        if labels is None and "label" not in columns:
            raise MmjaxError(f"{name}: {inputs.source.name} has no column 'label', only {sorted(columns)}")
        return features, columns["label"] if labels is None else np.asarray(labels)[columns["index"]]

    def _gather(
        self, params: Params, state: Any, batches: Iterator[Any], size: int, advance: Advance | None = None
    ) -> np.ndarray:
        waiting: collections.deque[tuple[Array, int]] = collections.deque()
        done: list[np.ndarray] = []

        def take() -> None:
            features, n = waiting.popleft()
            done.append(np.asarray(features)[:n])
            if advance is not None:
                advance(n)

        for batch in batches:
            n = _length(batch, "inputs")
            features = self._compiled(params, state, batch if n == size else _padded(batch, n, size))
            features.copy_to_host_async()
            waiting.append((features, n))
            if len(waiting) > IN_FLIGHT:
                take()
        while waiting:
            take()
        return np.concatenate(done)


def batched(apply: Callable[..., Any], size: int, *arrays: ArrayLike) -> Any:
    """The outputs of `apply`, one array or a tree of arrays, computed batch by batch.

    The last batch is padded with copies to the size of the others, so that all use one compiled program.
    """
    n = len(arrays[0])
    if n <= size:
        return apply(*arrays)
    batches = (np.minimum(np.arange(start, start + size), n - 1) for start in range(0, n, size))
    outputs = [apply(*(array[indices] for array in arrays)) for indices in batches]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:n], *outputs)


def similarities(queries: Float[Array, "n e"], candidates: Float[Array, "m e"]) -> Float[Array, "n m"]:
    """Products of features in full float32, which TPUs and GPUs round by default: close values are compared."""
    return jnp.matmul(queries, candidates.T, precision="highest")


def nearest_similarities(queries: Float[Array, "n *q e"], candidates: Float[Array, "m *q e"]) -> Float[Array, "n m"]:
    """Of items with one feature [n, e] or several [n, q, e] each: the product of the nearest pair (BLIP-2).

    One item of `queries` at a time, so that no array is larger than [q, m q].
    """
    queries, candidates = (x if x.ndim == 3 else x[:, None] for x in (queries, candidates))
    flat = candidates.reshape(-1, candidates.shape[-1])

    def of_one(query: Array) -> Array:
        products = jnp.matmul(query, flat.T, precision="highest")
        return jnp.max(products.reshape(-1, *candidates.shape[:2]), axis=(0, 2))

    return jax.lax.map(of_one, queries)


def finite(name: str, features: Any) -> Any:
    """The features unchanged. Raises MmjaxError, naming the argument, for NaN and infinities.

    All comparisons with NaN are false, which would give a perfect rank.
    """
    if isinstance(features, np.ndarray):
        bad = int(np.count_nonzero(~np.isfinite(features)))
    else:
        bad = int(jnp.count_nonzero(~jnp.isfinite(features)))
    if bad:
        raise MmjaxError(f"{name}: {bad} of {features.size} features are not finite")
    return features


def checked_features(name: str, features: ArrayLike, width: int | None = None) -> Float[Array, "n d"]:
    """Features as a float32 device array [n, d]. Raises MmjaxError for another rank or width, no items, or NaN."""
    shape = np.shape(features)
    if len(shape) != 2 or 0 in shape or (width is not None and shape[1] != width):
        expected = "[n, d]" if width is None else f"[n, {width}]"
        raise MmjaxError(f"{name}: need features {expected} of at least one item, not {list(shape)}")
    return finite(name, jnp.asarray(features, jnp.float32))


def checked_integers(name: str, values: ArrayLike, length: int, below: int | None = None) -> np.ndarray:
    """Labels or indices as int32 [length] on the host. Raises MmjaxError for another shape or dtype, or values outside
    0 .. below - 1."""
    array = np.asarray(values)
    if array.shape != (length,) or array.dtype.kind not in "iu":
        raise MmjaxError(f"{name}: need integers [{length}], not {array.dtype} {list(array.shape)}")
    if length and (array.min() < 0 or (below is not None and array.max() >= below)):
        raise MmjaxError(f"{name}: {array.min()} to {array.max()}, should be from 0 to below {below}")
    return array.astype(np.int32)


def _length(inputs: Any, name: str) -> int:
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(inputs)}
    if len(lengths) != 1 or 0 in lengths:
        raise MmjaxError(f"{name}: need arrays of one length above 0, these have {sorted(lengths)}")
    return lengths.pop()


def _slice(inputs: Any, start: int, size: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[start : start + size], inputs)


def _padded(batch: Any, n: int, size: int) -> Any:
    return jax.tree.map(
        lambda leaf: np.concatenate([leaf, np.broadcast_to(leaf[:1], (size - n, *leaf.shape[1:]))]), batch
    )
