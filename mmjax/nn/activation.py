"""Activations, by the names of the systems' configs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.types import Array


@jax.custom_vjp
def relu(x: Array) -> Array:
    """max(x, 0), with gradient 0 at 0. Reverse mode only.

    The backward pass uses the sign of the result, in its dtype. A boolean mask, which `jax.nn.relu` stores, is one
    more array in memory, and one that TPU v5e's compiler cannot place in MoCo v2's ResNet-50
    at 32 images a chip (RESOURCE_EXHAUSTED, CompileTimeScopedVmemOom).
    """
    return jnp.maximum(x, 0)


def _backward(y: Array, dy: Array) -> tuple[Array]:
    return (dy * jnp.sign(y),)


relu.defvjp(lambda x: (relu(x),) * 2, _backward)


def activation(name: str) -> Callable[[Array], Array]:
    """ "gelu" (erf), "gelu_tanh", "quick_gelu" (OpenAI CLIP), "silu" or "relu"."""
    if name not in _ACTIVATIONS:
        raise MmjaxError(f"activation {name!r}: choose {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # By erf itself: jax.nn.gelu uses erfc, which takes three times as long on CPU.
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5)),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "relu": relu,
}
