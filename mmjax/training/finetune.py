"""Fine-tuning a loaded network as a classifier: the trained layers, their rates, and the forward pass of frozen ones.

Layers are lists of globs over parameter paths, by depth: the layers before the blocks, each block, and the layers after
them with the head, as `mmjax.interface.image_classifier.ImageClassifier.layers` returns them.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import jax.numpy as jnp
import optax

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.training.classification import Classifier
from mmjax.training.optimizer import Optimizer, Schedule, adamw, excluding, layer_decay
from mmjax.training.partition import FROZEN, Partition
from mmjax.types import Array, Float, Params, PRNGKeyArray

Layers: TypeAlias = Sequence[Sequence[str]]
Tune: TypeAlias = Literal["head", "all"] | int
"""The trained part: "head", the head alone; n, the last n blocks with all layers after them; "all", everything."""

HEAD = "head/**"
"""The path of every classifier's head: one affine layer, kernel [d, classes] and bias."""
UNDECAYED = tuple(f"**/{name}" for name in ("positions", "cls", "distillation", "registers", "mask_token"))
"""Tokens and position tables without weight decay, like biases and norms (timm's no_weight_decay)."""


def depths(paths: Iterable[str], layers: Layers) -> dict[str, int]:
    """Slash path -> the index of its layer. Raises MmjaxError for a path in none."""
    depth_by_path: dict[str, int] = {}
    for path in paths:
        inside = (i for i, globs in enumerate(layers) if any(tree.matches(path, glob) for glob in globs))
        depth = next(inside, None)
        if depth is None:
            raise MmjaxError(f"{path} is in no layer")
        depth_by_path[path] = depth
    return depth_by_path


def partition(params: Params, layers: Layers, tune: Tune) -> Partition:
    """The partition that trains the part `tune` and freezes the rest. params: without the head.

    Raises MmjaxError for more blocks than the network has, or fewer than one.
    """
    blocks = len(layers) - 2
    if tune == "all":
        return Partition()
    if tune == "head":
        frozen = [glob for globs in layers for glob in globs if glob != HEAD]
    elif isinstance(tune, int) and 1 <= tune <= blocks:
        frozen = [glob for globs in layers[: 1 + blocks - tune] for glob in globs]
    else:
        raise MmjaxError(f"tune={tune}: head, all, or the last 1 to {blocks} blocks of this network")
    paths = tree.flatten(params)
    used = [glob for glob in frozen if any(tree.matches(path, glob) for path in paths)]
    return Partition(dict.fromkeys(used, FROZEN))


def tuning_optimizer(
    learning_rate: Schedule,
    layers: Layers,
    tuned: Partition,
    *,
    weight_decay: float,
    decay: float = 1.0,
    clip_norm: float | None = 1.0,
) -> Optimizer:
    """AdamW whose rate falls by `decay` a layer, from the head down to the embeddings (BEiT, arXiv 2106.08254)."""
    if not 0 < decay <= 1:
        raise MmjaxError(f"layer_decay={decay}: above 0 and at most 1, which is none")
    chain = adamw(learning_rate, weight_decay, mask=excluding(*UNDECAYED))
    if decay < 1:
        scale = layer_decay(decay, lambda path: depths([path], layers)[path], len(layers) - 1)
        chain = optax.chain(chain, scale)
    return Optimizer(chain, tuned, clip_norm)


@dataclasses.dataclass(frozen=True)
class StoredStatistics:
    """A classifier that always runs in evaluation mode: batch normalisation uses the stored statistics, which do not
    change, and there is no dropout. A frozen layer after one that normalises by the batch would not be the same layer.
    """

    classifier: Classifier

    def init(self, rng: PRNGKeyArray, pixels: Float[Array, "b height width 3"]) -> tuple[Params, Params]:
        return self.classifier.init(rng, pixels)

    def logits(
        self,
        params: Params,
        stats: Params,
        pixels: Float[Array, "b height width 3"],
        *,
        train: bool,
        rng: PRNGKeyArray | None = None,
        bn_groups: int = 1,
        axis_name: str | None = None,
    ) -> tuple[Float[Array, "b classes"], Params]:
        return self.classifier.logits(params, stats, pixels, train=False)


@dataclasses.dataclass(frozen=True)
class HeadOnFeatures:
    """A classifier that computes only its head, from features instead of images.

    Frozen layers give the same features in every epoch: they are computed once.

    Attributes:
        classifier: the whole network, to which the parameters belong.
        size: (height, width) of its images.
    """

    classifier: Classifier
    size: tuple[int, int]

    def init(self, rng: PRNGKeyArray, pixels: Float[Array, "b d"]) -> tuple[Params, Params]:
        return self.classifier.init(rng, jnp.zeros((1, *self.size, 3), jnp.float32))

    def logits(
        self,
        params: Params,
        stats: Params,
        pixels: Float[Array, "b d"],
        *,
        train: bool,
        rng: PRNGKeyArray | None = None,
        bn_groups: int = 1,
        axis_name: str | None = None,
    ) -> tuple[Float[Array, "b classes"], Params]:
        return pixels @ params["head"]["kernel"] + params["head"]["bias"], stats
