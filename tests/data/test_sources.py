"""Folders, lists, arrays and IDX files: their records and their errors."""

import gzip
import json
import pickle
import struct

import numpy as np
import pytest

from mmjax.data.decoding import BadRecord
from mmjax.data.image_folder import ImageFolder
from mmjax.data.image_text import ImageTextList, retrieval_texts
from mmjax.data.sources import ArraySource, RandomAccess, read_idx
from mmjax.errors import MmjaxError


@pytest.fixture
def images(tmp_path):
    """Five files under images/: their contents are their names."""
    for name in ("a.jpg", "b.jpg", "val/c.jpg", "d.png", "ü.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    return tmp_path / "images"


def test_an_array_source_returns_rows_and_has_an_identity():
    source = ArraySource(name="digits", image=np.arange(24, dtype=np.uint8).reshape(6, 2, 2), label=np.arange(6) % 3)
    record = source[4]
    assert record["label"] == 1 and type(record["label"]) is int
    np.testing.assert_array_equal(record["image"], [[16, 17], [18, 19]])
    part = source.select([5, 0])
    assert [part[i]["label"] for i in range(2)] == [2, 0] and part.record_name(1) == "digits[1]"
    assert part.fingerprint != source.fingerprint == ArraySource(**source.columns).fingerprint
    with pytest.raises(MmjaxError, match="must have one length"):
        ArraySource(image=np.zeros(3), label=np.zeros(4))


def test_any_random_access_becomes_a_source():
    source = RandomAccess([(b"x", 3), (b"y", 5)], lambda item: {"image": item[0], "label": item[1]}, "pairs")
    assert len(source) == 2 and source[1] == {"image": b"y", "label": 5} and source.record_name(1) == "pairs[1]"


def test_a_folder_of_classes(tmp_path):
    for name in ("cat/2.jpg", "cat/10.PNG", "ant/deep/z.webp", "ant/readme.txt", "zebra/1.jpeg"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    source = ImageFolder(tmp_path / "train")
    assert source.classes == ("ant", "cat", "zebra")
    assert [(source[i]["image"], source[i]["label"]) for i in range(len(source))] == [
        (b"ant/deep/z.webp", 0),
        (b"cat/10.PNG", 1),
        (b"cat/2.jpg", 1),
        (b"zebra/1.jpeg", 2),
    ]
    before = source.fingerprint
    (tmp_path / "train").rename(tmp_path / "moved")
    assert ImageFolder(tmp_path / "moved").fingerprint == before
    with pytest.raises(BadRecord, match="file: missing"):
        source[0]
    flat = ImageFolder(tmp_path / "moved" / "cat")
    assert flat.classes == () and flat[0] == {"image": b"cat/10.PNG"}
    (tmp_path / "empty").mkdir()
    for folder, word in (("empty", "no image"), ("absent", "no such folder")):
        with pytest.raises(MmjaxError, match=word):
            ImageFolder(tmp_path / folder)


COCO = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
    "annotations": [
        {"image_id": 3, "caption": "Two."},
        {"image_id": 7, "caption": "One."},
        {"image_id": 7, "caption": "Eins. "},
    ],
}
KARPATHY = {
    "images": [{"cocoid": 5, "filepath": "val", "filename": "c.jpg", "sentences": [{"raw": "x"}, {"raw": "y"}]}]
}
BLIP = [{"image": "a.jpg", "caption": "One."}, {"image": "ü.jpg", "caption": ["u", "ü"], "image_id": "i_1"}]
LLAVA = [{"id": "1", "image": "d.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}]


@pytest.mark.parametrize(
    "content, expected",
    [
        (COCO, [("a.jpg", ("One.", "Eins.")), ("b.jpg", ("Two.",))]),
        (KARPATHY, [("val/c.jpg", ("x", "y"))]),
        (BLIP, [("a.jpg", ("One.",)), ("ü.jpg", ("u", "ü"))]),
    ],
)
def test_published_json_formats(tmp_path, images, content, expected):
    (tmp_path / "list.json").write_text(json.dumps(content))
    source = ImageTextList(tmp_path / "list.json", images)
    assert [(source[i]["image"].decode(), source[i]["texts"]) for i in range(len(source))] == expected
    assert all(source[i]["text"] == expected[i][1][0] for i in range(len(source)))
    again = pickle.loads(pickle.dumps(source))  # pickled, as for a worker
    assert again.files[0]._parsed is None and again[0] == source[0] and again.fingerprint == source.fingerprint


def test_conversations_are_handed_on(tmp_path, images):
    (tmp_path / "llava.json").write_text(json.dumps(LLAVA))
    record = ImageTextList(tmp_path / "llava.json", images)[0]
    assert record == {"id": "1", "image": b"d.png", "conversations": LLAVA[0]["conversations"]}


def test_csv_and_tsv(tmp_path, images):
    (tmp_path / "l.csv").write_bytes(b'\xef\xbb\xbffilepath,title\na.jpg,"One, two"\nb.jpg,\xff\n')
    (tmp_path / "l.tsv").write_text("image\tcaption\nd.png\tDrei\n")
    source = ImageTextList(tmp_path / "l.csv", images)
    assert source[0] == {"image": b"a.jpg", "text": "One, two", "texts": ("One, two",)}
    with pytest.raises(BadRecord, match="caption: not UTF-8"):
        source[1]
    assert ImageTextList(tmp_path / "l.tsv", images)[0]["text"] == "Drei"


def test_each_bad_row_has_its_reason(tmp_path, images):
    records = [
        b'{"image": "a.jpg", "caption": "good"}',
        b'{"image": "../secret.jpg", "caption": "x"}',
        json.dumps({"image": str(tmp_path / "secret.jpg"), "caption": "x"}).encode(),
        b'{"image": "gone.jpg", "caption": "x"}',
        b'{"caption": "x"}',
        b'{"image": "a.jpg", "caption": "\\ud83d"}',
        b'{"image": "a.jpg", "caption": "\xff"}',
        b'{"image": "a.jpg", "caption": []}',
        b'{"image": "a.jpg", "caption": 3}',
        b'{"image": "a.jpg", "capti',
        b"[1, 2]",
        b"[" * 100_000,
        b'{"image": "a\\u0000.jpg", "caption": "x"}',
        b"",
        b'{"image": "b.jpg", "caption": "last"}',
    ]
    (tmp_path / "l.jsonl").write_bytes(b"\n".join(records))
    source = ImageTextList(tmp_path / "l.jsonl", images)
    assert len(source) == 14  # the empty line is ignored
    assert source[0]["text"] == "good" and source[13]["text"] == "last"
    reasons = []
    for i in range(1, 13):
        with pytest.raises(BadRecord) as caught:
            source[i]
        reasons.append(caught.value.reason)
        assert caught.value.name
    outside, utf8, json_ = "file: outside the folder", "caption: not UTF-8", "list: not JSON"
    expected = [outside, outside, "file: missing", "list: no image named", utf8, utf8, "caption: empty"]
    assert reasons == [*expected, "caption: not text", json_, "list: not an object", json_, outside]


def test_lists_that_are_none(tmp_path):
    cases = {
        "a.json": ("{", "not JSON"),
        "b.json": ('{"x": 1}', r"not an object with \['x'\]"),
        "c.jsonl": ("", "no entries"),
    }
    for name, (text, word) in {**cases, "d.txt": ("", "is a .json")}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(MmjaxError, match=word):
            ImageTextList(tmp_path / name)
    with pytest.raises(MmjaxError, match="no such file"):
        ImageTextList(tmp_path / "gone.json")


def test_several_pathsare_one_list(tmp_path, images):
    (tmp_path / "one.json").write_text(json.dumps(BLIP))
    (tmp_path / "two.jsonl").write_text('{"image": "b.jpg", "text": "b"}\n{"text": "none"}\n')
    files = [tmp_path / "one.json", tmp_path / "two.jsonl"]
    source = ImageTextList(files, images)
    assert [source[i]["text"] for i in range(3)] == ["One.", "u", "b"] and len(source) == 4
    assert source.record_name(2) == f"{files[1]}[0]" and source.name == "one.json + two.jsonl"
    with pytest.raises(BadRecord, match=r"two\.jsonl\[1\]: list: no image named"):
        source[3]
    assert source.fingerprint not in (ImageTextList(files[0]).fingerprint, ImageTextList(files[::-1]).fingerprint)
    again = pickle.loads(pickle.dumps(source))
    assert again[2] == source[2]
    (images / "one.json").write_text(json.dumps(BLIP))
    assert ImageTextList([images / "one.json"])[0]["image"] == b"a.jpg"  # without a folder, the file's own
    for paths, word in (([], "needs a file"), ([files[0], tmp_path / "gone.json"], "gone.json: no such file")):
        with pytest.raises(MmjaxError, match=word):
            ImageTextList(paths)


def test_images_are_numbered_in_the_order_of_their_first_coming(tmp_path, images):
    entries = [("a.jpg", "x9"), ("b.jpg", 7), ("a.jpg", "x9"), ("d.png", 7)]
    records = [{"image": name, "image_id": id, "caption": "c"} for name, id in entries]
    expressions = [{"image": name, "text": "t", "ref_id": 5} for name in ("d.png", "val/c.jpg", "d.png")]
    (tmp_path / "train.json").write_text(json.dumps([*records, *expressions]))
    source = ImageTextList(tmp_path / "train.json", images, numbered=True)
    assert [source[i]["image_id"] for i in range(7)] == [0, 1, 0, 1, 2, 3, 2]
    assert source[4]["ref_id"] == 5 and source[4]["text"] == "t"
    assert pickle.loads(pickle.dumps(source))[6]["image_id"] == 2
    assert ImageTextList(tmp_path / "train.json", images)[0]["image_id"] == "x9"


def test_the_texts_to_retrieve_and_whose_they_are(tmp_path, images):
    records = [{"image": "a.jpg", "caption": ["A!", "B"]}, {"image": "gone.jpg", "caption": ["C", "D", "E"]}]
    (tmp_path / "test.json").write_text(json.dumps([*records, {"image": "b.jpg", "caption": "F"}]))
    texts, text_image = retrieval_texts(ImageTextList(tmp_path / "test.json", images))
    assert texts == ("A!", "B", "C", "D", "E", "F")
    assert text_image.tolist() == [0, 0, 1, 1, 1, 2] and text_image.dtype == np.int32
    for row, word in (({"image": "a.jpg"}, "no text"), ({"image": "a.jpg", "caption": ["x", 3]}, "not text")):
        (tmp_path / "test.json").write_text(json.dumps([records[0], row]))
        with pytest.raises(MmjaxError, match=r"test\.json\[1\]: .*" + word):
            retrieval_texts(ImageTextList(tmp_path / "test.json", images))


def test_idx_files(tmp_path):
    values = np.arange(30).reshape(5, 3, 2)
    for code, dtype in ((8, ">u1"), (11, ">i2"), (13, ">f4")):
        raw = struct.pack(">4B3I", 0, 0, code, 3, 5, 3, 2) + values.astype(dtype).tobytes()
        (tmp_path / "plain").write_bytes(raw)
        (tmp_path / "packed.gz").write_bytes(gzip.compress(raw))
        for name in ("plain", "packed.gz"):
            got = read_idx(tmp_path / name)
            np.testing.assert_array_equal(got, values)
            assert got.dtype == np.dtype(dtype).newbyteorder("=")
    for damaged in (raw[:-1], raw + b"x", raw[:9], b"\0\0\7\1", b"", b"\x1f\x8bnonsense", gzip.compress(raw)[:-9]):
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(MmjaxError, match="bad"):
            read_idx(tmp_path / "bad")
