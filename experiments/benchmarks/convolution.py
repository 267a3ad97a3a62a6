"""Convolutions: ours against XLA's own and PyTorch's, on CPU (a whole ResNet-50: networks.py).

    python -m experiments.benchmarks.convolution --rounds 5

Layer shapes are ResNet-50's at batch 8, and two of the quickstart's at its 256; float32. The sides alternate, so that a
change in the machine's load meets all; only ratios within a row mean anything. "x4" columns: four sets of weights and
images, through `vmap` and `lax.map`, forward and backward, in units of the same for one.
"""

import argparse
import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks.timing import Timed, alternate, ratio
from mmjax.nn.convolution import conv


@dataclasses.dataclass(frozen=True)
class Layer:
    name: str
    size: int
    inside: int
    out: int
    kernel: int
    stride: int = 1
    groups: int = 1
    batch: int | None = None  # where it is not the table's

    @property
    def padding(self) -> int:
        return self.kernel // 2


LAYERS = (
    Layer("stem 7x7/2", 224, 3, 64, 7, 2),
    Layer("1x1, 56 px", 56, 64, 256, 1),
    Layer("3x3, 56 px", 56, 64, 64, 3),
    Layer("3x3/2, 56 px", 56, 128, 128, 3, 2),
    Layer("3x3, 28 px", 28, 128, 128, 3),
    Layer("1x1/2, 28 px", 28, 512, 1024, 1, 2),
    Layer("3x3, 14 px", 14, 256, 256, 3),
    Layer("1x1, 14 px", 14, 1024, 256, 1),
    Layer("3x3, 7 px", 7, 512, 512, 3),
    Layer("3x3, 32 groups, 28 px", 28, 256, 256, 3, 1, 32),
    Layer("3x3, 2 px, x256", 2, 256, 256, 3, batch=256),
    Layer("stem 7x7/2, 64 px, x256", 64, 3, 32, 7, 2, batch=256),
)


def xla_conv(x: Any, kernel: Any, layer: Layer) -> Any:
    pads = [(layer.padding, layer.padding)] * 2
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (layer.stride,) * 2, pads, dimension_numbers=dims, feature_group_count=layer.groups
    )


def our_conv(x: Any, kernel: Any, layer: Layer) -> Any:
    return conv(x, kernel, strides=layer.stride, padding=layer.padding, groups=layer.groups)


def layer_sides(layer: Layer, batch: int) -> tuple[dict[str, Timed], dict[str, Timed], dict[str, Timed]]:
    """Calls of the forward pass, of the backward pass, and of four arms, by side."""
    import torch

    rng = np.random.default_rng(0)
    shape = (layer.kernel, layer.kernel, layer.inside // layer.groups, layer.out)
    xs = jnp.asarray(rng.normal(size=(4, batch, layer.size, layer.size, layer.inside)), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(4, *shape)), jnp.float32)
    x, kernel = xs[0], kernels[0]
    image = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous().requires_grad_(layer.inside > 3)
    weight = torch.tensor(np.asarray(kernel)).permute(3, 2, 0, 1).contiguous().requires_grad_()

    def torch_convolution() -> Any:
        return torch.nn.functional.conv2d(
            image, weight, stride=layer.stride, padding=layer.padding, groups=layer.groups
        )

    out = torch_convolution()
    torch_dy = torch.randn(out.shape)
    dy = jnp.asarray(torch_dy.permute(0, 2, 3, 1).contiguous().numpy())
    dys = jnp.stack([dy] * 4)
    inputs = [tensor for tensor in (image, weight) if tensor.requires_grad]

    def torch_forward() -> Any:
        with torch.no_grad():
            return torch_convolution()

    forward: dict[str, Timed] = {"torch": torch_forward}
    backward: dict[str, Timed] = {"torch": lambda: torch.autograd.grad(out, inputs, torch_dy, retain_graph=True)}
    arms: dict[str, Timed] = {}
    for name, function in (("xla", xla_conv), ("ours", our_conv)):

        def gradients(x: Any, kernel: Any, dy: Any, function: Any = function) -> Any:
            pull = jax.vjp(lambda x, kernel: function(x, kernel, layer), x, kernel)[1]
            dx, dk = pull(dy)
            return (dx, dk) if layer.inside > 3 else dk

        def both(x: Any, kernel: Any, dy: Any, function: Any = function, gradients: Any = gradients) -> Any:
            return function(x, kernel, layer), gradients(x, kernel, dy)

        run = jax.jit(lambda x, kernel, function=function: function(x, kernel, layer))
        forward[name] = lambda run=run: jax.block_until_ready(run(x, kernel))
        pull = jax.jit(gradients)
        backward[name] = lambda pull=pull: jax.block_until_ready(pull(x, kernel, dy))
        one, mapped = jax.jit(both), jax.jit(jax.vmap(both))
        looped = jax.jit(lambda *arrays, both=both: lax.map(lambda arm: both(*arm), arrays))
        arms[f"{name} one"] = lambda one=one: jax.block_until_ready(one(x, kernel, dy))
        arms[f"{name} vmap"] = lambda mapped=mapped: jax.block_until_ready(mapped(xs, kernels, dys))
        arms[f"{name} map"] = lambda looped=looped: jax.block_until_ready(looped(xs, kernels, dys))
    return forward, backward, arms


def layer_row(layer: Layer, batch: int, rounds: int, with_arms: bool) -> str:
    forward, backward, arms = layer_sides(layer, layer.batch or batch)
    ahead, back = alternate(forward, rounds), alternate(backward, rounds)
    cells = [f"{layer.name:23}"]
    for seconds in (ahead, back):
        cells += [f"{1e3 * statistics.median(seconds[name]):7.1f}" for name in ("torch", "xla", "ours")]
        cells.append(f"{ratio(seconds, 'ours', 'torch'):6.2f}")
    if with_arms:
        seconds = alternate(arms, 1)
        cells += [
            f"{ratio(seconds, f'{s} {way}', f'{s} one'):7.1f}" for s in ("xla", "ours") for way in ("vmap", "map")
        ]
    return " ".join(cells)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", action=argparse.BooleanOptionalAction, default=True, help="measure vmap and lax.map")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"batch {options.batch_size}, float32, ms, median of {options.rounds} rounds on {jax.default_backend()}")
    heads = ("forward: torch, xla, ours, ratio", "backward: the same", "x4: xla, ours; vmap, map")
    print(" " * 23, *(f"{head:>31}" for head in heads))
    for layer in LAYERS:
        print(layer_row(layer, options.batch_size, options.rounds, options.arms), flush=True)


if __name__ == "__main__":
    main()
