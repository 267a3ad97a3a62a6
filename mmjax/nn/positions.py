"""Position tables of image tokens: fixed ones, and the interpolation of learned ones to another grid.

Every library has its own rule for the interpolation, and they differ by more than rounding; `Rule` names them. All are
linear and separable: a matrix for the rows, one for the columns, computed on the host.
"""

from typing import Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mmjax.errors import MmjaxError
from mmjax.types import Array, Float

Rule: TypeAlias = Literal["bicubic", "bicubic_antialias", "bilinear", "endpoints", "dinov2"]
"""bicubic            torch, a = -0.75, four taps even when shrinking: ALBEF, BLIP, EVA, Hugging Face's ViT and Dinov2
bicubic_antialias  torch with antialias, a = -0.5, wider when shrinking: open_clip, recent timm, DINOv2 with registers
bilinear           torch, not widened when shrinking: timm 0.4, and recent timm for .npz files
endpoints          linear, first and last points coincide (scipy's zoom of order 1): Google's ViT, big_vision
dinov2             the first, but coordinates scaled by (new + 0.1) / old: the original DINOv2 without registers
"""

Table: TypeAlias = Literal["moco_v3", "big_vision"]


def interpolate(
    table: Float[Array, "*one n d"], old: tuple[int, int], new: tuple[int, int], rule: Rule, prefix: int = 0
) -> Float[Array, "*one m d"]:
    """A table of a grid `old` (rows, columns), in row-major order, interpolated to the grid `new`; float32 arithmetic.

    prefix: leading rows of class tokens, which do not change.
    Raises MmjaxError if the table's length is not prefix + rows * columns.
    """
    if table.shape[-2] != prefix + old[0] * old[1]:
        raise MmjaxError(f"a table of {table.shape[-2]} positions is not {prefix} and a grid of {old[0]} x {old[1]}")
    if old == new:
        return table
    grid = rearrange(table[..., prefix:, :].astype(jnp.float32), "... (h w) d -> ... h w d", h=old[0])
    rows, columns = (jnp.asarray(resize_matrix(o, n, rule)) for o, n in zip(old, new))
    resized = jnp.einsum("rh,...hwd,cw->...rcd", rows, grid, columns, precision="highest")
    resized = rearrange(resized, "... r c d -> ... (r c) d").astype(table.dtype)
    return jnp.concatenate([table[..., :prefix, :], resized], axis=-2)


def resize_matrix(old: int, new: int, rule: Rule) -> np.ndarray:
    """The weight of each old point of an axis in each new one, float32 [new, old]."""
    if rule == "bicubic_antialias":
        return _antialiased(old, new)
    points = np.arange(new, dtype=np.float64)
    if rule == "endpoints":
        source = points * ((old - 1) / max(new - 1, 1))
    else:
        scale = (new + 0.1) / old if rule == "dinov2" else new / old
        source = (points + 0.5) / scale - 0.5
    if rule in ("bilinear", "endpoints"):
        source = np.clip(source, 0, old - 1)
        taps, weight = (0, 1), lambda distance: np.maximum(1 - distance, 0)
    elif rule in ("bicubic", "dinov2"):
        taps, weight = (-1, 0, 1, 2), lambda distance: _cubic(distance, -0.75)
    else:
        raise MmjaxError(f"interpolation rule {rule!r}: choose bicubic, bicubic_antialias, bilinear, endpoints, dinov2")
    first = np.floor(source)
    matrix = np.zeros((new, old))
    for tap in taps:
        index = np.clip(first + tap, 0, old - 1).astype(int)  # beyond the border: the border's own value
        np.add.at(matrix, (np.arange(new), index), weight(np.abs(source - (first + tap))))
    return matrix.astype(np.float32)


def _antialiased(old: int, new: int) -> np.ndarray:
    width = max(old / new, 1.0)
    centre = (np.arange(new)[:, None] + 0.5) * (old / new)
    weights = _cubic(np.abs(np.arange(old) + 0.5 - centre) / width, -0.5)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981) at non-negative distances."""
    x = distance
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def sincos_2d(grid: tuple[int, int], width: int, table: Table) -> np.ndarray:
    """A fixed table, float32 [1, rows * columns, width]: a quarter each of sin, cos of one axis, sin, cos of the other.

    "moco_v3": rows first (its meshgrid is indexed that way), wave lengths 10000^(k / q), q = width / 4 (vits.py).
    "big_vision": columns first, 10000^(k / (q - 1)) (models/vit.py, posemb_sincos_2d).
    Raises MmjaxError for a width that is not a multiple of four.
    """
    if width % 4:
        raise MmjaxError(f"a sine-cosine table of width {width}: should be a multiple of 4")
    quarter = width // 4
    steps = quarter if table == "moco_v3" else quarter - 1
    omega = 1.0 / 10000 ** (np.arange(quarter) / steps)
    rows, columns = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    axes = (rows, columns) if table == "moco_v3" else (columns, rows)
    angles = [axis.reshape(-1, 1) * omega for axis in axes]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)[None].astype(np.float32)
