"""Sinusoidal positions of tokens: three tables of one name, which are not interchangeable.

The wrong one raises nothing and gives wrong numbers. All begin at position 0; padding does not shift them.
"""

from typing import Literal, TypeAlias

import numpy as np

from mmjax.errors import MmjaxError
from mmjax.types import Float

Layout: TypeAlias = Literal["interleaved", "concatenated", "tensor2tensor"]
"""interleaved    channel 2k sin, channel 2k + 1 cos, of pos * 10000^(-2k / d): the paper (1706.03762, section 3.5)
concatenated   the same numbers, all sines before all cosines: Marian (transformers, modeling_marian.py create_weight)
tensor2tensor  sines before cosines, of pos * 10000^(-k / (d / 2 - 1)): tensor2tensor and ports of it
"""


def sinusoids(length: int, width: int, layout: Layout = "interleaved") -> Float[np.ndarray, "l d"]:
    """float32, from float64 angles: float32 ones lose about 1e-4 at position 1000.

    An odd width has one sine more than cosines; tensor2tensor's table leaves its last channel 0.
    Raises MmjaxError for an unknown layout, or a width too small to have frequencies.
    """
    positions = np.arange(length, dtype=np.float64)[:, None]
    if layout == "tensor2tensor":
        if width < 4:
            raise MmjaxError(f"tensor2tensor's sinusoids of width {width}: should be at least 4")
        angles = positions * 10000.0 ** (-np.arange(width // 2) / (width // 2 - 1))
        return np.concatenate([np.sin(angles), np.cos(angles), np.zeros((length, width % 2))], 1).astype(np.float32)
    if layout not in ("interleaved", "concatenated"):
        raise MmjaxError(f"sinusoids {layout!r}: choose interleaved, concatenated, tensor2tensor")
    # A quotient, as the originals write it, and so equal to theirs to the last bit.
    angles = positions / np.power(10000, 2 * (np.arange(width) // 2) / width)
    sines, cosines = np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])
    if layout == "concatenated":
        return np.concatenate([sines, cosines], 1).astype(np.float32)
    table = np.empty((length, width), np.float32)
    table[:, 0::2], table[:, 1::2] = sines, cosines
    return table
