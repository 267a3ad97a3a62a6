"""Rotary positions (Su et al. 2021) in the half-rotation form of LLaMA and GPT-NeoX: channel i turns with i + p / 2."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

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
class Rotary:
    """Angles by position.

    Attributes:
        theta: base of the wavelengths.
        share: of a head's channels that turn; the rest pass (GPT-NeoX: 0.25).
        factor: positions are divided by it (linear scaling; Vicuna 16k: 4).
        llama3: the other scaling; None: there is none.
    """

    theta: float = 10_000.0
    share: float = 1.0
    factor: float = 1.0
    llama3: Llama3Scaling | None = None

    def channels(self, head_width: int) -> int:
        """How many channels of a head turn."""
        return int(head_width * self.share)

    def frequencies(self, head_width: int) -> np.ndarray:
        """Radians a position, float32 [channels / 2]."""
        channels = self.channels(head_width)
        frequency = 1.0 / self.theta ** (np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels))
        if self.llama3 is not None:
            told = self.llama3
            turns = told.length * frequency / (2 * math.pi)
            kept = np.clip((turns - told.low) / (told.high - told.low), 0, 1)
            frequency = frequency * (kept + (1 - kept) / told.factor)
        return (frequency / self.factor).astype(np.float32)

    def turns(self, positions: Int[Array, "*b"], head_width: int) -> tuple[Float[Array, "*b k"], Float[Array, "*b k"]]:
        """(cosines, sines), float32, of the channels' first half."""
        angles = positions[..., None].astype(jnp.float32) * self.frequencies(head_width)
        return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "*b h k"], cosines: Float[Array, "*b p"], sines: Float[Array, "*b p"]
) -> Float[Array, "*b h k"]:
    """Queries or keys turned by their positions; channels beyond 2 p pass."""
    cosines, sines = (table[..., None, :].astype(x.dtype) for table in (cosines, sines))
    half = cosines.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cosines - second * sines, second * cosines + first * sines, rest], -1)
