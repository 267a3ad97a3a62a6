"""Random views of images, made on the device: the published pipelines of MoCo v1-v3, CLIP and supervised training.

    method = Augmented(MoCo(...), two_views(View.moco_v2(224), View.moco_v2(224)))

Each image is changed by its own key alone, shapes are fixed, and everything is compiled into the step. Resizing and
blurring are products with matrices built from the sampled box or radius: fast on every backend, also under `vmap`.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from mmjax.channels import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from mmjax.errors import MmjaxError
from mmjax.training import augment_color as color
from mmjax.training.augment_color import Image, Scalar
from mmjax.training.method import Augment
from mmjax.types import Array, Batch, Bool, Float, PRNGKeyArray

TRIES = 10
"""How many boxes torchvision samples before it gives up. The crop is then the whole image, cut to the nearest ratio."""
REACH = 4
"""Gaussian kernels end at this many standard deviations; 6e-5 of their weight lies beyond."""


def draw_box(
    key: PRNGKeyArray,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    fits: Callable[[Array, Array], Array],
) -> tuple[Float[Array, "4"], Bool[Array, ""]]:
    """The first of TRIES random boxes that fits, (top, left, height, width) in pixels, and whether there is one.

    Args:
        size: (height, width) of the image. scale: share of its area. ratio: width / height, log-uniform.
        fits: (heights, widths) -> which of the boxes are allowed.
    """
    height, width = size
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    area = height * width * jax.random.uniform(area_key, (TRIES,), minval=scale[0], maxval=scale[1])
    low, high = jnp.log(jnp.asarray(ratio))
    aspect = jnp.exp(jax.random.uniform(ratio_key, (TRIES,), minval=low, maxval=high))
    widths, heights = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    allowed = fits(heights, widths)
    first = jnp.argmax(allowed)
    h, w = heights[first], widths[first]
    top = jnp.floor(jax.random.uniform(top_key) * (height - h + 1))
    left = jnp.floor(jax.random.uniform(left_key) * (width - w + 1))
    return jnp.stack([jnp.minimum(top, height - h), jnp.minimum(left, width - w), h, w]), jnp.any(allowed)


def random_box(
    key: PRNGKeyArray, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Float[Array, "4"]:
    """(top, left, height, width) in pixels: torchvision's `RandomResizedCrop.get_params`. Arguments: see `draw_box`."""
    height, width = size

    def inside(heights: Array, widths: Array) -> Array:
        return (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)

    box, is_valid = draw_box(key, size, scale, ratio, inside)
    return jnp.where(is_valid, box, jnp.asarray(_whole(height, width, ratio)))


def _whole(height: int, width: int, ratio: tuple[float, float]) -> tuple[float, float, float, float]:
    """The largest central box within the ratios."""
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return float((height - h) // 2), float((width - w) // 2), float(h), float(w)


def resample_matrix(
    start: Scalar, length: Scalar, old: int, new: int, filter: Literal["bilinear", "bicubic"]
) -> Float[Array, "new old"]:
    """The matrix that resizes the pixels [start, start + length) of `old` to `new`, by PIL's rule.

    The filter (triangle; Keys' cubic with a = -0.5) is widened by length / new where it shrinks, so that nothing
    aliases; pixels outside the box count nothing, and the weights of each new pixel sum to one.
    """
    step = length / new
    centre = start + (jnp.arange(new) + 0.5)[:, None] * step
    positions = jnp.arange(old)[None]
    distance = jnp.abs(positions + 0.5 - centre) / jnp.maximum(step, 1.0)
    weights = jnp.maximum(1 - distance, 0.0) if filter == "bilinear" else _cubic(distance)
    weights = jnp.where((positions >= start) & (positions < start + length), weights, 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _cubic(x: Array) -> Array:
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def _both_axes(rows: Float[Array, "new_h h"], columns: Float[Array, "new_w w"], image: Image) -> Array:
    return jnp.einsum("yh,hwc,xw->yxc", rows, image, columns, optimize=[(0, 1), (0, 1)])


def resized_crop(
    image: Image, box: Float[Array, "4"], size: int, filter: Literal["bilinear", "bicubic"] = "bilinear"
) -> Float[Array, "size size 3"]:
    """The box (top, left, height, width) of an image, resized to `size` x `size`.

    The overshoot of bicubic is clipped once; PIL clips and rounds after each axis.
    """
    top, left, height, width = box
    rows = resample_matrix(top, height, image.shape[0], size, filter)
    columns = resample_matrix(left, width, image.shape[1], size, filter)
    part = _both_axes(rows, columns, image)
    return jnp.clip(part, 0.0, 1.0) if filter == "bicubic" else part


def blur_matrix(sigma: Scalar, size: int, largest: float) -> Float[Array, "size size"]:
    """The matrix of a Gaussian filter along one axis; the border pixel is repeated beyond the border, as in PIL.

    largest: the largest sigma possible; it determines the size of the kernel.
    """
    radius = int(REACH * largest + 0.5)
    offsets = jnp.arange(-radius, radius + 1)
    weights = jnp.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / jnp.sum(weights)
    source = jnp.clip(jnp.arange(size)[:, None] + offsets, 0, size - 1)
    one_hot = source[:, :, None] == jnp.arange(size)
    return jnp.einsum("o,yos->ys", weights, one_hot.astype(jnp.float32))


def gaussian_blur(image: Image, sigma: Scalar, largest: float = 2.0) -> Image:
    """A true Gaussian of standard deviation `sigma` pixels; PIL's GaussianBlur(sigma) is three box filters near it."""
    height, width = image.shape[:2]
    rows = blur_matrix(sigma, height, largest)
    columns = rows if width == height else blur_matrix(sigma, width, largest)
    return _both_axes(rows, columns, image)


@dataclasses.dataclass(frozen=True)
class View:
    """One random view: (key, image) -> normalised pixels float32 [size, size, 3].

    The order is torchvision's of the originals: crop, jitter and grey (or grey first), blur, solarise, flip, normalise.

    Attributes:
        size: side of the result.
        scale, ratio, filter: of the random resized crop.
        jitter, jitter_p: strengths (brightness, contrast, saturation, hue), and the probability.
        grey_p, grey_first: the probability of greyscale, and whether it precedes the jitter (MoCo v1).
        blur_p, blur_sigma: the probability of a blur, and the range of sigma, in pixels.
        solarise_p, flip_p: probabilities.
        mean, std: of the channels in [0, 1].
    """

    size: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    filter: Literal["bilinear", "bicubic"] = "bilinear"
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.0
    grey_p: float = 0.0
    grey_first: bool = False
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise_p: float = 0.0
    flip_p: float = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @classmethod
    def moco_v1(cls, size: int = 224) -> "View":
        """moco main_moco.py:345-354."""
        return cls(size, jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, grey_p=0.2, grey_first=True)

    @classmethod
    def moco_v2(cls, size: int = 224) -> "View":
        """moco main_moco.py:328-344 (--aug-plus)."""
        return cls(size, jitter_p=0.8, grey_p=0.2, blur_p=0.5)

    @classmethod
    def moco_v3_1(cls, size: int = 224, crop_min: float = 0.2) -> "View":
        """moco-v3 main_moco.py:262-272; crop_min is 0.08 for ViT."""
        return cls(size, (crop_min, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, grey_p=0.2, blur_p=1.0)

    @classmethod
    def moco_v3_2(cls, size: int = 224, crop_min: float = 0.2) -> "View":
        """moco-v3 main_moco.py:274-285."""
        return dataclasses.replace(cls.moco_v3_1(size, crop_min), blur_p=0.1, solarise_p=0.2)

    @classmethod
    def clip(cls, size: int = 224) -> "View":
        """open_clip transform.py: a bicubic crop of 0.9 to 1 of the area, no flip."""
        return cls(size, (0.9, 1.0), filter="bicubic", flip_p=0.0, mean=CLIP_MEAN, std=CLIP_STD)

    @classmethod
    def supervised(cls, size: int = 224) -> "View":
        """The crop and flip of ImageNet classifiers and linear probes."""
        return cls(size, (0.08, 1.0))

    def __call__(self, key: PRNGKeyArray, image: Array) -> Float[Array, "size size 3"]:
        """image: uint8 [height, width, 3], or float in [0, 1]. Operations that never happen are not computed."""
        # Each stage has one key that decides whether it is applied, and one for its parameters. They come from a split,
        # so that neither is a fold of the other.
        pairs = {name: jax.random.split(jax.random.fold_in(key, i)) for i, name in enumerate(STAGES)}
        chances, keys = ({name: pair[i] for name, pair in pairs.items()} for i in range(2))
        box = random_box(keys["crop"], image.shape[:2], self.scale, self.ratio)  # type: ignore[arg-type]
        x = resized_crop(to_unit(image), box, self.size, self.filter)

        def sometimes(x: Image, name: str, p: float, changed: Image) -> Image:
            return jnp.where(jax.random.bernoulli(chances[name], p), changed, x)

        if self.grey_first and self.grey_p:
            x = sometimes(x, "grey", self.grey_p, color.to_grey(x))
        if self.jitter_p:
            x = sometimes(x, "jitter", self.jitter_p, color.random_colour_jitter(keys["jitter"], x, self.jitter))
        if self.grey_p and not self.grey_first:
            x = sometimes(x, "grey", self.grey_p, color.to_grey(x))
        if self.blur_p:
            low, high = self.blur_sigma
            sigma = jax.random.uniform(keys["blur"], (), minval=low, maxval=high)
            # The rare plain image is blurred by an identity: one matrix is chosen, not two images computed.
            sigma = jnp.where(jax.random.bernoulli(chances["blur"], self.blur_p), sigma, 1e-3)
            x = gaussian_blur(x, sigma, high)
        if self.solarise_p:
            x = sometimes(x, "solarise", self.solarise_p, color.solarise(x))
        if self.flip_p:
            x = sometimes(x, "flip", self.flip_p, x[:, ::-1])
        return (x - jnp.asarray(self.mean)) / jnp.asarray(self.std)


STAGES = ("crop", "grey", "jitter", "blur", "solarise", "flip")
"""Each has a key of its own: leaving one out does not change the draws of the others."""


def to_unit(image: Array) -> Float[Array, "height width 3"]:
    """uint8 -> float32 in [0, 1]; floats are assumed to be in it already."""
    return image.astype(jnp.float32) / 255.0 if image.dtype == jnp.uint8 else image.astype(jnp.float32)


def one_view(view: View, name: str = "image") -> Augment:
    """For `Augmented`: batch[name] [b, height, width, 3] -> its view, under the same name."""

    def augment(keys: Array, batch: Batch) -> Batch:
        return {**batch, name: jax.vmap(view)(keys, _images(batch, name))}

    return augment


def two_views(first: View, second: View, name: str = "image") -> Augment:
    """For `Augmented`: batch[name] is replaced by "view_1" and "view_2", sampled independently of each other."""

    def augment(keys: Array, batch: Batch) -> Batch:
        images = _images(batch, name)
        views = {}
        for i, view in enumerate((first, second), 1):
            views[f"view_{i}"] = jax.vmap(view)(jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys), images)
        return {key: value for key, value in batch.items() if key != name} | views

    return augment


def _images(batch: Batch, name: str) -> Array:
    """Raises MmjaxError if the batch has no images under that name."""
    if name not in batch or batch[name].ndim != 4:
        raise MmjaxError(f"augmentation wants batch[{name!r}] [b, height, width, 3]; the batch has {sorted(batch)}")
    return batch[name]
