"""Trees of arrays seen as flat maps from slash paths to leaves: naming, selecting, merging, hashing."""

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from mmjax.errors import MmjaxError


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}, in the order of insertion. Empty sub-dicts vanish."""
    flat: dict[str, Any] = {}
    for name, child in tree.items():
        if isinstance(child, Mapping):
            flat.update({f"{name}/{path}": leaf for path, leaf in flatten(child).items()})
        else:
            flat[name] = child
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": leaf} -> nested dict: the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def matches(path: str, pattern: str) -> bool:
    """Whether a slash path fits a glob: `*` stays within one name, `**` spans any number of names.

    `vision/**` fits everything below `vision` and `vision` itself; `**/bias` fits `bias` at any depth.
    """
    return _matches(path.split("/"), pattern.split("/"))


def _matches(names: list[str], globs: list[str]) -> bool:
    if not globs:
        return not names
    if globs[0] == "**":
        return any(_matches(names[i:], globs[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], globs[0]) and _matches(names[1:], globs[1:])


def map_with_path(function: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Applies `function(path, leaf)` to every leaf of a nested dict."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def split(tree: Mapping[str, Any], paths: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cuts a nested dict in two: the leaves named in `paths`, and the rest."""
    chosen = set(paths)
    flat = flatten(tree)
    unknown = chosen - flat.keys()
    if unknown:
        raise MmjaxError(f"no leaf is called {sorted(unknown)}; the tree has {sorted(flat)}")
    inside = {path: leaf for path, leaf in flat.items() if path in chosen}
    outside = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(inside), unflatten(outside)


def merge(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Joins nested dicts whose leaves have different paths: the inverse of `split`.

    Leaves come out sorted by path, so the result does not depend on how the tree was cut.
    """
    flat: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in flat:
                raise MmjaxError(f"two trees to be merged both hold {path}")
            flat[path] = leaf
    return unflatten(dict(sorted(flat.items())))


def overlay(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Joins nested dicts; of leaves with the same path the last tree's stays. `merge` is for trees that share none."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat |= flatten(tree)
    return unflatten(dict(sorted(flat.items())))


def count(tree: Any) -> int:
    """The number of scalars in a tree of arrays (or of ShapeDtypeStructs)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def leaf_hash(leaf: Any) -> str:
    """SHA-256 of an array's dtype, shape and bytes; typed PRNG keys are hashed through their data."""
    if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(np.asarray(leaf))
    digest = hashlib.sha256(f"{array.dtype.name}{array.shape}".encode())
    digest.update(array.tobytes())
    return digest.hexdigest()


def tree_hash(tree: Any) -> str:
    """SHA-256 over the paths and leaves of any pytree: equal states give equal hashes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path, simple=True, separator="/").encode())
        digest.update(leaf_hash(leaf).encode())
    return digest.hexdigest()
