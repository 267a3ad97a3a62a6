"""WebDataset tars by random access, through an index: nothing is extracted, and no loss is silent.

Python's `tarfile` (and what is built on it) stops silently at the first damaged header: of six ways to damage one
member of a shard, five lose the rest of the shard unnoticed. Here every header's checksum is checked; after a damaged
one it searches for the next good header; each lost member is a record that raises BadRecord, so that a pipeline
counts it, names it with shard and offset, and stops if there are too many:

    tar: damaged header      the checksum is wrong, or the header is zeroed while more follows
    tar: cut                 the shard ends inside a member, or without an end mark
    tar: refused member      a link, a device, an absolute name or one with `..`
    tar: changed             the member differs from the index (only with an index)
    tar: missing member      the index lists a member that is not there (only with an index)

`write_index(shard)` writes SHARD.index.json while the shard is whole. With it a cut shard's losses are known exactly,
and a single flipped bit anywhere is detected.
"""

import dataclasses
import glob
import hashlib
import itertools
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from mmjax.data.decoding import BadRecord, clean_caption
from mmjax.data.image_folder import SUFFIXES
from mmjax.data.sources import Record
from mmjax.errors import MmjaxError

BLOCK = 512
MAX_HEADER_DATA = 1 << 20
"""Long names and pax headers beyond this are damage or malice."""
TEXT_SUFFIXES = ("txt", "caption", "text")


@dataclass(frozen=True)
class Member:
    """A regular file of a shard: `size` bytes at `offset`; or, with a `problem`, a placeholder for a lost one."""

    name: str
    offset: int
    size: int
    problem: str = ""
    crc32: int | None = None
    start: int = 0  # where its headers begin


class WebDataset:
    """Records of samples: members that follow each other and share the name up to its first dot (the key).

    A key and extension that come again in a row begin another sample.

    {"key", "image" (jpg, png, ...), "text" (txt, or "caption" of the json), "texts" ("captions" of the json, a list),
    "label" (cls), "json": dict, others: bytes}

    shards: a folder, a pattern ("train-*.tar", "train-{000..127}.tar"), or paths.
    needs: fields without which a sample is bad ("sample: no image").

    Raises MmjaxError: a shard is missing, none fits the pattern, a shard is compressed.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        needs: tuple[str, ...] = ("image",),
        name: str | None = None,
    ):
        self.shards = find_shards(shards)
        self.needs = needs
        self.name = name or (self.shards[0].parent.name if len(self.shards) > 1 else self.shards[0].name)
        samples: list[tuple[int, int, int]] = []  # (shard, first member, where its headers begin)
        members: list[tuple[int, int, int, int]] = []  # (offset, size, suffix, crc32 or -1)
        suffixes: dict[str, int] = {}
        digest = hashlib.sha256()
        self.problems: list[tuple[pathlib.Path, Member]] = []
        for number, shard in enumerate(self.shards):
            digest.update(shard.name.encode())
            key, sample_suffixes = None, set()
            for member in read_members(shard):
                digest.update(f"{member.name} {member.offset} {member.size} {member.problem}".encode())
                if member.problem:
                    self.problems.append((shard, member))
                    continue
                stem, suffix = _split(member.name)
                if stem != key or suffix in sample_suffixes:
                    samples.append((number, len(members), member.start))
                    key, sample_suffixes = stem, set()
                sample_suffixes.add(suffix)
                crc = -1 if member.crc32 is None else member.crc32
                members.append((member.offset, member.size, suffixes.setdefault(suffix, len(suffixes)), crc))
        # Arrays, not objects: ten million samples are to be sent to worker processes.
        self._samples = np.array([*samples, (len(self.shards), len(members), 0)], np.int64)
        self._members = np.array(members, np.int64).reshape(-1, 4)
        self._suffixes = tuple(suffixes)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        # Lost members come last, as records that raise BadRecord.
        return len(self._samples) - 1 + len(self.problems)

    def __getitem__(self, index: int) -> Record:
        name = self.record_name(index)
        if index >= len(self._samples) - 1:
            _, lost = self.problems[index - len(self._samples) + 1]
            raise BadRecord(lost.problem, name, f"{lost.name or 'member'} at byte {lost.offset}")
        shard = self.shards[self._samples[index, 0]]
        first, end = self._samples[index : index + 2, 1]
        raw: dict[str, bytes] = {}
        try:
            with shard.open("rb") as file:
                for offset, size, suffix, crc in self._members[first:end].tolist():
                    raw[self._suffixes[suffix]] = data = _read_at(file, offset, size)
                    if len(data) != size:
                        raise BadRecord("tar: cut", name, f"member at byte {offset}")
                    if crc >= 0 and zlib.crc32(data) != crc:
                        raise BadRecord("tar: changed", name, f"member at byte {offset}")
        except FileNotFoundError as error:
            raise BadRecord("file: missing", str(shard)) from error
        except OSError as error:
            raise BadRecord("file: unreadable", str(shard), str(error)) from error
        record = _record(raw, name) | {"key": name.partition("::")[2]}
        missing = [field for field in self.needs if field not in record]
        if missing:
            raise BadRecord(f"sample: no {missing[0]}", name, f"it has {sorted(raw)}")
        return record

    def record_name(self, index: int) -> str:
        """SHARD::KEY; the key is read from the shard, since keeping ten million of them would cost gigabytes."""
        if index >= len(self._samples) - 1:
            shard, lost = self.problems[index - len(self._samples) + 1]
            return f"{shard}::{lost.name or f'@{lost.offset}'}"
        number, _, start = self._samples[index].tolist()
        return f"{self.shards[number]}::{_key_at(self.shards[number], start)}"


def find_shards(shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[pathlib.Path]:
    """The shards of a folder, a pattern, or a list. Raises MmjaxError: none, missing, compressed."""
    if isinstance(shards, str | os.PathLike):
        source = os.fspath(shards)
        if os.path.isdir(source):
            paths = sorted(glob.glob(os.path.join(glob.escape(source), "*.tar")))
        else:
            patterns = _expand(source)
            paths = sorted(glob.glob(source)) if len(patterns) == 1 and glob.has_magic(source) else patterns
    else:
        source, paths = "the list of shards", [os.fspath(shard) for shard in shards]
    if not paths:
        raise MmjaxError(f"{source}: no .tar file fits")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise MmjaxError(f"{source}: {len(missing)} of {len(paths)} shards are missing: {', '.join(missing[:5])}")
    packed = [path for path in paths if not path.endswith(".tar")]
    if packed:
        raise MmjaxError(f"{packed[0]}: shards are read by random access and must be plain .tar files")
    return [pathlib.Path(path) for path in paths]


def _expand(pattern: str) -> list[str]:
    """ "a-{08..10}.tar" -> ["a-08.tar", "a-09.tar", "a-10.tar"], as the shell does."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return list(itertools.chain.from_iterable(_expand(before + number + after) for number in numbers))


# ------------------------------------------------------------------------------------------------------- samples


def _split(name: str) -> tuple[str, str]:
    """ "dir/key.seg.png" -> ("dir/key", "seg.png"): the key ends at the first dot of the last component."""
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix.lower()


def _record(raw: dict[str, bytes], name: str) -> Record:
    record: Record = {}
    for suffix, data in raw.items():
        if "." + suffix in SUFFIXES:
            record["image"] = data
        elif suffix in TEXT_SUFFIXES:
            record["text"] = clean_caption(data, name)
        elif suffix == "json":
            record["json"] = _json(data, name)
        elif suffix == "cls":
            record["label"] = _label(data, name)
        else:
            record[suffix] = data
    fields = record["json"] if isinstance(record.get("json"), dict) else {}
    if "text" not in record and "caption" in fields:
        record["text"] = clean_caption(fields["caption"], name)
    if isinstance(fields.get("captions"), list) and fields["captions"]:
        record["texts"] = tuple(clean_caption(text, name) for text in fields["captions"])
        record.setdefault("text", record["texts"][0])
    return record


def _json(data: bytes, name: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRecord("sample: not JSON", name, str(error)) from error


def _label(data: bytes, name: str) -> int:
    try:
        return int(data)
    except ValueError as error:
        raise BadRecord("sample: label is not a number", name, repr(data[:20])) from error


# --------------------------------------------------------------------------------------------------------- tar


def read_members(shard: pathlib.Path) -> Iterator[Member]:
    """The regular files of a shard in order, with a problem instead of each lost one.

    With an index beside the shard, what it lists and the shard lacks is a problem too.
    """
    scanned = list(_scan(shard))
    index = pathlib.Path(f"{shard}.index.json")
    if not index.is_file():
        return iter(scanned)
    try:
        listed = [Member(name, offset, size, "", crc) for name, offset, size, crc in json.loads(index.read_bytes())]
    except (ValueError, TypeError) as error:
        raise MmjaxError(f"{index}: not an index of a shard: {error}") from error
    there = {(member.name, member.offset, member.size): member for member in scanned if not member.problem}
    refused = [member for member in scanned if member.problem == "tar: refused member"]

    def checked(member: Member) -> Member:
        match = there.get((member.name, member.offset, member.size))
        if match is None:
            return dataclasses.replace(member, problem="tar: missing member")
        return dataclasses.replace(member, start=match.start)

    # The index knows what was lost, so that the guesses about damage are not needed.
    return iter(sorted([*map(checked, listed), *refused], key=lambda member: member.offset))


def write_index(shard: str | os.PathLike[str]) -> pathlib.Path:
    """Writes SHARD.index.json: name, offset, size and CRC-32 of each member. Raises MmjaxError if it is damaged."""
    path = pathlib.Path(shard)
    members = []
    with path.open("rb") as file:
        for member in _scan(path):
            if member.problem and member.problem != "tar: refused member":
                raise MmjaxError(f"{path}: {member.problem} at byte {member.offset}; index a whole shard")
            if not member.problem:
                crc = zlib.crc32(_read_at(file, member.offset, member.size))
                members.append([member.name, member.offset, member.size, crc])
    target = pathlib.Path(f"{path}.index.json")
    partial = target.with_suffix(".tmp")
    partial.write_text(json.dumps(members))
    os.replace(partial, target)
    return target


@dataclass(frozen=True)
class Header:
    """A member's header with the extra ones (long names) before it: its `size` bytes begin at `body`."""

    name: str
    size: int
    kind: bytes
    body: int


def _scan(shard: pathlib.Path) -> Iterator[Member]:
    """Walks the headers. Behind a damaged one, every block is tried until one is a header again."""
    total = shard.stat().st_size
    with shard.open("rb") as file:
        position, ended, damaged = 0, False, False
        while position + BLOCK <= total:
            zeros = _zero_blocks(file, position, total)
            if zeros:
                end = position + zeros * BLOCK
                # One zeroed block with more behind it is a zeroed header; two or more are an end mark, behind which
                # another archive may follow (`cat a.tar b.tar`).
                if zeros == 1 and end < total and not damaged:
                    yield Member("", position, 0, "tar: damaged header")
                    damaged = True
                ended, position = zeros > 1, end
                continue
            header = _header_at(file, position)
            if header is None or header.body + header.size > total:
                # A size that reaches beyond the end is a cut, unless other headers follow: then it is a lie.
                cut = header is not None and not _header_follows(file, header.body, total)
                if not damaged:
                    name = header.name if header else ""
                    yield Member(name, position, 0, "tar: cut" if cut else "tar: damaged header")
                damaged, position = True, position + BLOCK
                continue
            ended = damaged = False
            if header.kind != b"5":
                problem = "" if _allowed(header.name, header.kind) else "tar: refused member"
                yield Member(header.name, header.body, header.size, problem, start=position)
            position = header.body + -(-header.size // BLOCK) * BLOCK
        if not ended and not damaged:
            yield Member("", position, 0, "tar: cut")


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _zero_blocks(file: BinaryIO, position: int, total: int) -> int:
    count = 0
    while position + BLOCK <= total and not _read_at(file, position, BLOCK).strip(b"\0"):
        count, position = count + 1, position + BLOCK
    return count


def _header_follows(file: BinaryIO, position: int, total: int) -> bool:
    return any(_fields(_read_at(file, at, BLOCK)) is not None for at in range(position, total - BLOCK + 1, BLOCK))


def _header_at(file: BinaryIO, position: int) -> Header | None:
    """The member whose headers begin at `position`; None if one of their checksums is wrong."""
    overrides: dict[str, Any] = {}
    for _ in range(4):  # at most a long name, a long link and a pax header before the member's own
        fields = _fields(_read_at(file, position, BLOCK))
        if fields is None:
            return None
        name, size, kind = fields
        position += BLOCK
        if kind not in (b"L", b"K", b"x", b"g"):
            return Header(overrides.get("path", name), overrides.get("size", size), kind, position)
        if size > MAX_HEADER_DATA:
            return None
        overrides |= _long(kind, _read_at(file, position, size))
        position += -(-size // BLOCK) * BLOCK
    return None


def _fields(block: bytes) -> tuple[str, int, bytes] | None:
    """(name, size, kind) of a header block whose checksum is right, else None."""
    if len(block) < BLOCK:
        return None
    try:
        stored, size = int(block[148:156].strip(b" \0") or b"0", 8), _number(block[124:136])
    except ValueError:
        return None
    if stored != sum(block[:148]) + 8 * 32 + sum(block[156:]) or size < 0:
        return None
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0":  # GNU's own "ustar  " has other fields there
        prefix = block[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape"), size, block[156:157]


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's base 256, for 8 GB and more
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    return int(field.strip(b" \0") or b"0", 8)


def _long(kind: bytes, data: bytes) -> dict[str, Any]:
    """The fields of an extra header for the next member: its long name (GNU), or path and size (pax)."""
    if kind == b"L":
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    fields: dict[str, Any] = {}
    while kind == b"x" and (match := re.match(rb"(\d+) ([^=\n]+)=", data)):
        length = int(match[1])
        value = data[match.end() : length - 1]
        if match[2] == b"path":
            fields["path"] = value.decode("utf-8", "surrogateescape")
        if match[2] == b"size" and value.isdigit():
            fields["size"] = int(value)
        if length <= match.end():
            break
        data = data[length:]
    return fields


def _allowed(name: str, kind: bytes) -> bool:
    regular = kind in (b"0", b"\0", b"7")
    return regular and bool(name) and not name.startswith(("/", "\\")) and ".." not in re.split(r"[/\\]", name)


def _key_at(shard: pathlib.Path, start: int) -> str:
    try:
        with shard.open("rb") as file:
            header = _header_at(file, start)
    except OSError:
        header = None
    return _split(header.name)[0] if header else f"@{start}"
