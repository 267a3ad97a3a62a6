"""The one training file that knows devices: three lifts of the same `step(state, batch)`.

    jit    one device
    pmap   every device holds the whole state; the step sees its share of the batch and the axis name "data"
    mesh   named axes (data, fsdp, tensor); the step sees the global batch, XLA divides the work by the shardings

The state is donated to each step. Programs are compiled ahead of time, once a batch shape, and counted. All run on one
process or on several (`jax.distributed.initialize` before the first use of a device); each process then brings its
part of the global batch.
"""

import abc
import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.types import Batch, Metrics

AXIS = "data"
"""The name that pmap gives to its axis."""


class Step(Protocol):
    def __call__(self, state: Any, batch: Batch, axis_name: str | None = None) -> tuple[Any, Metrics]: ...


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh, and where parameters lie on it.

    Attributes:
        data, fsdp, tensor: devices along each axis; one of them may be -1: what is left.
        rules: glob over the slash paths of the state's leaves ("**/mlp/up/kernel") -> one axis name or None an axis of
            the leaf; the first match wins. Momentum and optimizer state have their parameter's path behind a prefix.
        min_size: leaves that match no rule and have at least this many elements are cut along their largest axis
            that `fsdp` divides; smaller ones are replicated.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
    min_size: int = 2**16


class Lift(abc.ABC):
    """Base of the three: compiles once a batch shape, counts, and runs.

    Attributes:
        stacked: whether the step runs many arms (`mmjax.training.arms`): every leaf of the state and every metric then
            has a leading arm axis, which no lift cuts.
        compiles: programs compiled so far.
    """

    def __init__(self, step: Step, stacked: bool = False):
        self._step = step
        self.stacked = stacked
        self._compiled: dict[Any, Any] = {}
        self.compiles = 0

    @property
    def shards(self) -> int:
        """The number of parts that the global batch is cut in."""
        return 1

    @abc.abstractmethod
    def place(self, state: Any) -> Any:
        """Host (or one device's) state -> the state on the devices, in new buffers."""

    @abc.abstractmethod
    def place_batch(self, batch: Batch) -> Any:
        """This process's part of the global batch -> the batch on the devices. 64-bit integers become 32-bit."""

    def view(self, state: Any) -> Any:
        """The state as ordinary device arrays without replicas, for evaluation; valid until the next step."""
        return state

    def fetch(self, state: Any) -> Any:
        """An unreplicated NumPy copy (typed keys stay keys). With several processes every one must call it."""
        return jax.tree.map(_fetch, state)

    def fetch_metrics(self, metrics: Mapping[str, jax.Array]) -> dict[str, float]:
        """Scalars on the host; waits for the step that made them."""
        return self.fetch_arms(metrics)[0]

    def fetch_arms(self, metrics: Mapping[str, jax.Array]) -> list[dict[str, float]]:
        """The same for a stacked step: the metrics of each arm."""
        return pack_metrics([metrics]).fetch()[0]

    @abc.abstractmethod
    def lower(self, state: Any, batch: Any) -> Any:
        """The lowered program for placed arguments (or ShapeDtypeStructs with shardings): which `plan` inspects."""

    def compile(self, state: Any, batch: Any) -> Any:
        """The program for this batch's shapes, compiled if it is the first of them."""
        shape = tuple(sorted((name, tuple(leaf.shape), str(leaf.dtype)) for name, leaf in batch.items()))
        if shape not in self._compiled:
            self._compiled[shape] = self.lower(state, batch).compile()
            self.compiles += 1
        return self._compiled[shape]

    def step(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """One step on placed arguments; the old state is donated. Returns before the device has finished."""
        return self.compile(state, batch)(state, batch)

    def _check_divides(self, batch: Batch, parts: int) -> None:
        for name, leaf in batch.items():
            if leaf.shape[0] % parts:
                raise MmjaxError(
                    f"batch[{name!r}] has {leaf.shape[0]} examples on this process, not a multiple of {parts} devices"
                )


class JitLift(Lift):
    """The step on one device."""

    def __init__(self, step: Step, device: Any = None, stacked: bool = False):
        super().__init__(step, stacked)
        if jax.process_count() > 1:
            raise MmjaxError("lift='jit' is for one device; several processes need lift='pmap' or 'mesh'")
        self._sharding = SingleDeviceSharding(device or jax.local_devices()[0])

    def place(self, state: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.array(jax.device_put(leaf, self._sharding), copy=True), state)

    def place_batch(self, batch: Batch) -> Any:
        return jax.device_put(_narrow(batch), self._sharding)

    def lower(self, state: Any, batch: Any) -> Any:
        step = jax.jit(lambda state, batch: self._step(state, batch), donate_argnums=0)
        return step.lower(state, batch)


class PmapLift(Lift):
    """The step on every device, each with the whole state and a share of the batch; `axis_name` is "data"."""

    def __init__(self, step: Step, stacked: bool = False):
        super().__init__(step, stacked)
        self._local = jax.local_device_count()
        self._mapped = jax.pmap(self._counted, axis_name=AXIS, donate_argnums=0)

    def _counted(self, state: Any, batch: Any) -> tuple[Any, Any]:
        self.compiles += 1  # runs when traced: once a shape
        return self._step(state, batch, AXIS)

    @property
    def shards(self) -> int:
        return jax.device_count()

    def place(self, state: Any) -> Any:
        host = jax.tree.map(lambda leaf: leaf if _is_key(leaf) else np.asarray(leaf), state)
        # The same axis name as the step: the mesh behind it is part of the type, and another would compile twice.
        return jax.pmap(lambda _, leaf: leaf, axis_name=AXIS, in_axes=(0, None))(np.zeros(self._local), host)

    def place_batch(self, batch: Batch) -> Any:
        self._check_divides(batch, self._local)
        return {name: leaf.reshape(self._local, -1, *leaf.shape[1:]) for name, leaf in _narrow(batch).items()}

    def view(self, state: Any) -> Any:
        return jax.tree.map(jnp.asarray, self.fetch(state), is_leaf=lambda leaf: isinstance(leaf, np.ndarray))

    def fetch(self, state: Any) -> Any:
        return jax.tree.map(_fetch_replica, state)

    def lower(self, state: Any, batch: Any) -> Any:
        return self._mapped.lower(state, batch)

    def compile(self, state: Any, batch: Any) -> Any:
        return self.lower(state, batch).compile()  # counted where it is traced

    def step(self, state: Any, batch: Any) -> tuple[Any, Any]:
        # Not the program compiled ahead of time: with several processes that needs global shapes, pmap local ones.
        return self._mapped(state, batch)


class MeshLift(Lift):
    """The step over a named mesh; one program, divided by XLA."""

    def __init__(self, step: Step, config: MeshConfig | None = None, devices: Any = None, stacked: bool = False):
        """devices: those of the mesh, by default all; a described topology's for `plan`."""
        super().__init__(step, stacked)
        self.config = config or MeshConfig()
        devices = jax.devices() if devices is None else devices
        sizes = _mesh_sizes(self.config, len(devices))
        self.mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)

    @property
    def shards(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def batch_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, P(("data", "fsdp")))

    def shardings(self, state: Any) -> Any:
        """The sharding of every leaf of a state (or of its eval_shape)."""

        def sharding(path: Any, leaf: Any) -> NamedSharding:
            name = _slash(path)
            if not self.stacked:
                return NamedSharding(self.mesh, self.spec(name, leaf))
            one = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            return NamedSharding(self.mesh, P(None, *self.spec(name, one)))

        return jax.tree_util.tree_map_with_path(sharding, state)

    def spec(self, path: str, leaf: Any) -> P:
        """The partition of the leaf at a slash path. Raises MmjaxError if a rule does not fit the leaf."""
        if _is_key(leaf):
            return P()
        for pattern, axes in self.config.rules:
            if tree.matches(path, pattern):
                self._check_rule(path, leaf, pattern, axes)
                return P(*axes)
        size = self.mesh.shape["fsdp"]
        cuttable = [axis for axis, length in enumerate(leaf.shape) if length % size == 0]
        if size == 1 or math.prod(leaf.shape) < self.config.min_size or not cuttable:
            return P()
        largest = max(cuttable, key=lambda axis: leaf.shape[axis])
        return P(*("fsdp" if axis == largest else None for axis in range(leaf.ndim)))

    def _check_rule(self, path: str, leaf: Any, pattern: str, axes: tuple[str | None, ...]) -> None:
        unknown = [name for name in axes if name is not None and name not in self.mesh.shape]
        if unknown or len(axes) != leaf.ndim:
            raise MmjaxError(
                f"sharding rule {pattern!r} -> {axes} does not fit {path} {leaf.shape}; axes: data, fsdp, tensor"
            )
        for length, name in zip(leaf.shape, axes):
            if name is not None and length % self.mesh.shape[name]:
                raise MmjaxError(
                    f"sharding rule {pattern!r}: {path} {leaf.shape} cannot be cut in {self.mesh.shape[name]}"
                )

    def place(self, state: Any) -> Any:
        return jax.tree.map(_place, state, self.shardings(state))

    def place_batch(self, batch: Batch) -> Any:
        self._check_divides(batch, max(self.shards // jax.process_count(), 1))
        sharding = self.batch_sharding
        return {name: jax.make_array_from_process_local_data(sharding, leaf) for name, leaf in _narrow(batch).items()}

    def view(self, state: Any) -> Any:
        return state if jax.process_count() == 1 else jax.tree.map(jnp.asarray, self.fetch(state))

    def lower(self, state: Any, batch: Any) -> Any:
        shardings = self.shardings(state)
        out = (shardings, NamedSharding(self.mesh, P()))
        step = jax.jit(lambda state, batch: self._step(state, batch), donate_argnums=0, out_shardings=out)
        return step.lower(state, batch)


def create_lift(
    name: Literal["jit", "pmap", "mesh"], step: Step, mesh: MeshConfig | None = None, stacked: bool = False
) -> Lift:
    """The lift of an experiment; step(state, batch, axis_name=None), as `partial(train_step, method, optimizer)` is.

    stacked: the step is one of `mmjax.training.arms.over_arms`.
    """
    if name == "jit":
        return JitLift(step, stacked=stacked)
    if name == "pmap":
        return PmapLift(step, stacked)
    if name == "mesh":
        return MeshLift(step, mesh, stacked=stacked)
    raise MmjaxError(f"lift={name!r}: choose jit, pmap or mesh")


@dataclasses.dataclass(frozen=True)
class PackedMetrics:
    """The metrics of several steps as one array on the device.

    Attributes:
        names: of the metrics.
        values: float32 [steps * metrics * arms].
        steps: in the group.
    """

    names: tuple[str, ...]
    values: jax.Array
    steps: int

    def fetch(self) -> list[list[dict[str, float]]]:
        """One transfer: for each step the metrics of each arm. A step that is not stacked has one arm."""
        values = np.asarray(self.values).reshape(self.steps, len(self.names), -1)
        return [[dict(zip(self.names, map(float, arm))) for arm in step.T] for step in values]


def pack_metrics(steps: Sequence[Mapping[str, jax.Array]]) -> PackedMetrics:
    """Metrics of one step or more -> one array, computed behind the last of them; nothing waits, nothing is fetched.

    Of replicated metrics this process packs its first device's copy.
    """
    names = tuple(steps[0])
    local = [[step[name].addressable_shards[0].data for name in names] for step in steps]
    return PackedMetrics(names, _concatenate(local), len(steps))


@jax.jit
def _concatenate(steps: list[list[jax.Array]]) -> jax.Array:
    return jnp.concatenate([value.astype(jnp.float32).reshape(-1) for step in steps for value in step])


def initialise(create: Callable[[Any], Any], rng: Any, replaced: Collection[str] = ()) -> Any:
    """`create(rng)` as a host state, computed on this process's first device.

    Compiled: a forward pass whose shapes alone are used then costs nothing.

    replaced: slash paths of leaves that are not computed, but come as their shapes: `init_from` replaces them.
    """

    def computed(rng: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(create(rng))
        return {path: leaf for path, leaf in ((_slash(path), leaf) for path, leaf in leaves) if path not in replaced}

    # Views of the device's buffers where it has the host's memory: this process donates them to nothing.
    leaves = {path: leaf if _is_key(leaf) else np.asarray(leaf) for path, leaf in jax.jit(computed)(rng).items()}
    shapes = jax.eval_shape(create, rng)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(_slash(path), leaf), shapes)


def _slash(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def gather_json(value: Any) -> list[Any]:
    """The JSON values of all processes, by process index; every process must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.array(len(text)))))
    padded = np.full(longest, ord(" "), np.uint8)
    padded[: len(text)] = text
    return [json.loads(row.tobytes()) for row in np.asarray(multihost_utils.process_allgather(padded))]


def _mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = devices // max(-math.prod(sizes), 1)
    if min(sizes) < 1 or math.prod(sizes) != devices:
        raise MmjaxError(
            f"a mesh of data={config.data}, fsdp={config.fsdp}, tensor={config.tensor} does not use {devices} devices"
        )
    return sizes[0], sizes[1], sizes[2]


def _narrow(batch: Batch) -> Mapping[str, np.ndarray]:
    """Record ids come as int64; devices hold int32. A value that does not fit is an error, never another number."""
    narrow = {}
    for name, leaf in batch.items():
        leaf = np.asarray(leaf)
        if leaf.dtype == np.int64:
            if leaf.size and (leaf.max() > 2**31 - 1 or leaf.min() < -(2**31)):
                raise MmjaxError(f"batch[{name!r}] holds integers beyond 32 bits")
            leaf = leaf.astype(np.int32)
        narrow[name] = leaf
    return narrow


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if _is_key(leaf):
        data = _place(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.array(leaf, copy=True)
    return jnp.array(jax.make_array_from_callback(host.shape, sharding, lambda index: host[index]), copy=True)


def _shard(leaf: jax.Array) -> np.ndarray:
    return np.asarray(leaf.addressable_shards[0].data)


def _fetch(leaf: Any) -> Any:
    """A NumPy copy of an array in any sharding; not a view: the device buffer is about to be donated."""
    if _is_key(leaf):
        return jax.random.wrap_key_data(_fetch(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    if leaf.is_fully_addressable:
        return np.array(leaf, copy=True)
    if leaf.is_fully_replicated:
        return np.array(_shard(leaf), copy=True)
    return np.array(multihost_utils.process_allgather(leaf, tiled=True), copy=True)


def _fetch_replica(leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.wrap_key_data(_fetch_replica(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    return np.array(_shard(leaf).reshape(leaf.shape[1:]), copy=True)
