"""Initial weights for a network on two encoders that were pre-trained apart: their states brought into one space.

`aligned_projections` makes the projections of the contrast, `translated_attention` the cross attention.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from mmjax.nn.norm import l2_normalize
from mmjax.objectives.contrastive import clip_loss
from mmjax.types import Array, Float, Params

RIDGE = 100.0
"""Of `translation`: about a twentieth of the pairs that the recipes on drawings have."""


def aligned_projections(
    states: tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m e"]],
    indices: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    width: int,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """The initial vision_proj, text_proj and temperature: contrast alone, in batches of 256, which takes seconds.

    A step of the whole loss spends nearly all its time on the multimodal layers, while projections of cached states
    cost nothing; and until contrast is nearly solved the ITM head learns nothing. The states are standardised first: a
    common direction, which is most of a text's state, would fill all cosines.

    Args:
        states: of the class tokens of pictures and texts.
        indices: of each thing's pictures and texts.
        steps: 0: the projections are random, of standardised states.
    """
    rng = np.random.default_rng(seed)
    moments = [(x.mean(0), x.std(0) + 1e-6) for x in states]
    inputs = [(x - mean) / scale for x, (mean, scale) in zip(states, moments)]
    params: Any = [rng.normal(0, len(x[0]) ** -0.5, (x.shape[1], width)).astype(np.float32) for x in inputs]
    params = {"kernels": params, "scale": np.float32(np.log(10))}
    optimizer = optax.adamw(1e-3, weight_decay=0.1)

    @jax.jit
    def step(params: Any, state: Any, images: Array, texts: Array) -> Any:
        def loss(params: Any) -> Array:
            image, text = (l2_normalize(x @ kernel) for x, kernel in zip((images, texts), params["kernels"]))
            return clip_loss(image, text, params["scale"])

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        things = rng.permutation(len(indices[0]))[:256]
        batch = [x[[rng.choice(choices[thing]) for thing in things]] for x, choices in zip(inputs, indices)]
        params, state = step(params, state, *batch)
    projections: dict[str, Any] = {"temperature": np.float32(np.exp(-params["scale"]))}
    for name, kernel, (mean, scale) in zip(("vision_proj", "text_proj"), params["kernels"], moments):
        kernel = np.asarray(kernel) / scale[:, None]
        projections[name] = {"kernel": kernel.astype(np.float32), "bias": (-mean @ kernel).astype(np.float32)}
    return projections


def translation(
    images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n e"], ridge: float = RIDGE
) -> tuple[Float[np.ndarray, "d e"], Float[np.ndarray, " e"]]:
    """The kernel and bias of the affine map from a picture's state to its text's, by ridge regression on standardised
    states of pairs; float64."""
    x, y = images.astype(np.float64), texts.astype(np.float64)
    mean, scale, target = x.mean(0), x.std(0) + 1e-6, y.mean(0)
    standard = (x - mean) / scale
    kernel = np.linalg.solve(standard.T @ standard + ridge * np.eye(x.shape[1]), standard.T @ (y - target))
    kernel = kernel / scale[:, None]
    return kernel, target - mean @ kernel


def translated_attention(attention: Params, kernel: Float[np.ndarray, "d e"], bias: Float[np.ndarray, " e"]) -> Params:
    """A cross attention that treats an image's tokens as the self attention `attention` treats a text's, once they are
    translated: keys and values are those of `image @ kernel + bias`.

    attention: {q, k, v, out}, each a kernel [e, i] and a bias. A plain copy would read image states, of another space,
    as if they were text states.
    """

    def composed(dense: Params) -> Params:
        composition = {"kernel": kernel @ dense["kernel"], "bias": bias @ dense["kernel"] + dense["bias"]}
        return {name: value.astype(np.float32) for name, value in composition.items()}

    return {**attention, "k": composed(attention["k"]), "v": composed(attention["v"])}
