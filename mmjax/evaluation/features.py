"""Features of whole data sets: in batches of one shape, one compilation, the device never idle for the host."""

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
"""(params, state, inputs [b, ...]) -> features [b, d]: a pure function. `state` is the TrainState, or None."""
Inputs: TypeAlias = ArrayLike | Mapping[str, ArrayLike] | Pipeline
"""An array [n, ...], a dict of arrays that share n, or a pipeline: of its batches the columns are the dict."""
Advance: TypeAlias = Callable[[int], Any]
"""Is told, batch by batch, how many rows more are done."""

IN_FLIGHT = 2
"""Batches dispatched ahead of the one whose features are copied to the host."""


@dataclass(frozen=True)
class Extractor:
    """Runs an encode function over data sets, compiled once for all of them (of one row shape) and all parameters.

        extract = Extractor(lambda params, state, images: module.apply({"params": params}, images))
        features = extract(params, state, images)           # float32 [n, d]

    Attributes:
        encode: see `Encode`. It gets numbers of the inputs' dtype: uint8 images stay uint8 up to the device.
        batch_size: rows at a time; a shorter last batch is filled up with copies of its first row, which are cut off.
    """

    encode: Encode
    batch_size: int = 256

    @functools.cached_property
    def _compiled(self) -> Callable[[Params, Any, Any], Array]:
        return jax.jit(lambda params, state, inputs: self.encode(params, state, inputs).astype(jnp.float32))

    def __call__(
        self, params: Params, state: Any, inputs: Inputs, name: str = "inputs", advance: Advance | None = None
    ) -> Float[np.ndarray, "n ..."]:
        """Features of every row, in order. advance: see `Advance`.

        Raises MmjaxError, with `name`: no rows, columns of different lengths, features that are not finite.
        """
        if isinstance(inputs, Pipeline):
            raise MmjaxError(f"{name}: a Pipeline also has columns of its own: use from_pipeline")
        rows = _length(inputs, name)
        size = min(self.batch_size, rows)
        batches = (_rows(inputs, start, size) for start in range(0, rows, size))
        return finite(name, self._gather(params, state, batches, size, advance))

    def from_pipeline(
        self, params: Params, state: Any, pipeline: Pipeline, key: str | tuple[str, ...] = "image"
    ) -> tuple[Float[np.ndarray, "n ..."], dict[str, np.ndarray]]:
        """Features of every readable record of a pipeline once, in the source's order, and its other columns.

        key: the column that `encode` gets, or several, as a dict.
        The pipeline's order, epochs and last batch are set as evaluation needs them. A record that stands in for an
        unreadable one is dropped again, so nothing counts twice; `columns["index"]` tells which were read.
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
        """Features and labels. A pipeline brings its own labels, its column "label", where `labels` is None."""
        if not isinstance(inputs, Pipeline):
            if labels is None:
                raise MmjaxError(f"{name}: an array of images comes without labels")
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
            features, rows = waiting.popleft()
            done.append(np.asarray(features)[:rows])
            if advance is not None:
                advance(rows)

        for batch in batches:
            rows = _length(batch, "inputs")
            features = self._compiled(params, state, batch if rows == size else _filled(batch, rows, size))
            features.copy_to_host_async()
            waiting.append((features, rows))
            if len(waiting) > IN_FLIGHT:
                take()
        while waiting:
            take()
        return np.concatenate(done)


def finite(name: str, features: Any) -> Any:
    """The features, checked. Raises MmjaxError, naming the argument, for NaN and infinities.

    Comparisons with NaN are all false, which a rank would count as "nobody is better": a perfect score.
    """
    if isinstance(features, np.ndarray):
        bad = int(np.count_nonzero(~np.isfinite(features)))
    else:
        bad = int(jnp.count_nonzero(~jnp.isfinite(features)))
    if bad:
        raise MmjaxError(f"{name}: {bad} of {features.size} features are not finite")
    return features


def checked_features(name: str, features: ArrayLike, width: int | None = None) -> Float[Array, "n d"]:
    """Features as a float32 device array [n, d]. Raises MmjaxError for another rank, none, another width, NaN."""
    shape = np.shape(features)
    if len(shape) != 2 or 0 in shape or (width is not None and shape[1] != width):
        wanted = "[n, d]" if width is None else f"[n, {width}]"
        raise MmjaxError(f"{name}: need features {wanted} of at least one item, not {list(shape)}")
    return finite(name, jnp.asarray(features, jnp.float32))


def checked_integers(name: str, values: ArrayLike, length: int, below: int | None = None) -> np.ndarray:
    """Labels or indices as int32 [length] on the host. Raises MmjaxError for others, or outside 0 .. below - 1."""
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


def _rows(inputs: Any, start: int, size: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[start : start + size], inputs)


def _filled(batch: Any, rows: int, size: int) -> Any:
    return jax.tree.map(
        lambda leaf: np.concatenate([leaf, np.broadcast_to(leaf[:1], (size - rows, *leaf.shape[1:]))]), batch
    )
