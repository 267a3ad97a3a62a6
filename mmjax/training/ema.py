"""Momentum encoders: exponential moving averages of a subtree of the parameters."""

from typing import Any

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.types import Array, Float, Params


def update_ema(ema: Params, params: Params, momentum: Float[Array, ""] | float) -> dict[str, Any]:
    """`momentum * ema + (1 - momentum) * params`, for the leaves that `ema` holds (MoCo, builder.py:66-73).

    Args:
        ema: nested dict with a subset of the paths of `params`.
        params: the parameters that are followed.
        momentum: scalar; 1 keeps the old average bit-identical, 0 copies the parameters.

    Raises:
        MmjaxError: `ema` has a leaf that `params` has not.
    """
    source = tree.flatten(params)

    def follow(path: str, average: Array) -> Array:
        if path not in source:
            raise MmjaxError(f"the momentum tree has {path}, the parameters have not")
        return (momentum * average + (1 - momentum) * source[path]).astype(average.dtype)

    return tree.map_with_path(follow, ema)
