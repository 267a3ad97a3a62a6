"""The checker of jaxtyping's import hook: holds calls to the array annotations of their function, and to nothing else.

Set MMJAX_CHECK_ARRAYS=1 to run tests with it. Pyright has checked the other annotations, and beartype rejects some that
are right (Self, protocols that are not runtime checkable). NumPy arrays pass for `jax.Array` and scalars for arrays
without axes. Dataclasses are not checked: under a mapped axis their leaves have one axis more than their annotations.
"""

import collections.abc
import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

CONTAINERS = (tuple, list, dict, collections.abc.Sequence, collections.abc.Mapping)


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    if function.__name__ == "__init__":
        return function
    hints = {name: arrays(hint) for name, hint in function.__annotations__.items()}
    if all(hint is Any for hint in hints.values()):
        return function
    function.__annotations__ = hints
    return beartype(conf=BeartypeConf(is_color=False))(function)


def arrays(hint: Any) -> Any:
    """The hint with Any for all that is not an array."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return of_any_kind(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        parts = [argument if argument is type(None) else arrays(argument) for argument in arguments]
        return Any if Any in parts else Union[tuple(parts)]  # noqa: UP007
    if origin in CONTAINERS and arguments:
        parts = tuple(argument if argument is ... else arrays(argument) for argument in arguments)
        return Any if all(part in (Any, ...) for part in parts) else origin[parts]
    return Any


def of_any_kind(hint: type[AbstractArray]) -> Any:
    kinds: Any = jax.Array | np.ndarray
    if hint.dim_str == "":
        kinds = kinds | np.generic | float | int | bool
    return hint.dtype[kinds, hint.dim_str]
