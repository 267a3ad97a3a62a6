"""Shards that are intact, damaged or hostile: every written sample is either read or reported."""

import io
import json
import tarfile

import numpy as np
import pytest

from mmjax.data.decoding import BadRecord
from mmjax.data.pipeline import Pipeline, TooManyBadRecords
from mmjax.data.webdataset import WebDataset, find_shards, read_members, write_index
from mmjax.errors import MmjaxError

MEMBERS = 16


def body(i):
    return np.random.default_rng(i).bytes(700 + 37 * i)


def shard(path, members, format=tarfile.USTAR_FORMAT):
    """Writes (TarInfo or name, bytes) pairs; returns the bytes of the tar."""
    with tarfile.open(path, "w", format=format) as tar:
        for info, data in members:
            info = info if isinstance(info, tarfile.TarInfo) else tarfile.TarInfo(info)
            if data is not None:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if data is not None else None)
    return path.read_bytes()


def damage(data, kind, offset, size):
    """One of the six damages to the member whose header is at `offset` with `size` bytes behind it."""
    rng = np.random.default_rng(offset)
    match kind:
        case "cut at header":
            return data[:offset]
        case "cut inside header":
            return data[: offset + 137]
        case "cut inside body":
            return data[: offset + 512 + size // 2]
        case "random header":
            return data[:offset] + rng.bytes(512) + data[offset + 512 :]
        case "zeroed header":
            return data[:offset] + bytes(512) + data[offset + 512 :]
    return data[: offset + 3] + bytes([data[offset + 3] ^ 4]) + data[offset + 4 :]  # one flipped bit in the name


KINDS = ["cut at header", "cut inside header", "cut inside body", "random header", "zeroed header", "flipped bit"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A shard of 16 one-member samples, its bytes, and (header offset, size) of each."""
    path = tmp_path_factory.mktemp("whole") / "s.tar"
    data = shard(path, [(f"k{i:03}.jpg", body(i)) for i in range(MEMBERS)])
    with tarfile.open(path) as tar:
        return data, [(member.offset, member.size) for member in tar]


def read(source):
    """(images read, reasons for those not read)."""
    images, reasons = [], []
    for i in range(len(source)):
        try:
            images.append(source[i]["image"])
        except BadRecord as error:
            assert str(source.shards[0]) in error.name and "byte" in error.detail
            reasons.append(error.reason)
    return images, reasons


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("indexed", [False, True])
def test_nothing_is_lost_in_silence(tmp_path, whole, kind, indexed):
    data, spans = whole
    path = tmp_path / "s.tar"
    for position in range(1, MEMBERS):
        path.write_bytes(data)
        if indexed:
            write_index(path)
        path.write_bytes(damage(data, kind, *spans[position]))
        images, reasons = read(WebDataset(path))
        lost = MEMBERS - position if kind.startswith("cut") else 1
        expected = [body(i) for i in range(MEMBERS) if not position <= i < position + lost]
        assert images == expected, (position, reasons)
        # Without an index the number of lost members is unknown: one report names the position.
        assert len(reasons) == (lost if indexed else 1), (position, reasons)
        assert set(reasons) <= {"tar: missing member" if indexed else "tar: cut" if lost > 1 else reasons[0]}
        path.with_name("s.tar.index.json").unlink(missing_ok=True)


def test_with_an_index_a_flipped_bit_in_a_body_is_found(tmp_path, whole):
    data, spans = whole
    path = tmp_path / "s.tar"
    path.write_bytes(data)
    write_index(path)
    at = spans[5][0] + 512 + 99
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    source = WebDataset(path)
    with pytest.raises(BadRecord, match=r"s\.tar::k005: tar: changed"):
        source[5]
    path.write_bytes(data[:-300])
    with pytest.raises(MmjaxError, match="not an index"):
        path.with_name("s.tar.index.json").write_text("[1]")
        WebDataset(path)


def info(name, kind=tarfile.REGTYPE, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_hostile_members_are_refused_counted_and_write_nothing(tmp_path):
    path = tmp_path / "in" / "h.tar"
    path.parent.mkdir()
    hostile = [
        (info("../x.jpg"), b"out"),
        (info("a/../../x.jpg"), b"out"),
        (info("/etc/x.jpg"), b"out"),
        (info("l.jpg", tarfile.SYMTYPE, "/etc/passwd"), None),
        (info("h.jpg", tarfile.LNKTYPE, "good.jpg"), None),
        (info("c.jpg", tarfile.CHRTYPE), None),
        (info("f.jpg", tarfile.FIFOTYPE), None),
        (info("folder", tarfile.DIRTYPE), None),  # harmless, and no sample
    ]
    shard(path, [("good.jpg", b"1"), *hostile, ("more.jpg", b"2")])
    images, reasons = read(WebDataset(path))
    assert images == [b"1", b"2"] and reasons == ["tar: refused member"] * 7
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "h.tar"]


def test_a_declared_size_of_ten_gigabytes_loses_one_member(tmp_path):
    path = tmp_path / "g.tar"
    data = bytearray(shard(path, [("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")]))
    header = data[1024:1536]
    header[124:136] = b"\x80" + (10 * 2**30).to_bytes(11, "big")
    header[148:156] = f"{sum(header[:148]) + 256 + sum(header[156:]):06o}\0 ".encode()
    data[1024:1536] = header
    path.write_bytes(data)
    images, reasons = read(WebDataset(path))
    assert images == [b"1", b"3"] and reasons == ["tar: damaged header"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_every_format(tmp_path, format):
    path = tmp_path / "a.tar"
    key = "ordner/" + "n" * 90 if format == tarfile.USTAR_FORMAT else "ordner/käse" + "n" * 150
    members = [
        (f"{key}.png", b"pixels"),
        (f"{key}.txt", "Ein Käse\n".encode()),
        (f"{key}.cls", b"7"),
        (f"{key}.seg.png", b"mask"),
        ("j.webp", b"w"),
        ("j.json", json.dumps({"caption": "from json", "n": 3}).encode()),
    ]
    shard(path, members, format)
    source = WebDataset(path)
    assert len(source) == 2 and source.record_name(1) == f"{path}::j"
    first, second = source[0], source[1]
    assert first.pop("key").endswith("n" * 90)
    assert first == {"image": b"pixels", "text": "Ein Käse", "label": 7, "seg.png": b"mask"}
    assert second == {"image": b"w", "text": "from json", "json": {"caption": "from json", "n": 3}, "key": "j"}


def test_members_that_are_no_use_are_named(tmp_path):
    path = tmp_path / "a.tar"
    members = [("a.txt", b"alone"), ("b.jpg", b"1"), ("b.txt", b"\xff\xfe"), ("c.jpg", b"1"), ("c.json", b"{")]
    shard(path, [*members, ("d.jpg", b"1"), ("d.cls", b"x"), ("e.jpg", b"1"), ("e.jpg", b"2")])
    source = WebDataset(path)
    reasons = []
    for i in range(4):
        with pytest.raises(BadRecord) as caught:
            source[i]
        reasons.append((caught.value.reason, caught.value.name))
    expected = ["sample: no image", "caption: not UTF-8", "sample: not JSON", "sample: label is not a number"]
    assert reasons == [(reason, f"{path}::{key}") for reason, key in zip(expected, "abcd")]
    assert [source[4]["image"], source[5]["image"]] == [b"1", b"2"]  # a key that comes again is another sample


def test_shards_are_listed_or_reported_missing(tmp_path):
    for i in (8, 9, 10):
        shard(tmp_path / f"t-{i:02}.tar", [(f"k{i}.jpg", body(i))])
    expected = [tmp_path / f"t-{i:02}.tar" for i in (8, 9, 10)]
    for shards in (tmp_path, f"{tmp_path}/t-*.tar", f"{tmp_path}/t-{{08..10}}.tar", expected):
        assert find_shards(shards) == expected
    source = WebDataset(tmp_path)
    assert [source[i]["image"] for i in range(3)] == [body(i) for i in (8, 9, 10)]
    with pytest.raises(MmjaxError, match=r"1 of 4 shards are missing: .*t-11\.tar"):
        WebDataset(f"{tmp_path}/t-{{08..11}}.tar")
    with pytest.raises(MmjaxError, match=r"no \.tar file fits"):
        WebDataset(f"{tmp_path}/x-*.tar")
    (tmp_path / "t.tar.gz").write_bytes(b"")
    with pytest.raises(MmjaxError, match=r"plain \.tar"):
        WebDataset(tmp_path / "t.tar.gz")
    expected[1].unlink()  # gone while training
    with pytest.raises(BadRecord, match="file: missing"):
        source[1]


def test_a_pipeline_counts_what_a_shard_lost(tmp_path, whole):
    data, spans = whole
    path = tmp_path / "s.tar"
    path.write_bytes(damage(data, "random header", *spans[4]))
    source = WebDataset(path)
    fields = {"batch_size": 16, "transforms": (lambda record: {"size": len(record["image"])},)}
    iterator = iter(Pipeline(source, **fields, max_bad_fraction=0.1))
    batch = next(iterator)
    assert iterator.bad_counts == {"tar: damaged header": 1}
    assert set(batch["size"].tolist()) == {len(body(i)) for i in range(MEMBERS) if i != 4}
    with pytest.raises(TooManyBadRecords, match=r"s\.tar::@"):
        next(iter(Pipeline(source, **fields)))


def test_random_bytes_and_fuzzed_headers_only_raise_ours(tmp_path, whole):
    data, _ = whole
    path = tmp_path / "f.tar"
    rng = np.random.default_rng(5)
    for trial in range(300):
        fuzzed = bytearray(data[: 4 * 1536])
        for _ in range(rng.integers(1, 9)):
            fuzzed[rng.integers(512 if trial % 2 else len(fuzzed))] = rng.integers(256)
        path.write_bytes(fuzzed)
        list(read_members(path))
        read(WebDataset(path))


def test_the_shared_shards_are_whole(shared_dir):
    stamps = WebDataset(shared_dir / "data" / "stamps" / "stamps.tar")
    assert len(stamps) == 514 and not stamps.problems
    assert len({stamps[i]["text"] for i in range(len(stamps))}) == 456
    assert len(WebDataset(shared_dir / "data" / "clipart" / "clipart.tar")) == 2687
