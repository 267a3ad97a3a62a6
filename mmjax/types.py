"""The names that every floor of the house shares: axis letters, array aliases.

Axis legend, used in every public signature:

    b batch          n image tokens     l text tokens     s key/value tokens
    h heads          d width            k head width      v vocabulary
    q queue length   c channels or classes
    height width     the two image axes, written out
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray, UInt8

from mmjax.errors import MmjaxError

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.Array | np.ndarray
Params: TypeAlias = Mapping[str, Any]
"""A nested dict of arrays: one subtree a submodule."""
Batch: TypeAlias = Mapping[str, Any]
"""A dict of arrays that share their first axis."""
Metrics: TypeAlias = dict[str, jax.Array]

__all__ = [
    "Array",
    "ArrayLike",
    "Batch",
    "Bool",
    "Float",
    "Int",
    "Metrics",
    "MmjaxError",
    "PRNGKeyArray",
    "Params",
    "UInt8",
]
