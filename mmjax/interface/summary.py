"""A loaded model in five lines, for a prompt or a notebook."""

import collections
import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mmjax.interface.inputs import Input

WIDTH = 120


def summary(
    name: str, layout: str, config: Any, params: Any, inputs: Mapping[str, Input], abilities: tuple[str, ...]
) -> str:
    """Class and layout, sizes, parameters by dtype, what `forward` takes, what the model can do: a line each."""
    counts: collections.Counter[str] = collections.Counter()
    for leaf in jax.tree.leaves(params):
        counts[str(leaf.dtype)] += int(np.prod(leaf.shape))
    weights = ", ".join(f"{count:,} {dtype}" for dtype, count in counts.most_common())
    lines = [
        f"{name}, read from the layout {layout}",
        f"  sizes: {', '.join(_sizes(config))}",
        f"  parameters: {weights or 'none'}; computes in {getattr(config, 'dtype', 'float32')}",
        f"  forward: {', '.join(inputs)}",
        f"  can: {', '.join(abilities) or 'nothing but forward'}",
    ]
    return "\n".join(textwrap.shorten(line, WIDTH, placeholder=" ...") if len(line) > WIDTH else line for line in lines)


def _sizes(config: Any, prefix: str = "") -> Iterator[str]:
    """The numbers of a config that are not 0, those of configs within it by their field's name."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _sizes(value, f"{prefix}{field.name}.")
        elif isinstance(value, int) and not isinstance(value, bool) and value:
            yield f"{prefix}{field.name} {value}"
        elif isinstance(value, tuple) and value and all(type(item) is int for item in value):
            yield f"{prefix}{field.name} {' x '.join(map(str, value))}"
