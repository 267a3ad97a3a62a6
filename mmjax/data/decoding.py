"""Untrusted bytes -> RGB pixels and captions, or a `BadRecord` with a short reason.

The rules, for images:
  - JPEG, PNG, GIF, WebP, BMP, TIFF and PPM are read; nothing else is even tried (EPS would start a program).
  - The size is taken from the header; more than `max_pixels` is refused before a pixel is decoded.
  - EXIF orientation is applied; palettes, greys, CMYK and 16 bit become 8-bit RGB; transparency is laid on white.
  - Animations, and 32-bit integer or float pixels (they have no agreed range), are refused.
For captions: UTF-8 only (a byte-order mark is dropped), control characters become spaces, surrounding space goes;
what is then empty or longer than `max_characters` is refused.
"""

import http.client
import io
import os
import pathlib
import struct
import threading
import urllib.request
import warnings
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mmjax.errors import MmjaxError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
MAX_PIXELS = 50_000_000
"""150 MB of RGB; Pillow itself only warns below 179 million."""
MAX_BYTES = 50_000_000
TIMEOUT = 20
"""Of downloads: bytes, and seconds without an answer."""
MAX_CHARACTERS = 10_000
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ANIMATED = ("GIF", "WEBP", "PNG")

_warnings_lock = threading.Lock()


class BadRecord(MmjaxError):
    """One record that cannot be used; a pipeline skips and counts it.

    Attributes:
        reason: one of a few fixed phrases, to count by: "image: truncated", "caption: empty" ...
        name: the record: file, or shard and member. The pipeline fills it in where it is empty.
        detail: the exact problem.
    """

    def __init__(self, reason: str, name: str = "", detail: str = ""):
        super().__init__(reason, name, detail)
        self.reason, self.name, self.detail = reason, name, detail

    def __str__(self) -> str:
        return f"{self.name or 'record'}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def open_image(data: bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image's header, checked; the pixels are not decoded yet (`to_rgb` does it).

    Raises BadRecord: "image: empty", "image: not an image", "image: too large", "image: animated", "image: mode",
    "image: damaged", "image: truncated", "image: text too large".
    """
    if not data:
        raise BadRecord("image: empty", name)
    if data.startswith(PNG_SIGNATURE):
        _check_png(data, name)
    try:
        # The lock because the list of warning filters is global; Pillow's own limit is far above ours.
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadRecord("image: not an image", name, f"starts with {data[:12]!r}") from error
    except Exception as error:  # Pillow's plugins raise a dozen types on hostile headers
        raise _translate(error, name) from error
    width, height = image.size
    if width * height > max_pixels:
        raise BadRecord("image: too large", name, f"{width} x {height}, the limit is {max_pixels} pixels")
    if image.mode in ("I", "F"):
        raise BadRecord("image: mode", name, f"pixels of mode {image.mode!r} have no agreed range")
    try:
        animated = image.format in ANIMATED and getattr(image, "is_animated", False)
    except Exception as error:
        raise _translate(error, name) from error
    if animated:
        raise BadRecord("image: animated", name)
    return image


def to_rgb(image: Image.Image, name: str = "") -> Image.Image:
    """Decodes an opened image to upright 8-bit RGB; transparency is laid on white. Raises BadRecord."""
    if image.mode in ("I", "F"):
        raise BadRecord("image: mode", name, f"pixels of mode {image.mode!r} have no agreed range")
    try:
        image.load()  # a phone's JPEG with several pictures in it gives its first
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise _translate(error, name) from error


def upright_size(image: Image.Image, name: str = "") -> tuple[int, int]:
    """(width, height) that `to_rgb` will give, EXIF orientation considered. Raises BadRecord."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception as error:
        raise _translate(error, name) from error
    return (image.size[1], image.size[0]) if turned else image.size


def decode_image(data: bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An encoded image -> uint8 [height, width, 3], by the rules above. Raises BadRecord."""
    return np.asarray(to_rgb(open_image(data, name, max_pixels), name))


def read_image(source: str | os.PathLike[str]) -> Image.Image:
    """The image in a file or at an address (http, https), by the rules above.

    An address has `TIMEOUT` seconds for each answer, and may not send more than `MAX_BYTES`.
    Raises MmjaxError naming the source: no such file, a folder, no answer, or what is no image (BadRecord).
    """
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        data = _download(name)
    else:
        try:
            data = pathlib.Path(name).read_bytes()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            raise MmjaxError(f"{name}: {'no such image' if missing else error.strerror}") from None
    return to_rgb(open_image(data, name), name)


def _download(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            data = answer.read(MAX_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise MmjaxError(f"{address}: it could not be downloaded: {error}") from None
    if len(data) > MAX_BYTES:
        raise MmjaxError(f"{address}: more than {MAX_BYTES} bytes")
    return data


def _translate(error: Exception, name: str) -> BadRecord:
    text = f"{type(error).__name__}: {error}"
    lower = text.lower()
    if isinstance(error, Image.DecompressionBombError):
        return BadRecord("image: too large", name, str(error))
    if "too large" in lower or "max_text" in lower:
        return BadRecord("image: text too large", name, str(error))
    if isinstance(error, EOFError) or "truncated" in lower or "unexpected end" in lower:
        return BadRecord("image: truncated", name, text)
    return BadRecord("image: damaged", name, text)


def _check_png(data: bytes, name: str) -> None:
    """Walks the chunks and their checksums, which Pillow leaves unchecked for pixel data."""
    view, position = memoryview(data), len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise BadRecord("image: truncated", name, f"chunk {kind!r} ends at byte {end} of {len(data)}")
        (stored,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(view[position + 4 : end - 4]) != stored:
            raise BadRecord("image: damaged", name, f"wrong checksum of chunk {kind!r} at byte {position}")
        if kind == b"IEND":
            return
        position = end
    raise BadRecord("image: truncated", name, "no IEND chunk")


_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), " ")


def clean_caption(raw: bytes | str, name: str = "", max_characters: int = MAX_CHARACTERS) -> str:
    """A caption by the rules above.

    Raises BadRecord: "caption: not UTF-8", "caption: empty", "caption: too long", "caption: not text".
    """
    if isinstance(raw, bytes | bytearray | memoryview):
        try:
            text = bytes(raw).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord("caption: not UTF-8", name, str(error)) from error
    elif isinstance(raw, str):
        text = raw
        if any(0xD800 <= ord(c) <= 0xDFFF for c in text):  # JSON can spell half a character: "\ud83d"
            raise BadRecord("caption: not UTF-8", name, "a lone surrogate")
    else:
        raise BadRecord("caption: not text", name, f"it is a {type(raw).__name__}")
    text = text.removeprefix("\ufeff").translate(_CONTROLS).strip()
    if not text:
        raise BadRecord("caption: empty", name)
    if len(text) > max_characters:
        raise BadRecord("caption: too long", name, f"{len(text)} characters, the limit is {max_characters}")
    return text
