"""Hostile images: eighteen that must be refused, each with the reason."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

RNG = np.random.default_rng(11)
NOISE = RNG.integers(0, 256, (41, 53, 3), np.uint8)


def encode(image, format="PNG", **options):
    target = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(target, format, **options)
    return target.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks, depth=8, color=2):
    """A PNG whose header claims a size that its data does not have."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def gif(frames, size=(20, 10)):
    images = [Image.new("P", size, i) for i in range(frames)]
    target = io.BytesIO()
    for i, image in enumerate(images):
        image.putpalette([37 * i % 256] * 768)
    images[0].save(target, "GIF", save_all=True, append_images=images[1:])
    return target.getvalue()


def gif_with_huge_second_frame():
    data = bytearray(gif(2))
    second = data.index(b"\x2c", data.index(b"\x2c") + 1)
    data[second + 5 : second + 9] = struct.pack("<HH", 65535, 65535)
    return bytes(data)


JPEG = encode(NOISE, "JPEG")
PNG = encode(NOISE)
CASES = {
    "empty": (b"", "image: empty"),
    "HTML as .jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "image: not an image"),
    "random bytes": (RNG.bytes(3000), "image: not an image"),
    "EPS is never run": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image: not an image"),
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "image: truncated"),
    "truncated PNG": (PNG[: len(PNG) // 2], "image: truncated"),
    "truncated header": (JPEG[:30], "image: truncated"),
    "wrong checksum": (PNG[:-20] + bytes([PNG[-20] ^ 1]) + PNG[-19:], "image: damaged"),
    "wrong header checksum": (PNG[:17] + b"\xff" + PNG[18:], "image: damaged"),
    "30,000 x 30,000": (png(30_000, 30_000), "image: too large"),
    "60,000 x 60,000": (png(60_000, 60_000), "image: too large"),
    "100 megapixels": (encode(Image.new("L", (10_000, 10_000))), "image: too large"),
    "zTXt bomb": (
        png(1, 1, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 << 20)))),
        "image: text too large",
    ),
    "animated GIF": (gif(3), "image: animated"),
    "huge second frame": (gif_with_huge_second_frame(), "image: animated"),
    "animated WebP": (
        encode(Image.new("RGB", (9, 9)), "WEBP", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]),
        "image: animated",
    ),
    "32-bit integers": (encode(Image.new("I", (7, 5)), "TIFF"), "image: mode"),
    "floats": (encode(Image.new("F", (7, 5)), "TIFF"), "image: mode"),
}
