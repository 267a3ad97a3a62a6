"""Crops by torchvision's rule, flips, texts; and 37 bad images of eight kinds among 500 through the whole pipeline."""

import io
import json
import math

import numpy as np
import pytest
from hostile_images import CASES, encode
from PIL import Image

from mmjax.data.decoding import BadRecord, decode_image
from mmjax.data.image_folder import ImageFolder
from mmjax.data.pipeline import Pipeline, TooManyBadRecords, batches
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.transforms import Decode, EncodeText, RandomFlip, RandomResizedCrop, Resize, random_box
from mmjax.errors import MmjaxError

NOISE = np.random.default_rng(2).integers(0, 256, (61, 83, 3), np.uint8)


def generator(seed=0):
    return np.random.default_rng(seed)


class Scripted:
    """A generator that replays a list of uniforms, to follow torchvision's rule by hand."""

    def __init__(self, *uniforms):
        self.uniforms = list(uniforms)

    def uniform(self, low, high):
        return low + (high - low) * self.uniforms.pop(0)

    def integers(self, high):
        return int(self.uniforms.pop(0) * high)


def test_the_box_follows_the_rule_by_hand():
    area, aspect = 61 * 83 * (0.2 + 0.8 * 0.5), math.exp(math.log(3 / 4) + math.log(16 / 9) * 0.25)
    width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    got = random_box((83, 61), (0.2, 1.0), (3 / 4, 4 / 3), Scripted(0.5, 0.25, 0.5, 0.999))  # type: ignore[arg-type]
    assert got == ((83 - width + 1) // 2, 61 - height, width, height)


@pytest.mark.parametrize(
    "size, box",
    [
        ((100, 7), (45, 0, 9, 7)),  # far too wide: 7 * 4/3 wide, in the middle
        ((7, 100), (0, 45, 7, 9)),
        ((11, 10), (0, 0, 11, 10)),  # within the ratios: the whole
    ],
)
def test_the_fall_back_after_ten_tries(size, box):
    misses = Scripted(*[1.0, 0.0 if size[0] > size[1] else 1.0] * 10)  # the whole area, at the wrong aspect
    assert random_box(size, (0.08, 1.0), (3 / 4, 4 / 3), misses) == box  # type: ignore[arg-type]


def test_boxes_have_the_configured_distribution():
    boxes = np.array([random_box((640, 480), (0.25, 0.6), (3 / 4, 4 / 3), generator(i)) for i in range(4000)])
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (left + width <= 640).all() and (top >= 0).all() and (top + height <= 480).all()
    share, logs = width * height / (640 * 480), np.log(width / height)
    assert abs(share.mean() - 0.425) < 0.005 and abs(np.median(share) - 0.425) < 0.01
    assert share.min() > 0.24 and share.max() < 0.61 and abs(logs.mean()) < 0.01
    assert abs(np.abs(logs).max() - math.log(4 / 3)) < 0.02


def test_the_crop_is_pils_crop_and_resize():
    crop = RandomResizedCrop(29, (0.1, 0.9), resample="bicubic")
    for data in (encode(NOISE), NOISE):
        got = crop.random_map({"image": data, "label": 3}, generator(5))
        left, top, width, height = random_box((83, 61), (0.1, 0.9), (3 / 4, 4 / 3), generator(5))
        part = Image.fromarray(NOISE[top : top + height, left : left + width])
        np.testing.assert_array_equal(got["image"], np.asarray(part.resize((29, 29), Image.Resampling.BICUBIC)))
        assert got["label"] == 3


def smooth(height, width):
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 61 + c) + np.cos(y / 47 - c) for c in range(3)]
    return (127 + 60 * np.stack(waves, 2)).astype(np.uint8)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_shrunk_decode_shows_the_same_part(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(smooth(900, 1200), "JPEG", quality=95, exif=exif)
    for seed in range(6):
        exact = RandomResizedCrop(31).random_map({"image": data}, generator(seed))["image"]
        fast = RandomResizedCrop(31, shrink=True).random_map({"image": data}, generator(seed))["image"]
        assert fast.shape == exact.shape
        other = RandomResizedCrop(31).random_map({"image": data}, generator(seed + 99))["image"]
        assert np.abs(fast.astype(int) - exact).mean() < 3 < 15 < np.abs(fast.astype(int) - other).mean()
    small = encode(NOISE, "JPEG")  # nothing to shrink: the same bits
    pair = [RandomResizedCrop(31, shrink=s).random_map({"image": small}, generator(1))["image"] for s in (True, False)]
    np.testing.assert_array_equal(*pair)


def test_flip_decode_resize():
    flips = [RandomFlip().random_map({"image": NOISE}, generator(i))["image"] for i in range(200)]
    mirrored = sum(np.array_equal(image, NOISE[:, ::-1]) for image in flips)
    assert 70 < mirrored < 130 and mirrored + sum(np.array_equal(image, NOISE) for image in flips) == 200
    np.testing.assert_array_equal(Decode().map({"image": encode(NOISE)})["image"], NOISE)
    preprocessing = ImagePreprocessing.clip(37)
    resized = Resize(preprocessing).map({"image": encode(NOISE)})["image"]
    np.testing.assert_array_equal(preprocessing.normalise(resized), preprocessing(NOISE)[0])


def test_texts_are_encoded():
    def encode_text(texts):
        return [[len(text), 7] for text in texts]

    record = {"text": "aa", "texts": ("aa", "bbbb", "cccccc")}
    sampled = [EncodeText(encode_text).random_map(record, generator(i))["text"] for i in range(300)]
    counts = np.bincount([ids[0] for ids in sampled], minlength=7)[[2, 4, 6]]
    assert sampled[0].dtype == np.int32 and counts.sum() == 300 and counts.min() > 70
    one = EncodeText(encode_text, several=False, template="a {}.").random_map(record, generator())
    assert one["text"].tolist() == [5, 7]
    # Each of four words stays at 0.6: 2.4 of them, and one more where none would.
    dropping = EncodeText(lambda texts: [[len(text.split()) for text in texts]], word_dropout=0.4)
    left = np.array([dropping.random_map({"text": "a b c d"}, generator(i))["text"][0] for i in range(2000)])
    assert left.min() == 1 and left.max() == 4 and abs(left.mean() - (2.4 + 0.4**4)) < 0.08
    with pytest.raises(MmjaxError, match=r"word_dropout=1\.5"):
        EncodeText(encode_text, word_dropout=1.5)
    for broken, reason in (({}, "caption: missing"), ({"text": "\0"}, "caption: empty")):
        with pytest.raises(BadRecord, match=reason):
            EncodeText(encode_text).random_map(broken, generator())


EIGHT = {
    "empty": 5,
    "truncated JPEG": 5,
    "random bytes": 5,
    "HTML as .jpg": 5,
    "wrong checksum": 5,
    "30,000 x 30,000": 4,
    "32-bit integers": 4,
    "animated GIF": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """500 files, 37 of them bad, of eight kinds; and which is which."""
    root = tmp_path_factory.mktemp("images") / "all"
    root.mkdir()
    positions = np.random.default_rng(0).permutation(500)[:37]
    kinds = dict(zip(positions.tolist(), [kind for kind, count in EIGHT.items() for _ in range(count)]))
    for i in range(500):
        image = np.full((16 + i % 5, 19, 3), i % 256, np.uint8)
        (root / f"{i:03}.jpg").write_bytes(CASES[kinds[i]][0] if i in kinds else encode(image, "JPEG"))
    return root, kinds


@pytest.mark.parametrize("workers", [0, 2])
def test_37_bad_images_of_eight_kinds_among_500(tmp_path, folder, workers):
    root, kinds = folder
    pipeline = Pipeline(
        ImageFolder(root),
        batch_size=20,
        shuffle=False,
        transforms=(RandomResizedCrop(13), RandomFlip()),
        workers=workers,
        epochs=1,
        max_bad_fraction=0.08,
        quarantine=tmp_path / "quarantine.jsonl",
    )
    iterator = iter(pipeline)
    got = list(iterator)
    iterator.close()
    assert len(got) == 25 and all(batch["image"].shape == (20, 13, 13, 3) for batch in got)
    indices = np.concatenate([batch["index"] for batch in got])
    good = [i for i in range(500) if i not in kinds]
    assert indices[good].tolist() == good  # the other 463 keep their positions
    assert not set(indices.tolist()) & set(kinds)
    expected: dict[str, int] = {}
    for kind, count in EIGHT.items():
        expected[CASES[kind][1]] = expected.get(CASES[kind][1], 0) + count
    assert iterator.bad_counts == expected and sum(expected.values()) == 37
    records = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {row["name"]: row["reason"] for row in records} == {
        str(root / f"{i:03}.jpg"): CASES[kind][1] for i, kind in kinds.items()
    }
    values = np.concatenate([batch["image"][:, 6, 6, 0] for batch in got])
    assert np.abs(values.astype(int) - indices % 256).max() <= 1


def test_one_percent_of_500_is_five(folder):
    iterator = iter(Pipeline(ImageFolder(folder[0]), batch_size=20, transforms=(RandomResizedCrop(13),)))
    with pytest.raises(TooManyBadRecords, match=r"all: ([6-9]|1\d) bad records by step \d+ .*max_bad_fraction=0.01"):
        list(iterator)
    assert sum(iterator.bad_counts.values()) <= 5


def test_an_evaluation_reads_each_image_once(folder):
    root, kinds = folder
    source = ImageFolder(root)
    good = [i for i in range(500) if i not in kinds][:21]

    class Chosen:
        name, fingerprint = "chosen", "0"

        def __len__(self):
            return len(good)

        def __getitem__(self, i):
            return source[good[i]]

        def record_name(self, i):
            return source.record_name(good[i])

    resize = Resize(ImagePreprocessing.imagenet(11, 13))
    once = Pipeline(Chosen(), 8, shuffle=False, transforms=(resize,), epochs=1, drop_remainder=False)
    images = np.concatenate([batch["image"] for batch in batches(once)])
    assert images.shape == (21, 11, 11, 3)
    expected = ImagePreprocessing.imagenet(11, 13).to_uint8(decode_image(source[good[20]]["image"]))
    np.testing.assert_array_equal(images[20], expected)


def test_a_picture_may_come_as_a_file_object_of_any_mode():
    grey = io.BytesIO()
    Image.fromarray(NOISE[..., 0]).save(grey, "PNG")
    got = RandomResizedCrop(7).random_map({"image": grey.getvalue()}, generator(3))["image"]
    assert got.shape == (7, 7, 3) and (got[..., 0] == got[..., 2]).all()
