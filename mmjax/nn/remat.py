"""Blocks whose activations are computed again in the backward pass instead of being stored."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from mmjax.types import Array


def rematerialised(run: Callable[..., Any], block: nn.Module, x: Array, *others: Any) -> Any:
    """`run(block, x, *others)`, of which the arguments alone are stored.

    The gradient of x waits for those of the weights. TPU's scheduler would put the latter's products off to the end
    of the step, beside a collective, and store what they are made of: of every block, all that was computed again.
    """

    def forward(block: nn.Module, *arguments: Any) -> Any:
        return nn.vjp(nn.remat(run), block, *arguments)

    def backward(pull: Callable[[Any], Any], dy: Any) -> Any:
        d_params, dx, *rest = pull(dy)
        return *jax.lax.optimization_barrier((d_params, dx)), *rest

    return nn.custom_vjp(run, forward, backward)(block, x, *others)
