"""Colour operations of one image [height, width, 3] in [0, 1], by torchvision's formulas on PIL images.

PIL rounds to 1/255 after every operation, and contrast's mean too; here all is float.
"""

import jax
import jax.numpy as jnp

from mmjax.types import Array, Float, Int, PRNGKeyArray

Image = Float[Array, "height width 3"]
Scalar = Float[Array, ""] | float

LUMA = (0.299, 0.587, 0.114)
"""PIL's convert("L"): ITU-R 601-2."""


def grey(image: Image) -> Float[Array, "height width 1"]:
    """Luminance. A sum of products, not a matmul: three terms are no work for one."""
    return sum(weight * image[..., i : i + 1] for i, weight in enumerate(LUMA))  # type: ignore[return-value]


def to_grey(image: Image) -> Image:
    """Luminance in all three channels."""
    return jnp.broadcast_to(grey(image), image.shape)


def blend(image: Image, other: Float[Array, "#height #width #c"] | float, factor: Scalar) -> Image:
    """`factor` of the image, the rest of `other`, clipped; above 1 it moves away from `other` (PIL: ImageEnhance)."""
    return jnp.clip(factor * image + (1 - factor) * other, 0.0, 1.0)


def brightness(image: Image, factor: Scalar) -> Image:
    """0 is black, 1 the image."""
    return blend(image, 0.0, factor)


def contrast(image: Image, factor: Scalar) -> Image:
    """0 is the mean luminance everywhere."""
    return blend(image, jnp.mean(grey(image)), factor)


def saturation(image: Image, factor: Scalar) -> Image:
    """0 is grey."""
    return blend(image, grey(image), factor)


def hue(image: Image, shift: Scalar) -> Image:
    """Turns the hue by a share of the circle; saturation and value (HSV) stay."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    span = jnp.where(chroma > 0, chroma, 1.0)
    sixth = jnp.where(
        value == red,
        (green - blue) / span,
        jnp.where(value == green, 2.0 + (blue - red) / span, 4.0 + (red - green) / span),
    )

    def channel(start: float) -> Array:
        k = jnp.mod(start + sixth + 6.0 * shift, 6.0)
        return value - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)

    return jnp.stack([channel(5.0), channel(3.0), channel(1.0)], axis=-1)


def solarise(image: Image, threshold: float = 128 / 255) -> Image:
    """Inverts what is at least as bright as the threshold."""
    return jnp.where(image >= threshold, 1.0 - image, image)


def colour_jitter(
    image: Image, factors: Float[Array, "3"], shift: Scalar, order: Int[Array, "3"], hue_at: Array | int
) -> Image:
    """Brightness, contrast, saturation and hue in any order.

    Hue, the expensive one, is computed once. The other three are blends, before or after it: see `hue_at`.

    Args:
        factors: of brightness, contrast, saturation.
        order: a permutation of 0, 1, 2: the order of these three.
        hue_at: the number of them before hue.
    """

    def some(image: Image, chosen: Array, step: int) -> Image:
        kind = order[step]
        luminance = grey(image)
        other = jnp.where(kind == 0, 0.0, jnp.where(kind == 1, jnp.mean(luminance), luminance))
        return jnp.where(chosen, blend(image, other, factors[kind]), image)

    for step in range(3):
        image = some(image, jnp.asarray(step < hue_at), step)
    image = hue(image, shift)
    for step in range(3):
        image = some(image, jnp.asarray(step >= hue_at), step)
    return image


def random_colour_jitter(key: PRNGKeyArray, image: Image, strengths: tuple[float, float, float, float]) -> Image:
    """torchvision's ColorJitter(*strengths): factors uniform in 1 +- strength, the hue's shift in +- strength, and
    each of the 24 orders as likely."""
    factor_key, shift_key, order_key, place_key = jax.random.split(key, 4)
    spread = jnp.asarray(strengths[:3])
    factors = jax.random.uniform(factor_key, (3,), minval=jnp.maximum(1 - spread, 0), maxval=1 + spread)
    shift = jax.random.uniform(shift_key, (), minval=-strengths[3], maxval=strengths[3])
    order = jax.random.permutation(order_key, 3)
    return colour_jitter(image, factors, shift, order, jax.random.randint(place_key, (), 0, 4))
