"""Rotary positions (Su et al. 2021) in the half-rotation form of LLaMA and GPT-NeoX.

Channels i and i + p / 2 rotate together.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.types import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Longer contexts by slower low frequencies (LLaMA 3.1; transformers' rope_type "llama3").

    Wavelengths above length / low are `factor` times as long, those below length / high stay; linear between.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    length: int = 8192


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Longer contexts by channel (Peng et al. 2023; transformers' rope_type "yarn").

    Channels with more than `fast` rotations within `length` positions are unchanged. Those with fewer than `slow`
    rotate `factor` times as slowly. Between them it is linear in the channel's index, `truncate`d to whole ones.
    attention: cosines and sines are multiplied by it.
    """

    factor: float
    length: int
    attention: float
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class LongRope:
    """Longer contexts by a factor a channel (Ding et al. 2024; transformers' rope_type "longrope", Phi-3 128k).

    Wavelengths are `short` times as long in sequences of up to `length` tokens, and `long` times in longer ones, at all
    their positions: keys rotated one way and queries rotated the other do not match. transformers chooses at every
    forward pass, by the largest position of the batch. A generation that grows past `length` recomputes its whole text
    there, once, and continues with other keys than before. Here a generation keeps its first choice: `long` where its
    longest prompt and all but the last of `max_new_tokens` are more than `length`. It differs from transformers where a
    generation crosses `length`, and nowhere else.

    attention: cosines and sines are multiplied by it.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    length: int
    attention: float


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Angles by position.

    Attributes:
        theta: base of the wavelengths.
        share: of a head's channels that are rotated; the rest pass unchanged (GPT-NeoX: 0.25).
        factor: positions are divided by it (linear scaling; Vicuna 16k: 4).
        llama3, yarn, longrope: other scalings, at most one of them.
    """

    theta: float = 10_000.0
    share: float = 1.0
    factor: float = 1.0
    llama3: Llama3Scaling | None = None
    yarn: YarnScaling | None = None
    longrope: LongRope | None = None

    def channels(self, head_width: int) -> int:
        """The number of rotated channels of a head."""
        return int(head_width * self.share)

    def frequencies(self, head_width: int, long: bool = False) -> np.ndarray:
        """Radians a position, float32 [channels / 2]. long: of LongRope's longer sequences.

        Raises MmjaxError where LongRope has factors for another number of channels.
        """
        channels = self.channels(head_width)
        frequency = 1.0 / self.theta ** (np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels))
        if self.llama3 is not None:
            scaling = self.llama3
            cycles = scaling.length * frequency / (2 * math.pi)
            share = np.clip((cycles - scaling.low) / (scaling.high - scaling.low), 0, 1)
            frequency = frequency * (share + (1 - share) / scaling.factor)
        if self.yarn is not None:
            share = _unscaled_share(self.yarn, self.theta, channels)
            frequency = frequency * (share + (1 - share) / self.yarn.factor)
        if self.longrope is not None:
            factors = self.longrope.long if long else self.longrope.short
            if len(factors) != len(frequency):
                raise MmjaxError(f"LongRope of {len(factors)} factors, where {len(frequency)} pairs of channels turn")
            frequency = frequency / np.asarray(factors, np.float32)
        return (frequency / self.factor).astype(np.float32)

    def rope(
        self, positions: Int[Array, "*b"], head_width: int, length: int | Int[Array, ""]
    ) -> tuple[Float[Array, "*b k"], Float[Array, "*b k"]]:
        """(cosines, sines), float32, of the channels' first half. length: of the whole sequence, for LongRope."""
        frequency, scale = self.frequencies(head_width), 1.0
        if self.longrope is not None:
            scale = self.longrope.attention
            frequency = jnp.where(length > self.longrope.length, self.frequencies(head_width, True), frequency)
        if self.yarn is not None:
            scale = self.yarn.attention
        angles = positions[..., None].astype(jnp.float32) * frequency
        return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _unscaled_share(scaling: YarnScaling, theta: float, channels: int) -> np.ndarray:
    """The share of its frequency that each pair of channels keeps, [channels / 2] in 0 .. 1."""
    ends = [
        channels * math.log(scaling.length / (cycles * 2 * math.pi)) / (2 * math.log(theta))
        for cycles in (scaling.fast, scaling.slow)
    ]
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if scaling.truncate else ends
    low, high = max(low, 0), min(high, channels - 1)
    ramp = (np.arange(channels // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    return 1 - np.clip(ramp, 0, 1)


def rotate(
    x: Float[Array, "*b h k"], cosines: Float[Array, "*b p"], sines: Float[Array, "*b p"]
) -> Float[Array, "*b h k"]:
    """Queries or keys turned by their positions; channels beyond 2 p pass."""
    cosines, sines = (table[..., None, :].astype(x.dtype) for table in (cosines, sines))
    half = cosines.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cosines - second * sines, second * cosines + first * sines, rest], -1)
