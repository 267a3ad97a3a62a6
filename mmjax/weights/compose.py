"""Systems with parts: the table of a part, moved to the path of the part; weights whose part is in a file beside."""

import dataclasses
import pathlib
from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any

from mmjax.weights.files import read_weights
from mmjax.weights.records import Weights
from mmjax.weights.table import Entry, Layout


def moved(entry: Entry, prefix: str, part: str, params: str = "params", stats: str = "stats") -> Entry:
    """The entry with `prefix` before its keys, and with its targets under `part` of other collections.

    params, stats: the names of these collections: "stats/momentum" where parameters are a momentum encoder's.
    """

    def target(path: str) -> str:
        collection, rest = path.split("/", 1)
        return "/".join(filter(None, ({"params": params, "stats": stats}[collection], part, rest)))

    sources, targets = tuple(prefix + key for key in entry.sources), tuple(map(target, entry.targets))
    return dataclasses.replace(
        entry,
        source=sources if isinstance(entry.source, tuple) else sources[0],
        target=targets if isinstance(entry.target, tuple) else targets[0],
        copies=tuple(prefix + key for key in entry.copies),
    )


def with_parts(
    weights: Weights, names: Mapping[str, str], layout: Layout, folder: pathlib.Path
) -> tuple[Weights, dict[str, str]]:
    """The weights and their names, with those of a file beside them (`Layout.parts`) where they lack its part."""
    for file, prefix in layout.parts.items():
        if not (folder / file).is_file() or any(name.startswith(prefix) for name in names):
            continue
        part = read_weights(folder / file)
        keys = {prefix + key: key for key in part.arrays}
        arrays: Any = ChainMap(weights.arrays, RenamedArrays(part.arrays, keys))  # type: ignore[arg-type]
        shapes = {**weights.shapes, **{key: part.shapes[old] for key, old in keys.items()}}
        dtypes = {**weights.dtypes, **{key: part.dtypes[old] for key, old in keys.items()}}
        names = {**names, **layout.unwrap(keys, part.file)}
        weights = Weights(arrays, shapes, dtypes, f"{weights.file} with {file}", weights.metadata)
    return weights, dict(names)


class RenamedArrays(Mapping[str, Any]):
    """The arrays of a file under the names of a table; still read one at a time."""

    def __init__(self, arrays: Mapping[str, Any], names: Mapping[str, str]):
        self.arrays, self.names = arrays, names

    def __getitem__(self, key: str) -> Any:
        return self.arrays[self.names[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
