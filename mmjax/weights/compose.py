"""Tables of systems with parts: the table of a part, moved to the path of the part."""

import dataclasses

from mmjax.weights.table import Entry


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
