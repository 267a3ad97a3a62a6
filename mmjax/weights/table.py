"""Key tables: the mapping between the arrays of a public weight file and our variables, as data for both directions.

A table is a tuple of entries. Loading reads it from left to right, saving from right to left, so that one table serves
both and a round trip is exact. Both directions refuse what does not fit, with one message that lists all of it.

    table = (
        Entry("conv1.weight", "params/stem/kernel", conv),
        Entry("fc.weight", "params/head/kernel", linear),
        Entry("bn1.num_batches_tracked", "stats/bn1/count", int64, optional=True, default=0),
        Entry("blocks.0.attn.qkv.weight", tuple(f"params/{x}/kernel" for x in ("query", "key", "value")),
              chain(split(3), linear)),
    )
"""

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from mmjax.errors import MmjaxError
from mmjax.tree import flatten, unflatten

Shape: TypeAlias = tuple[int, ...]


class WeightsError(MmjaxError):
    """Weights that do not fit or cannot be trusted; the message names the file and every key concerned."""


# ---------------------------------------------------------------------------------------------------------------- ops


@dataclass(frozen=True)
class Op:
    """An invertible change of form between arrays of the file and arrays of ours.

    `load` takes the file's arrays, `save` ours; each returns one array, or a tuple of them where the op `divides` one
    array of the file into several of ours or `joins` several into one.
    """

    name: str
    load: Callable[..., Any]
    save: Callable[..., Any]
    divides: bool = False
    joins: bool = False
    takes_target_shape: bool = False
    """The result of `load` is to be reshaped to the target's own shape (the op knows only the public one)."""

    def __repr__(self) -> str:
        return self.name


def transpose(axes: tuple[int, ...]) -> Op:
    """Permutes axes as `np.transpose`: our axis i is the file's axis `axes[i]`."""
    back = tuple(int(i) for i in np.argsort(axes))
    return Op(f"transpose({axes})", lambda x: np.transpose(x, axes), lambda x: np.transpose(x, back))


same = Op("same", lambda x: x, lambda x: x)
"""The array as it is."""
linear = Op("linear", lambda x: np.transpose(x, (1, 0)), lambda x: np.transpose(x, (1, 0)))
"""torch Linear [out, in] <-> our kernel [in, out]."""
conv = Op("conv", lambda x: np.transpose(x, (2, 3, 1, 0)), lambda x: np.transpose(x, (3, 2, 0, 1)))
"""torch Conv2d [out, in / groups, height, width] <-> our kernel [height, width, in / groups, out]."""
int64 = Op("int64", lambda x: _as_int32(x), lambda x: np.asarray(x, np.int64))
"""A counter, int64 in torch <-> int32 here (JAX has no int64 by default)."""


def _as_int32(x: np.ndarray) -> np.ndarray:
    narrow = np.asarray(x).astype(np.int32)
    if not np.array_equal(narrow, x):
        raise ValueError(f"{x} does not fit int32")
    return narrow


def split(n: int, axis: int = 0) -> Op:
    """One array of the file <-> n equal parts of ours along `axis` (a fused qkv matrix)."""
    return Op(
        f"split({n}, {axis})",
        lambda x: tuple(np.split(x, n, axis)),
        lambda *parts: np.concatenate(parts, axis),
        divides=True,
    )


def join(n: int, axis: int = 0) -> Op:
    """n arrays of the file, equal in shape <-> one of ours, concatenated along `axis`: `split` turned round."""
    return Op(
        f"join({n}, {axis})",
        lambda *parts: np.concatenate(parts, axis),
        lambda x: tuple(np.split(x, n, axis)),
        joins=True,
    )


def stack(n: int, axis: int = 0) -> Op:
    """n arrays of the file <-> one of ours with a new axis of length n."""
    return Op(
        f"stack({n}, {axis})",
        lambda *parts: np.stack(parts, axis),
        lambda x: tuple(np.moveaxis(x, axis, 0)),
        joins=True,
    )


def unstack(n: int, axis: int = 0) -> Op:
    """One array of the file with an axis of length n <-> n of ours without it (blocks saved by a scan)."""

    def load(x: np.ndarray) -> tuple[np.ndarray, ...]:
        if x.shape[axis] != n:
            raise ValueError(f"axis {axis} of {x.shape} should be {n} long")
        return tuple(np.moveaxis(x, axis, 0))

    return Op(f"unstack({n}, {axis})", load, lambda *parts: np.stack(parts, axis), divides=True)


def reshape(public: Shape, ours: Shape | None = None) -> Op:
    """The file's shape <-> ours. `ours` may be omitted in the last op of an entry: it is then the target's shape."""

    def load(x: np.ndarray) -> np.ndarray:
        if tuple(x.shape) != tuple(public):
            raise ValueError(f"shape {tuple(x.shape)}, expected {tuple(public)}")
        return x if ours is None else x.reshape(ours)

    return Op(f"reshape({tuple(public)})", load, lambda x: x.reshape(public), takes_target_shape=ours is None)


def chain(*ops: Op) -> Op:
    """The ops one after the other, in loading order; an op of one array is applied to each part after a `split`."""
    if any(op.takes_target_shape for op in ops[:-1]):
        raise MmjaxError(f"chain{ops}: only the last reshape may leave out the target shape")

    def load(*arrays: np.ndarray) -> Any:
        for op in ops:
            arrays = _apply(op, op.load, arrays)
        return _as_value(arrays)

    def save(*arrays: np.ndarray) -> Any:
        for op in reversed(ops):
            arrays = _apply(op, op.save, arrays)
        return _as_value(arrays)

    return Op(
        f"chain{ops}",
        load,
        save,
        divides=any(op.divides for op in ops),
        joins=any(op.joins for op in ops),
        takes_target_shape=ops[-1].takes_target_shape,
    )


def _apply(op: Op, function: Callable[..., Any], arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    if op.divides or op.joins:
        return _as_tuple(function(*arrays))
    return tuple(function(array) for array in arrays)


def _as_value(arrays: tuple[Any, ...]) -> Any:
    return arrays[0] if len(arrays) == 1 else arrays


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


# -------------------------------------------------------------------------------------------------------------- entries


@dataclass(frozen=True)
class Entry:
    """One line of a table: key(s) of the file, slash path(s) in {"params": ..., "stats": ...}, and the op between.

    `optional`: the file may lack the key; the target then takes `default`, a number spread over its shape, and without
    a default counts as missing if the module has it. Saving always writes the key, if the variables hold the target.
    `copies`: other keys under which files may hold the one source as well, or instead (tied weights). Those that are
    there must be equal; saving writes none of them, or with `save_copies` all.
    """

    source: str | tuple[str, ...]
    target: str | tuple[str, ...]
    op: Op = same
    optional: bool = False
    default: float | int | None = None
    copies: tuple[str, ...] = ()
    save_copies: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        return _as_tuple(self.source)

    @property
    def targets(self) -> tuple[str, ...]:
        return _as_tuple(self.target)


Table: TypeAlias = tuple[Entry, ...]


PARALLEL = ("_orig_mod.", "module.", "_orig_mod.")
"""Prefixes of torch.compile and DistributedDataParallel, in either order."""


@dataclass(frozen=True)
class Layout:
    """One public form of a system's weights: how to recognise it, size the model from it, read and write it.

    name: "hf", "torchvision", "openai", ...: what `mmjax.export(model, dir, layout=name)` takes.
    recognise(keys, config_json): whether a file with these keys (after `unwrap`) and config.json is of this layout.
    config(shapes, config_json): our config, from the arrays' shapes by key and the config.json beside them, if any.
    table(config): the table; its sources are the names that an export writes.
    hf_config(config): the config.json that an export writes beside the weights.
    reduce(config): of a layout that has no names for some of our variables, the config of those that it has; an export
        leaves out the others and reports them.
    file: the name of the weight file that an export writes: a .safetensors or a .npz.
    wrappers: dictionaries around the weights in a torch file ({"state_dict": {...}, "epoch": 3}); the first is taken.
    strip: prefixes taken from every key that has them, in this order, after those of `PARALLEL`.
    renames: (regular expression, replacement) pairs applied to every key afterwards, in order: older spellings,
        absent prefixes.
    ignored: globs of keys that carry no weight (`*` spans dots); they are dropped.
    assumed: {field of the config: the dotted key of config.json that determines it, "" if none does}, for the fields
        that no array determines and that published files have in several values. Without the key, `config` assumes the
        usual value, and `load` notes it. "preprocess" means the image preprocessing.
    decides(keys, config_json): of layouts with the same keys, whether keys without a weight or a config.json decide for
        this one. Where they decide for none, `load` needs `layout=`.
    parts: {name of a file: prefix}: files that may lie beside the weights, with a part that these may lack. Their keys
        get the prefix.
    """

    name: str
    recognise: Callable[[Set[str], Mapping[str, Any] | None], bool]
    config: Callable[[Mapping[str, Shape], Mapping[str, Any] | None], Any]
    table: Callable[[Any], Table]
    hf_config: Callable[[Any], dict[str, Any]] | None = None
    reduce: Callable[[Any], Any] | None = None
    file: str = "model.safetensors"
    wrappers: tuple[str, ...] = ("state_dict", "model_state_dict", "model", "state_dict_ema")
    strip: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    assumed: Mapping[str, str] = field(default_factory=dict)
    decides: Callable[[Set[str], Mapping[str, Any] | None], bool] = lambda keys, config_json: False
    parts: Mapping[str, str] = field(default_factory=dict)

    def unwrap(self, keys: Iterable[str], file: str = "") -> dict[str, str]:
        """{key in the table's spelling: key in the file}. Keys outside the wrapper, if there is one, are dropped."""
        inside = list(keys)
        start = ""
        for wrapper in self.wrappers:
            if any(key.startswith(f"{wrapper}/") for key in inside):
                start = f"{wrapper}/"
                inside = [key for key in inside if key.startswith(start)]
                break
        names: dict[str, str] = {}
        for key in inside:
            name = key.removeprefix(start)
            for prefix in (*PARALLEL, *self.strip):
                name = name.removeprefix(prefix)
            for pattern, replacement in self.renames:
                name = re.sub(pattern, replacement, name)
            if any(fnmatch.fnmatchcase(name, glob) for glob in self.ignored):
                continue
            if name in names:
                raise WeightsError(f"{file}: {names[name]} and {key} both stand for {name} in the {self.name} layout")
            names[name] = key
        return names


# ----------------------------------------------------------------------------------------------------- both directions


def load_table(
    table: Table, arrays: Mapping[str, Any], shapes: Mapping[str, Any], file: str, ignored: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Reads a file's arrays through a table into our variables.

    arrays: key -> array, after `Layout.unwrap`; read one at a time (a lazy mapping stays lazy).
    shapes: the variables of the module, nested: leaves with `shape` and `dtype`, as of `jax.eval_shape`.
    Floats of any width become the target's float dtype. Raises WeightsError, which lists every missing and unexpected
    key, every target left empty and every array of the wrong shape.
    """
    expected = flatten(shapes)
    problems = _Problems(f"{file} does not fit the model")
    present = {key for key in arrays if not any(fnmatch.fnmatchcase(key, glob) for glob in ignored)}
    filled: dict[str, Any] = {}
    used: set[str] = set()
    for entry in table:
        problems.repeated += [key for key in entry.sources if key in used]
        problems.repeated += [path for path in entry.targets if path in filled]
        problems.foreign += [path for path in entry.targets if path not in expected]
        used.update(entry.sources)
        filled.update(dict.fromkeys(entry.targets))
        if entry.copies:
            used.update(entry.copies)
            entry = _first_copy(entry, arrays, present, problems)
        absent = [key for key in entry.sources if key not in present]
        if not absent:
            filled.update(_load_entry(entry, arrays, expected, problems))
        elif not entry.optional or len(absent) < len(entry.sources):
            problems.missing += absent
        elif entry.default is not None:
            leaves = {path: expected[path] for path in entry.targets if path in expected}
            filled.update({path: np.full(leaf.shape, entry.default, leaf.dtype) for path, leaf in leaves.items()})
        elif any(path in expected for path in entry.targets):
            problems.missing += absent
    problems.foreign = [path for path in problems.foreign if filled[path] is not None]
    problems.unexpected = sorted(present - used)
    problems.unfilled = sorted(expected.keys() - filled.keys())
    problems.check()
    return unflatten({path: filled[path] for path in expected})


def _first_copy(entry: Entry, arrays: Mapping[str, Any], present: Set[str], problems: "_Problems") -> Entry:
    """The entry with the first source that exists; copies that differ from it go to `problems`."""
    there = [key for key in (*entry.sources, *entry.copies) if key in present]
    others = [key for key in there[1:] if not np.array_equal(arrays[key], arrays[there[0]])]
    problems.untied += [f"{key} differs from {there[0]}" for key in others]
    return replace(entry, source=there[0]) if there else entry


def _load_entry(
    entry: Entry, arrays: Mapping[str, Any], expected: Mapping[str, Any], problems: "_Problems"
) -> dict[str, np.ndarray]:
    """The entry's targets, in the expected shape and dtype; mismatches go to `problems`."""
    sources = [np.asarray(arrays[key]) for key in entry.sources]
    sources_text = ", ".join(f"{key} {list(array.shape)}" for key, array in zip(entry.sources, sources))
    try:
        parts = _as_tuple(entry.op.load(*sources))
    except (ValueError, IndexError) as error:
        problems.misshapen.append(f"{sources_text}: {entry.op} fails: {error}")
        return {}
    if len(parts) != len(entry.targets):
        problems.misshapen.append(
            f"{sources_text}: {entry.op} gives {len(parts)} arrays for {len(entry.targets)} targets"
        )
        return {}
    loaded = {}
    for path, part in zip(entry.targets, parts):
        if path not in expected:
            loaded[path] = part
            continue
        shape, dtype = tuple(expected[path].shape), np.dtype(expected[path].dtype)
        if entry.op.takes_target_shape and part.size == math.prod(shape):
            part = part.reshape(shape)
        if part.shape != shape:
            problems.misshapen.append(f"{sources_text}: gives {list(part.shape)}, {path} has {list(shape)}")
        elif _is_float(part.dtype) != _is_float(dtype):
            problems.misshapen.append(f"{sources_text}: is {part.dtype}, {path} has {dtype}")
        else:
            loaded[path] = np.array(part, dtype, order="C")
    return loaded


def _is_float(dtype: Any) -> bool:
    # ml_dtypes' bfloat16 and float8 are of kind "V" to NumPy.
    return np.dtype(dtype).kind in "fV"


def save_table(table: Table, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our variables -> {key of the file: array}, in the table's order: the inverse of `load_table`.

    Raises WeightsError when a leaf has no line in the table, or a line no leaf.
    """
    leaves = flatten(variables)
    problems = _Problems("the variables do not fit the table")
    arrays: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for entry in table:
        used.update(entry.targets)
        absent = [path for path in entry.targets if path not in leaves]
        if absent:
            if not entry.optional:
                problems.missing += absent
            continue
        try:
            parts = _as_tuple(entry.op.save(*(np.asarray(leaves[path]) for path in entry.targets)))
        except (ValueError, IndexError) as error:
            problems.misshapen.append(f"{', '.join(entry.targets)}: {entry.op} fails: {error}")
            continue
        problems.repeated += [key for key in entry.sources if key in arrays]
        arrays.update({key: np.array(part, order="C") for key, part in zip(entry.sources, parts, strict=True)})
        if entry.save_copies:
            arrays.update({key: np.array(parts[0], order="C") for key in entry.copies})
    problems.unexpected = sorted(leaves.keys() - used)
    problems.check()
    return arrays


class _Problems:
    """Everything that does not fit, collected for one message."""

    def __init__(self, title: str):
        self.title = title
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []
        self.unfilled: list[str] = []
        self.foreign: list[str] = []
        self.repeated: list[str] = []
        self.untied: list[str] = []

    def check(self) -> None:
        groups = [
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("misshapen", self.misshapen),
            ("parameters that the table does not fill", self.unfilled),
            ("targets that the module does not have", self.foreign),
            ("named twice in the table", self.repeated),
            ("to be one array under two names", self.untied),
        ]
        lines = [f"  {name} ({len(keys)}):\n    " + "\n    ".join(keys) for name, keys in groups if keys]
        if lines:
            raise WeightsError("\n".join([self.title + ":", *lines]))
