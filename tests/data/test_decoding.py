"""Untrusted images and captions: each failure has a reason, and valid ones are decoded correctly."""

import http.server
import io
import resource
import threading
import time
import warnings

import numpy as np
import pytest
from hostile_images import CASES, JPEG, NOISE, PNG, encode, gif
from PIL import Image, ImageSequence

from mmjax.data import decoding
from mmjax.data.decoding import MAX_CHARACTERS, BadRecord, clean_caption, decode_image, read_image
from mmjax.data.preprocess import as_image
from mmjax.errors import MmjaxError

SMOOTH = np.add.outer(np.arange(41) * 3, np.arange(53) * 2)[..., None].repeat(3, 2).astype(np.uint8)


@pytest.mark.parametrize("case", CASES)
def test_each_failure_has_its_name(case):
    data, reason = CASES[case]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadRecord, match=r"photo\.jpg") as caught:
            decode_image(data, "photo.jpg")
    assert caught.value.reason == reason, caught.value
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert time.process_time() - began < 5


def test_hostile_bytes_raise_nothing_but_bad_records():
    rng = np.random.default_rng(17)
    seeds = [JPEG, PNG, gif(1), gif(2), encode(NOISE, "WEBP"), encode(NOISE, "TIFF"), encode(NOISE, "BMP")]
    bad = 0
    for trial in range(700):
        data = bytearray(seeds[trial % len(seeds)])
        for _ in range(rng.integers(1, 12)):
            data[rng.integers(min(len(data), 400))] = rng.integers(256)
        try:
            image = decode_image(bytes(data[: rng.integers(1, len(data) + 1)] if trial % 3 == 0 else data))
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        except BadRecord:
            bad += 1
    assert bad > 350


def test_good_images_come_out_right():
    np.testing.assert_array_equal(decode_image(PNG), NOISE)
    np.testing.assert_array_equal(decode_image(encode(NOISE, "BMP")), NOISE)
    np.testing.assert_array_equal(decode_image(encode(NOISE, "TIFF")), NOISE)
    np.testing.assert_array_equal(decode_image(encode(NOISE, "WEBP", lossless=True)), NOISE)
    grey = NOISE[..., 0]
    np.testing.assert_array_equal(decode_image(encode(grey)), grey[..., None].repeat(3, 2))
    np.testing.assert_array_equal(decode_image(gif(1)), np.zeros((10, 20, 3)))
    palette = Image.fromarray(NOISE).quantize(16)
    np.testing.assert_array_equal(decode_image(encode(palette)), np.asarray(palette.convert("RGB")))
    one_bit = Image.fromarray(grey > 127)
    np.testing.assert_array_equal(decode_image(encode(one_bit)), (grey > 127)[..., None].repeat(3, 2) * 255)


def test_sixteen_bits_keep_the_upper_eight():
    deep = np.linspace(0, 65535, 41 * 53).astype(np.uint16).reshape(41, 53)
    np.testing.assert_array_equal(decode_image(encode(deep)), (deep >> 8)[..., None].repeat(3, 2))


def test_transparency_is_laid_on_white():
    rgba = np.concatenate([NOISE, np.zeros((41, 53, 1), np.uint8)], 2)
    rgba[:, 20:, 3] = 255
    expected = NOISE.copy()
    expected[:, :20] = 255
    np.testing.assert_array_equal(decode_image(encode(rgba)), expected)
    keyed = encode(Image.new("P", (5, 4), 0), transparency=0)
    np.testing.assert_array_equal(decode_image(keyed), np.full((4, 5, 3), 255))


def test_cmyk_is_converted():
    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    got = decode_image(encode(cmyk, "JPEG", quality=100))
    np.testing.assert_allclose(got.reshape(-1, 3).mean(0), [0, 255, 255], atol=3)


@pytest.mark.parametrize(
    "orientation, undo",
    [(2, np.fliplr), (3, lambda x: np.rot90(x, 2)), (4, np.flipud), (6, lambda x: np.rot90(x, -1)), (8, np.rot90)],
)
def test_exif_orientation_is_applied(orientation, undo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "JPEG"):
        stored = decode_image(encode(SMOOTH, format))
        np.testing.assert_array_equal(decode_image(encode(SMOOTH, format, exif=exif)), undo(stored))


def test_a_still_is_what_remains_of_one_frame():
    assert sum(1 for _ in ImageSequence.Iterator(Image.open(io.BytesIO(gif(1))))) == 1
    assert decode_image(gif(1)).shape == (10, 20, 3)


@pytest.mark.parametrize(
    "raw, reason",
    [
        (b"\xff\xfe broken", "caption: not UTF-8"),
        (b"caf\xe9", "caption: not UTF-8"),
        ("half \ud83d", "caption: not UTF-8"),
        (b"", "caption: empty"),
        (" \n\t", "caption: empty"),
        (b"\0\0", "caption: empty"),
        (b"\xef\xbb\xbf", "caption: empty"),
        (b"x" * 1_000_000, "caption: too long"),
        ("e" + "\u0301" * MAX_CHARACTERS, "caption: too long"),
        (None, "caption: not text"),
        (float("nan"), "caption: not text"),
    ],
)
def test_captions_that_are_refused(raw, reason):
    with pytest.raises(BadRecord, match="row 3") as caught:
        clean_caption(raw, "row 3")
    assert caught.value.reason == reason


def test_captions_that_are_cleaned():
    assert clean_caption(b"\xef\xbb\xbfA dog.\n") == "A dog."
    assert clean_caption("a\0b\x1bc\u0085d") == "a b c d"
    assert clean_caption("Käse 🧀 e\u0301") == "Käse 🧀 e\u0301"
    assert clean_caption("e" + "\u0301" * (MAX_CHARACTERS - 1)).startswith("e")


def sources(folder):
    """Files of every mode whose conversion to RGB is a choice."""
    logo = np.zeros((9, 11, 4), np.uint8)
    logo[2:6, 3:8] = (200, 30, 10, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {
        "alpha.png": Image.fromarray(logo),
        "palette.png": Image.fromarray(logo).quantize(4),
        "grey_alpha.png": Image.fromarray(logo).convert("LA"),
        "grey16.png": Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11) * 600),
        "bit.png": Image.fromarray(logo[..., 3] > 0),
        "turned.jpg": Image.fromarray(SMOOTH),
        "cmyk.jpg": Image.fromarray(SMOOTH).convert("CMYK"),
    }
    for name, image in images.items():
        image.save(folder / name, **({"exif": exif} if name == "turned.jpg" else {}))
    return [folder / name for name in images]


@pytest.mark.filterwarnings("ignore:Palette images")
def test_a_file_and_a_pil_image_have_the_pixels_of_training(tmp_path):
    for file in sources(tmp_path):
        trained = decode_image(file.read_bytes())
        with Image.open(file) as image:
            assert np.array_equal(as_image(image), trained), file
        assert np.array_equal(as_image(file), trained) and np.array_equal(as_image(str(file)), trained)
    white = np.asarray(as_image(np.zeros((2, 2, 4), np.uint8)))
    assert (white == 255).all()  # an array with alpha 0


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "text.jpg").write_bytes(b"<html>404</html>")
    for name, message in (("text.jpg", "not an image"), ("absent.jpg", "no such image"), ("", "Is a directory")):
        with pytest.raises(MmjaxError, match=message) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_addresses_are_read_within_limits(monkeypatch):
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(PNG)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert np.array_equal(read_image(f"{address}/a.png"), decode_image(PNG))
        with pytest.raises(MmjaxError, match=r"/b\.png: it could not be downloaded: HTTP Error 404"):
            read_image(f"{address}/b.png")
        monkeypatch.setattr(decoding, "MAX_BYTES", 10)
        with pytest.raises(MmjaxError, match="more than 10 bytes"):
            read_image(f"{address}/a.png")
    finally:
        server.shutdown()
        server.server_close()
