"""LoRA (arXiv 2106.09685): a frozen matrix and a small trained branch beside it, y = x W + b + scale * drop(x) A B.

    lora = LoRAConfig(("**/attention/q", "**/attention/v"), rank=8, alpha=16)
    method = LoRA(CLIP(config), lora)                        # any method
    optimizer = Optimizer(adamw(1e-4), lora.partition())     # trains only the branches
    params = merge_lora(state.params)                        # the ordinary tree again: evaluate, save, export

No module is changed for it. An adapter lies beside its kernel in the one tree of parameters, as `lora_a` [in, r],
`lora_b` [r, out] and `lora_scale` []. While `adapted` runs, every layer that has them among its parameters adds its
branch. A separate tree would have to be looked up by path, which differs wherever a method applies a part of the
network, and differentiated through closures, which rematerialised blocks refuse. Momentum copies, shardings,
checkpoints and partitions would need a case for it too. The scale is an untrained leaf, so that the tree alone
determines what is computed. The branch is a separate product rather than a matrix added to W: only so can dropout act
on its input (as in PEFT), W keep any form (bfloat16, int8), and no gradient as large as W ever be computed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.nn import int8
from mmjax.nn.dropout import keep_mask
from mmjax.training.method import Loss, Method
from mmjax.training.partition import FROZEN, TRAINABLE, Partition
from mmjax.training.rng import named
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, Int, Means, Params, PRNGKeyArray

A, B, SCALE = "lora_a", "lora_b", "lora_scale"
P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which layers get an adapter, and of what size.

    Attributes:
        patterns: globs over the slash paths of layers ("**/attention/q"); of those, all that have a kernel [in, out].
        rank: width of the branch. alpha: the branch's factor is alpha / rank.
        dropout: rate on the branch's input, in training.
    """

    patterns: tuple[str, ...]
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raises MmjaxError listing every field that is out of range."""
        wrong = [] if self.patterns else ["patterns=() (at least one)"]
        if self.rank < 1:
            wrong.append(f"rank={self.rank} (at least 1)")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout={self.dropout} (from 0 to below 1)")
        if wrong:
            raise MmjaxError("lora: " + "; ".join(wrong))

    def partition(self, *trained: str) -> Partition:
        """The adapters are trained, and what the globs name besides ("head/**"); all else is frozen."""
        return Partition(
            {f"**/{A}": TRAINABLE, f"**/{B}": TRAINABLE} | dict.fromkeys(trained, TRAINABLE) | {"**": FROZEN}
        )


def init_lora(rng: PRNGKeyArray, params: Params, config: LoRAConfig) -> dict[str, Any]:
    """Fresh adapters, float32: a tree to be merged with `params`. As in PEFT A is uniform in +-1 / sqrt(in), B is 0.

    Raises MmjaxError: a pattern that names no layer with a kernel [in, out].
    """
    kernels = {
        path.removesuffix("/kernel"): leaf for path, leaf in tree.flatten(params).items() if _is_kernel(path, leaf)
    }
    idle = [glob for glob in config.patterns if not any(tree.matches(path, glob) for path in kernels)]
    if idle:
        raise MmjaxError(f"lora: {idle} name no layer with a kernel [in, out]; there are {sorted(kernels)[:8]}")
    adapters: dict[str, Any] = {}
    for path, kernel in kernels.items():
        if any(tree.matches(path, glob) for glob in config.patterns):
            rows, columns = kernel.shape
            bound = rows**-0.5
            adapters[f"{path}/{A}"] = jax.random.uniform(
                named(rng, path), (rows, config.rank), jnp.float32, -bound, bound
            )
            adapters[f"{path}/{B}"] = jnp.zeros((config.rank, columns))
            adapters[f"{path}/{SCALE}"] = jnp.float32(config.alpha / config.rank)
    return tree.unflatten(adapters)


def _is_kernel(path: str, leaf: Any) -> bool:
    return path.endswith("/kernel") and leaf.ndim == 2


def split_lora(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """(adapters, the ordinary tree); `tree.merge` puts them together again."""
    return tree.split(params, [path for path in tree.flatten(params) if path.split("/")[-1] in (A, B, SCALE)])


def merge_lora(params: Params) -> dict[str, Any]:
    """The ordinary tree that computes the same: each kernel with its adapter's product added, in the kernel's dtype.

    An int8 kernel becomes float32: rounded again, it would lose what its adapter learned. A tree without adapters comes
    back as it is. Raises MmjaxError for a kernel that holds integers.
    """
    adapters, base = split_lora(params)
    branches, flat = tree.flatten(adapters), tree.flatten(base)
    for path in (path.removesuffix(f"/{A}") for path in branches if path.endswith(f"/{A}")):
        kernel = int8.dequantize(flat[f"{path}/kernel"])
        if not jnp.issubdtype(kernel.dtype, jnp.floating):
            raise MmjaxError(f"lora: {path}/kernel is {kernel.dtype}: an adapter cannot be merged into it")
        a, b, scale = (branches[f"{path}/{name}"] for name in (A, B, SCALE))
        flat[f"{path}/kernel"] = (kernel.astype(jnp.float32) + scale * a @ b).astype(kernel.dtype)
    return tree.unflatten(flat)


def adapted(
    function: Callable[P, R],
    dropout: float = 0.0,
    rng: PRNGKeyArray | None = None,
    axis_name: str | None = None,
    met: set[str] | None = None,
) -> Callable[P, R]:
    """The same function of parameters with adapters in them: `adapted(method.predict)` in an evaluation.

    Args:
        dropout: rate on the branches' inputs; none without `rng`. Masks come from the stream "dropout" where a module
            is given one, else from `rng` and the layer's path; they depend on an example's index in the global batch.
        axis_name: the mapped axis that cuts the batch.
        met: filled with the paths of the layers that added a branch, relative to the applied module.
    """

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y, module = call(*args, **kwargs), context.module
        if context.method_name != "__call__" or not module.has_variable("params", A):
            return y
        path = "/".join(module.path)
        a, b, scale = (module.get_variable("params", name) for name in (A, B, SCALE))
        x = args[0] if args else None
        if not isinstance(x, jax.Array) or getattr(y, "shape", None) != (*x.shape[:-1], b.shape[1]):
            raise MmjaxError(f"lora: {path} is a {type(module).__name__}, not a layer x [.., in] -> y [.., out]")
        if dropout and rng is not None:
            key = module.make_rng("dropout") if module.has_rng("dropout") else named(rng, path)
            x = jnp.where(keep_mask(key, dropout, x.shape, axis_name), x / (1 - dropout), 0)
        if met is not None:
            met.add(path)
        a, b, scale = (leaf.astype(y.dtype) for leaf in (a, b, scale))
        return y + scale * (x.astype(y.dtype) @ a @ b)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with nn.intercept_methods(intercept):
            return function(*args, **kwargs)

    return run


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Any method with adapters on its layers; what trains is the optimizer's `config.partition(...)`."""

    method: Method
    config: LoRAConfig

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """The method's initial state, with adapters; a momentum copy of a layer has a copy of its adapter."""
        params, carry = self.method.init(rng, batch)
        adapters = init_lora(named(rng, "lora"), params, self.config)
        return tree.merge(params, adapters), dataclasses.replace(carry, ema=_beside(carry.ema, adapters))

    def loss(
        self,
        params: Params,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        step: Int[Array, ""],
        axis_name: str | None = None,
    ) -> tuple[Loss, tuple[Carry, Means]]:
        """Raises MmjaxError for adapters whose layer did not run: they would never be trained."""
        met: set[str] = set()
        loss = adapted(self.method.loss, self.config.dropout, named(rng, "lora"), axis_name, met)
        result = loss(params, carry, batch, rng, step, axis_name)
        layers = [path.removesuffix(f"/{A}") for path in tree.flatten(params) if path.endswith(f"/{A}")]
        idle = [layer for layer in layers if not any(f"/{layer}".endswith(f"/{path}") for path in met)]
        if idle:
            raise MmjaxError(f"lora: the loss runs no layer called {', '.join(idle)}")
        return result

    def momentum(self, hparams: dict[str, Float[Array, ""]], step: Int[Array, ""]) -> Float[Array, ""]:
        return self.method.momentum(hparams, step)

    def constrain(self, params: Params) -> Params:
        return self.method.constrain(params)


def _beside(params: Params, adapters: Params) -> dict[str, Any]:
    """`params` with the adapters whose kernel it has."""
    flat_params = tree.flatten(params)
    matching = {
        path: leaf
        for path, leaf in tree.flatten(adapters).items()
        if f"{path.rpartition('/')[0]}/kernel" in flat_params
    }
    return tree.merge(params, tree.unflatten(matching))
