"""The arrays that a system's `forward` takes: declared by name, checked before a program is compiled."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mmjax.errors import MmjaxError
from mmjax.types import Array


class Input(NamedTuple):
    """One input of `forward`.

    axes: a name or a length for each axis, "b height width 3"; axes of one name have one length within a call. Several
        ranks are separated by "|": "n height width 3 | n tiles height width 3".
    dtype: "float", or "int", which a mask of booleans is too. required: whether every call needs it.
    """

    axes: str
    dtype: Literal["float", "int"] = "int"
    required: bool = False


PIXELS = {"pixel_values": Input("b height width 3", "float", required=True)}
"""Images alone."""
TEXTS = {"input_ids": Input("b l", required=True), "attention_mask": Input("b l")}
"""Texts alone; the mask is 1 at tokens and 0 at padding."""
IMAGES_AND_TEXTS = {
    "pixel_values": Input("images height width 3", "float"),
    "input_ids": Input("texts l"),
    "attention_mask": Input("texts l"),
}
"""Images, texts or both."""


PROMPTS = {
    "pixel_values": Input("images height width 3 | images tiles height width 3", "float"),
    "input_ids": Input("b l", required=True),
    "attention_mask": Input("b l"),
    "image_sizes": Input("images 2"),
}
"""Texts with images in them; the sizes are heights and widths before preprocessing."""


def check_inputs(declared: Mapping[str, Input], values: Mapping[str, Any], system: str) -> dict[str, Array]:
    """The values as arrays, without those that are None.

    Raises MmjaxError for an input that is not declared, a missing one, and one of another rank, length or dtype.
    """
    arrays = {name: jnp.asarray(value) for name, value in values.items() if value is not None}
    needed = [name for name, one in declared.items() if one.required]
    unknown, missing = arrays.keys() - declared.keys(), [name for name in needed if name not in arrays]
    if unknown or missing or not arrays:
        problem = f"it does not take {', '.join(sorted(unknown))}" if unknown else f"{_needs(declared, missing)}"
        takes = ", ".join(f"{name} ({_kind(one)}{', required' * one.required})" for name, one in declared.items())
        raise MmjaxError(f"forward of {system}: {problem}. It takes {takes}")
    lengths: dict[str, tuple[int, str]] = {}
    for name, array in arrays.items():
        axes = next((form for form in _forms(declared[name]) if len(form) == array.ndim), [])
        kinds = jnp.floating if declared[name].dtype == "float" else jnp.integer
        right = jnp.issubdtype(array.dtype, kinds) or (kinds is jnp.integer and array.dtype == bool)
        if not right or not axes or any(a.isdigit() and int(a) != n for a, n in zip(axes, array.shape)):
            hint = "; preprocess(images) makes them" if name == "pixel_values" else ""
            raise MmjaxError(f"{name} should be {_kind(declared[name])}, not {array.dtype} {list(array.shape)}{hint}")
        for axis, length in zip(axes, array.shape):
            expected, other = lengths.setdefault(axis, (length, name))
            if length != expected:
                raise MmjaxError(f"{name} {list(array.shape)}: its axis {axis} is {expected} long in {other}")
    return arrays


def check_ids(values: Mapping[str, Any], counts: Mapping[str, int]) -> None:
    """Raises MmjaxError for an id outside 0 .. count - 1, which a table of `count` rows would silently clip.

    values: ids by name. counts: the rows of the tables; names without one are not checked, nor is None, nor ids that
        are traced, which have no values yet.
    """
    for name in values.keys() & counts.keys():
        if values[name] is None or isinstance(values[name], Tracer):
            continue
        ids, count = np.asarray(values[name]), counts[name]
        if ids.size and (ids.min() < 0 or ids.max() >= count):
            raise MmjaxError(f"{name}: ids from {ids.min()} to {ids.max()}; there are {count}")


def _needs(declared: Mapping[str, Input], missing: list[str]) -> str:
    return f"it needs {', '.join(missing)}" if missing else f"it needs one of {', '.join(declared)}"


def _forms(declared: Input) -> list[list[str]]:
    """The axes, for each rank that it may have."""
    return [form.split() for form in declared.axes.split("|")]


def _kind(declared: Input) -> str:
    forms = (f"[{', '.join(form)}]" for form in _forms(declared))
    return f"{declared.dtype}s {' or '.join(forms)}"
