"""Mixup and CutMix: each example is mixed with its neighbour in the batch, images and soft labels alike; on the device.

The neighbour is the example before it in the *global* batch, so every way to cut the batch over devices mixes the same
pairs: under `pmap` one example is sent from each device to the next.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.types import Array, Bool, Float, Int, PRNGKeyArray

MIXUP, CUTMIX = "mixup", "cutmix"
"""The hyper-parameters that hold the two alphas: they can be changed without a recompile."""


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How batches are mixed, sampled once a batch. `Mixing()` mixes nothing and is false.

    Attributes:
        mixup: alpha of mixup's Beta(alpha, alpha); 0 leaves mixup out (arXiv 1710.09412).
        cutmix: alpha of CutMix's; 0 leaves it out (arXiv 1905.04899). With both, a fair coin picks one for each batch
            (torchvision's `RandomChoice`, DeiT's switch_prob 0.5).
        keep_larger: the larger share stays with the example itself, as big_vision mixes; else either may get it.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    keep_larger: bool = False

    def __post_init__(self) -> None:
        if not (self.mixup >= 0 and self.cutmix >= 0):
            raise MmjaxError(f"mixup={self.mixup}, cutmix={self.cutmix}: alphas are 0 (off) or positive")

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def hparams(self) -> dict[str, Float[Array, ""]]:
        """The positive alphas, for `Carry.hparams`."""
        alphas = {MIXUP: self.mixup, CUTMIX: self.cutmix}
        return {name: jnp.float32(alpha) for name, alpha in alphas.items() if alpha > 0}

    def __call__(
        self,
        rng: PRNGKeyArray,
        images: Float[Array, "b height width c"],
        targets: Float[Array, "b classes"],
        hparams: Mapping[str, Float[Array, ""]],
        axis_name: str | None = None,
    ) -> tuple[Float[Array, "b height width c"], Float[Array, "b classes"]]:
        """Mixed images and mixed soft labels. Call it only where `bool(mixing)` is true.

        rng: the same on every device.
        hparams: see `hparams`; the alphas are read from there, and 0 leaves a batch as it is.
        """
        choice_rng, beta_rng, box_rng = jax.random.split(rng, 3)
        other, other_targets = previous(images, axis_name), previous(targets, axis_name)

        def share_of(alpha: Array) -> Array:
            sampled = jax.random.beta(beta_rng, jnp.maximum(alpha, 1e-3), jnp.maximum(alpha, 1e-3))
            sampled = jnp.maximum(sampled, 1 - sampled) if self.keep_larger else sampled
            return jnp.where(alpha > 0, sampled, 1.0)

        def mixup() -> tuple[Array, Array]:
            share = share_of(hparams[MIXUP])
            return blend(images, other, share), share

        def cutmix() -> tuple[Array, Array]:
            inside, share = cut_box(box_rng, images.shape[1], images.shape[2], share_of(hparams[CUTMIX]))
            return jnp.where(inside[None, :, :, None], other, images), share

        if self.mixup > 0 and self.cutmix > 0:
            mixed, share = jax.lax.cond(jax.random.bernoulli(choice_rng), cutmix, mixup)
        else:
            mixed, share = cutmix() if self.cutmix > 0 else mixup()
        return mixed, blend(targets, other_targets, share)


def previous(x: Float[Array, "b ..."], axis_name: str | None = None) -> Float[Array, "b ..."]:
    """The global batch rolled by one: example i of the result is example i - 1, and the last one comes first."""
    if axis_name is None:
        return jnp.roll(x, 1, axis=0)
    size = jax.lax.axis_size(axis_name)
    first = jax.lax.ppermute(x[-1:], axis_name, [(i, (i + 1) % size) for i in range(size)])
    return jnp.concatenate([first, x[:-1]])


def blend(x: Float[Array, "..."], other: Float[Array, "..."], share: Float[Array, ""]) -> Float[Array, "..."]:
    """share x + (1 - share) other, in x's dtype."""
    return (share * x + (1 - share) * other).astype(x.dtype)


def cut_box(
    rng: PRNGKeyArray, height: int, width: int, share: Float[Array, ""]
) -> tuple[Bool[Array, "height width"], Float[Array, ""]]:
    """The mask of the other image in CutMix, and the share of pixels that remain of the image itself.

    A box of the image's shape and 1 - share of its area, centred anywhere and cut off at the border (torchvision
    `references/classification/transforms.py`).
    """
    row_rng, column_rng = jax.random.split(rng)
    half = 0.5 * jnp.sqrt(1 - share)
    rows = _interval(jax.random.randint(row_rng, (), 0, height), half, height)
    columns = _interval(jax.random.randint(column_rng, (), 0, width), half, width)
    inside = rows[:, None] & columns[None, :]
    return inside, 1 - jnp.mean(inside, dtype=jnp.float32)


def _interval(centre: Int[Array, ""], half: Float[Array, ""], length: int) -> Bool[Array, "length"]:
    radius = jnp.floor(half * length).astype(jnp.int32)
    positions = jnp.arange(length)
    return (positions >= centre - radius) & (positions < centre + radius)
