"""From a source to batches: in an order that is a function of (seed, step), resumable anywhere, past bad records.

    pipeline = Pipeline(source, batch_size=256, seed=0, transforms=(RandomResizedCrop(224), RandomFlip()), workers=8)
    batches = iter(pipeline)
    batch = next(batches)           # {"image": uint8 [b, 224, 224, 3], "label": int32 [b], "index": int64 [b]}
    state = batches.get_state()     # plain JSON; `iter(pipeline)` in another process, set_state(state): resumes

Epochs. Each epoch is a permutation of the records, cut into whole batches: no record occurs twice in an epoch, and
records that do not fill a batch are left to later epochs. Each epoch of a `Rotation` has other records. Grain shuffles,
runs the worker processes and transfers arrays from them. With `groups` each batch is of one group: each group is
permuted and cut into whole batches, and the batches of all follow each other in random order.

Bad records. A record that raises `BadRecord` is replaced by the one at its position one batch later in the epoch
(or, if that is bad too, by the next after it). So batches have a constant shape, the other records stay at their
positions, and no batch depends on workers or on processes. Each is counted once and written to `quarantine`.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import pathlib
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grain
import numpy as np
from absl import flags

from mmjax.data.decoding import BadRecord
from mmjax.data.sources import Record, Rotation, Source
from mmjax.errors import MmjaxError

Transform: TypeAlias = grain.transforms.Map | grain.transforms.RandomMap | Callable[[Record], Record]

ENDLESS = 2**62
FEW = 10_000
"""The minimum of records over which the share of bad ones is computed (all, of a smaller source)."""
RESTARTS = 3
"""The maximum of successive restarts of lost worker processes."""


class TooManyBadRecords(MmjaxError):
    """More than `max_bad_fraction` of the records are bad."""


@dataclass(frozen=True)
class Pipeline:
    """Batches of a source; `iter` of it starts from the beginning.

    batch_size: of all processes together; process p gets records p b/P to (p + 1) b/P of each batch.
    transforms: applied to each record in order; random ones get a generator that depends on seed, epoch and position.
        A field that is text or bytes at the end is not batched; numbers become int32 or float32.
    workers: processes; 0 prepares batches in a thread of this one.
    epochs: None repeats for ever.
    drop_remainder: False keeps the last, shorter batch of an epoch (one process only): for evaluation.
    max_bad_fraction: the share of bad records, of those of this process, past which TooManyBadRecords is raised.
    quarantine: a JSON-lines file that names each bad record; None only counts them.
    prefetch: batches prepared ahead (per worker).
    groups: int [n], the group of each record, such as its width in a batch; None: batches are of all records.

    >>> from mmjax.data.sources import ArraySource
    >>> pipeline = Pipeline(ArraySource(label=np.arange(6)), batch_size=2, shuffle=False, epochs=1)
    >>> [batch["label"].tolist() for batch in pipeline]
    [[0, 1], [2, 3], [4, 5]]
    """

    source: Source
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    transforms: tuple[Transform, ...] = ()
    workers: int = 0
    epochs: int | None = None
    drop_remainder: bool = True
    max_bad_fraction: float = 0.01
    quarantine: str | os.PathLike[str] | None = None
    process_index: int = 0
    process_count: int = 1
    prefetch: int = 2
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        size, count = self.batch_size, self.process_count
        if not 0 <= self.process_index < count or size < 1 or size % count:
            raise MmjaxError(f"batch_size={size} cannot be cut for process {self.process_index} of {count}")
        if not self.drop_remainder and count > 1:
            raise MmjaxError("drop_remainder=False: the last batch of an epoch cannot be cut for several processes")
        if self.groups is not None and (len(self.groups) != len(self.source) or not self.drop_remainder):
            raise MmjaxError(f"groups: one for each of {len(self.source)} records, and drop_remainder=True")
        if self.steps_per_epoch == 0:
            raise MmjaxError(
                f"{self.source.name}: {len(self.source)} records do not fill a batch of {size}; "
                "lower batch_size, or with drop_remainder=False the batch is shorter"
            )

    @property
    def steps_per_epoch(self) -> int:
        if self.groups is not None:
            return int((np.unique(self.groups, return_counts=True)[1] // self.batch_size).sum())
        whole, rest = divmod(len(self.source), self.batch_size)
        return whole + (not self.drop_remainder and rest > 0)

    def __len__(self) -> int:
        """The number of batches; of one epoch if they repeat for ever."""
        return self.steps_per_epoch * (self.epochs or 1)

    def __iter__(self) -> "PipelineIterator":
        return PipelineIterator(self)

    def replace(self, **fields: Any) -> "Pipeline":
        return dataclasses.replace(self, **fields)

    def allowed(self, step: int) -> float:
        """The number of bad records that are allowed up to and including `step`."""
        share = len(self.source) / self.process_count
        visited = (step + 1) * self.batch_size / self.process_count
        return self.max_bad_fraction * min(share, max(visited, FEW))


class PipelineIterator:
    """The batches of a pipeline from some step on; `get_state` and `set_state` store and restore the step.

    bad: {reason: record indices}, of the batches handed out so far.
    """

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self.step = 0
        self.bad: dict[str, list[int]] = {}
        self._fingerprint = pipeline.source.fingerprint
        self._end = ENDLESS if pipeline.epochs is None else len(pipeline)
        self._loaded: Any = None
        self._stop: Callable[[], Any] | None = None
        self._quarantine = Quarantine(pipeline.quarantine) if pipeline.quarantine is not None else None

    def __iter__(self) -> "PipelineIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Raises StopIteration after the last epoch, TooManyBadRecords (the state stays before this batch)."""
        if self.step >= self._end:
            raise StopIteration
        loaded = self._load()
        bad = self._merged(loaded["bad"])
        if self._quarantine is not None:
            self._quarantine.add(loaded["bad"])
        count = sum(map(len, bad.values()))
        if loaded["batch"] is None or count > self.pipeline.allowed(self.step):
            self.close()
            raise TooManyBadRecords(self._complaint(count, bad, loaded["bad"]))
        self.step, self.bad = self.step + 1, bad
        if self.pipeline.workers == 0:
            return loaded["batch"]
        # Copied from the workers' shared memory: it is small, and a batch may live long.
        return {key: np.array(value) for key, value in loaded["batch"].items()}

    def _load(self) -> dict[str, Any]:
        for attempt in range(RESTARTS + 1):
            if self._loaded is None:
                self._loaded = iter(_batches(self.pipeline, self.step, self._end))
                # Also when this iterator is dropped or Python exits: workers leave their shared memory behind.
                self._stop = weakref.finalize(self, self._loaded.close)
            try:
                return next(self._loaded)
            except RuntimeError as error:  # Grain's word for a worker process that is gone
                # Grain's frame holds the error, whose traceback holds the frame: the semaphores in it would wait for
                # the garbage collector, and Python's tracker of them warns where that comes while others are made.
                traceback.clear_frames(error.__traceback__)
                if "terminated unexpectedly" not in str(error) or attempt == RESTARTS:
                    raise
                self.close()
                logging.getLogger(__name__).warning("a data worker died at step %d; starting again", self.step)
        raise AssertionError("unreachable")

    def _merged(self, bad_records: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
        known = {index for indices in self.bad.values() for index in indices}
        new = [record for record in bad_records if record["index"] not in known]
        reasons = sorted(self.bad.keys() | {record["reason"] for record in new})
        fresh = {reason: [record["index"] for record in new if record["reason"] == reason] for reason in reasons}
        return {reason: sorted({*self.bad.get(reason, ()), *fresh[reason]}) for reason in reasons}

    def _complaint(self, count: int, bad: Mapping[str, list[int]], last: Sequence[Mapping[str, Any]]) -> str:
        pipeline = self.pipeline
        counts = ", ".join(f"{len(indices)} {reason}" for reason, indices in bad.items())
        example = f"; for instance {last[-1]['name']}" if last else ""
        listed = f"; all are in {pipeline.quarantine}" if pipeline.quarantine is not None else ""
        return (
            f"{pipeline.source.name}: {count} bad records by step {self.step + 1} ({counts}), more than "
            f"max_bad_fraction={pipeline.max_bad_fraction}{example}{listed}"
        )

    @property
    def bad_counts(self) -> dict[str, int]:
        """The number of distinct bad records so far, by reason."""
        return {reason: len(indices) for reason, indices in self.bad.items()}

    @property
    def skipped(self) -> list[str]:
        """The bad records so far, each with its reason."""
        name = self.pipeline.source.record_name
        return [f"{name(index)} ({reason})" for reason, indices in self.bad.items() for index in indices]

    def get_state(self) -> dict[str, Any]:
        """The state for `set_state`, as JSON types; equal for equal histories, whatever the workers."""
        return self._identity() | {
            "step": self.step,
            "bad": {reason: list(indices) for reason, indices in self.bad.items()},
        }

    def _identity(self) -> dict[str, Any]:
        pipeline = self.pipeline
        order: dict[str, Any] = {"seed": pipeline.seed, "shuffle": pipeline.shuffle}
        order["drop_remainder"] = pipeline.drop_remainder
        if pipeline.groups is not None:
            order["groups"] = hashlib.sha256(np.asarray(pipeline.groups, np.int64).tobytes()).hexdigest()
        return {"version": 1, "source": self._fingerprint, "batch_size": pipeline.batch_size} | order

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resumes after the batch at which `state` was taken.

        Raises MmjaxError for the state of another order: other source, seed, batch size.
        """
        wrong = {name: (state.get(name), here) for name, here in self._identity().items() if state.get(name) != here}
        if wrong:
            changes = ", ".join(f"{name} was {was!r}, is {now!r}" for name, (was, now) in wrong.items())
            raise MmjaxError(f"{self.pipeline.source.name}: this state is of another order of records: {changes}")
        self.close()
        self.step = int(state["step"])
        self.bad = {reason: list(indices) for reason, indices in state["bad"].items()}

    def close(self) -> None:
        """Stops the workers; the next batch starts them again."""
        stop, self._stop, self._loaded = self._stop, None, None
        if stop is not None:
            stop()


class Quarantine:
    """A JSON-lines file with one line for each bad record: index, name, reason, detail; appended to over resumes."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._indices: set[int] | None = None

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        if not records:
            return
        if self._indices is None:
            self._indices = self._read()
        new = [record for record in records if record["index"] not in self._indices]
        self._indices.update(record["index"] for record in new)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.writelines(json.dumps(dict(record)) + "\n" for record in new)

    def _read(self) -> set[int]:
        """The records already listed; a last line that a kill cut short is cut off."""
        if not self.path.is_file():
            return set()
        whole, _, _ = self.path.read_text().rpartition("\n")
        self.path.write_text(whole + "\n" if whole else "")
        return {json.loads(line)["index"] for line in whole.splitlines()}


def _batches(pipeline: Pipeline, start: int, end: int) -> grain.IterDataset:
    """Grain's data set of the batches `start` to `end`, each {"batch", "bad"}."""
    steps = grain.MapDataset.range(start, end).map(_Loader(pipeline))
    if pipeline.workers == 0:
        return steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=pipeline.prefetch))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads an absl flag here; its default will do
    options = grain.MultiprocessingOptions(pipeline.workers, per_worker_buffer_size=pipeline.prefetch)
    return steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).mp_prefetch(options)


class _Epoch:
    """All records in the order of an epoch."""

    def __init__(self, order: Any, epoch: int, source: Source):
        self.order, self.epoch, self.source = order, epoch, source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> int:
        n = len(self.source)
        index = self.order[self.epoch * n + position] % n
        return self.source.index(self.epoch, index) if isinstance(self.source, Rotation) else index


class _Loader(grain.transforms.Map):
    """step -> {"batch": arrays or None, "bad": records}: a pure function, so that workers can share the steps out."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        # Mixed, because Grain's epoch 1 of a seed is epoch 0 of the next seed.
        seed = int(np.random.SeedSequence(pipeline.seed).generate_state(1)[0])
        order = grain.MapDataset.range(len(pipeline.source))
        self.order: Any = order.shuffle(seed=seed) if pipeline.shuffle else order
        self.grouped: tuple[int, list[tuple[np.ndarray, int]]] = (-1, [])

    def map(self, element: int) -> dict[str, Any]:
        pipeline = self.pipeline
        epoch, step = divmod(int(element), pipeline.steps_per_epoch)
        local = pipeline.batch_size // pipeline.process_count
        members, first = self._members(epoch, step)
        start = first + pipeline.process_index * local
        records: list[Record] = []
        bad: dict[int, dict[str, Any]] = {}
        for position in range(start, min(start + local, len(members))):
            seeds = (pipeline.seed, epoch, step * pipeline.batch_size - first + position)
            record = self._good_record(members, position, seeds, bad, pipeline.allowed(element))
            if record is None:
                return {"batch": None, "bad": list(bad.values())}
            records.append(record)
        return {"batch": _collate(records, pipeline.source), "bad": list(bad.values())}

    def _members(self, epoch: int, step: int) -> tuple["_Epoch | np.ndarray", int]:
        """(the records among which a batch is, in the epoch's order, the position of its first one)."""
        pipeline, size = self.pipeline, self.pipeline.batch_size
        if pipeline.groups is None:
            return _Epoch(self.order, epoch, pipeline.source), step * size
        if self.grouped[0] != epoch:
            rng = np.random.default_rng((pipeline.seed, epoch))
            batches: list[tuple[np.ndarray, int]] = []
            for group in np.unique(pipeline.groups):
                members = np.flatnonzero(pipeline.groups == group)
                members = rng.permutation(members) if pipeline.shuffle else members
                batches += [(members, start) for start in range(0, len(members) - size + 1, size)]
            order = rng.permutation(len(batches)) if pipeline.shuffle else range(len(batches))
            self.grouped = epoch, [batches[i] for i in order]
        return self.grouped[1][step]

    def _good_record(
        self,
        members: "_Epoch | np.ndarray",
        position: int,
        seeds: tuple[int, ...],
        bad: dict[int, dict[str, Any]],
        allowed: float,
    ) -> Record | None:
        """The record at a position, or the next good one from the same position of the next batch of its group on.

        None when there are more bad ones than allowed: then the search stops.
        """
        n = len(members)
        others = (position + self.pipeline.batch_size + k for k in range(n))
        for candidate in itertools.chain((position,), others):
            index = int(members[candidate % n])
            if index in bad:
                continue
            try:
                return self._record(index, np.random.default_rng(seeds))
            except BadRecord as error:
                name = error.name or self.pipeline.source.record_name(index)
                bad[index] = {"index": index, "name": name, "reason": error.reason, "detail": error.detail}
            if len(bad) > allowed:
                break
        return None

    def _record(self, index: int, rng: np.random.Generator) -> Record:
        record = self.pipeline.source[index]
        for transform in self.pipeline.transforms:
            record = transformed(transform, record, rng)
        return record | {"index": np.int64(index)}


def transformed(transform: Transform, record: Record, rng: np.random.Generator) -> Record:
    """The record after a transform of any kind."""
    made: Any
    if isinstance(transform, grain.transforms.RandomMap):
        made = transform.random_map(record, rng)
    elif isinstance(transform, grain.transforms.Map):
        made = transform.map(record)
    else:
        made = transform(record)
    return made


def _collate(records: list[Record], source: Source) -> dict[str, np.ndarray]:
    """Records -> arrays [b, ...]; fields that are no numbers or arrays of numbers are dropped."""
    numbers = np.ndarray | np.generic | int | float
    keys = [key for key, value in sorted(records[0].items()) if isinstance(value, numbers)]
    batch = {}
    for key in keys:
        incomplete = next((record for record in records if not isinstance(record.get(key), numbers)), None)
        if incomplete is not None:
            first, other = (source.record_name(int(record["index"])) for record in (records[0], incomplete))
            raise MmjaxError(
                f"{key!r} must be a number in every record of a batch, as in {first}: {other} has "
                f"{incomplete.get(key)!r:.40}; Keep among the transforms leaves out what is not needed"
            )
        values = [_as_array(record[key]) for record in records]
        shapes = collections.Counter((value.shape, value.dtype.name) for value in values)
        if len(shapes) > 1:
            expected = shapes.most_common(1)[0][0]
            odd = next(i for i, value in enumerate(values) if (value.shape, value.dtype.name) != expected)
            raise MmjaxError(
                f"{key!r} must have one shape in a batch: {source.record_name(int(records[odd]['index']))} gives "
                f"{values[odd].dtype} {list(values[odd].shape)}, others {expected[1]} {list(expected[0])}; for images, "
                "RandomResizedCrop or Resize among the transforms makes one size"
            )
        # Not np.stack, which took 17 ms for 64 images of 224 px where this takes 0.3.
        batch[key] = np.empty((len(values), *values[0].shape), values[0].dtype)
        for i, value in enumerate(values):
            batch[key][i] = value
    return batch


def _as_array(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    return np.asarray(
        value, np.bool_ if isinstance(value, bool) else np.int32 if isinstance(value, int) else np.float32
    )


def batches(pipeline: Pipeline) -> Iterator[dict[str, np.ndarray]]:
    """All batches of a pipeline, its workers stopped at the end: for one pass over an evaluation set."""
    iterator = iter(pipeline)
    try:
        yield from iterator
    finally:
        iterator.close()
