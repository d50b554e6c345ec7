"""The newc writer and reader: golden bytes, judged by GNU cpio and bsdtar, and hostile input."""

from __future__ import annotations

import io
import os
import random
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systemfiles.foundation import cpio, cpioreader
from systemfiles.foundation.cpio import Record
from systemfiles.foundation.cpioreader import Limits
from systemfiles.foundation.errors import InvalidArchive

EVERY_KIND = [
    cpio.file("init", b"#!/bin/sh\n", mode=0o755),
    cpio.directory("dev"),
    cpio.char_device("dev/console", 5, 1),
    cpio.block_device("dev/vda", 254, 0, mode=0o660),
    cpio.file("bin/busybox", b"abcde", mode=0o4755),
    cpio.hardlink("bin/sh", "bin/busybox"),
    cpio.symlink("sbin", "bin"),
    cpio.file("grüße", b""),
]


def entry(fields: str, rest: bytes) -> bytes:
    return b"070701" + "".join(field.rjust(8, "0") for field in fields.split()).encode() + rest


GOLDEN = b"".join(
    [
        #     ino mode uid gid nlink mtime size dev- dev rdev- rdev namesize check
        entry(" 1 41ED   0   0     2     0    0    0   0     0    0        4     0", b"bin\0\0\0"),
        entry(" 2 89ED   0   0     2     0    0    0   0     0    0        C     0", b"bin/busybox\0\0\0"),
        entry(
            " 2 89ED   0   0     2     0    5    0   0     0    0        7     0", b"bin/sh\0\0\0\0" + b"abcde\0\0\0"
        ),
        entry(" 3 41ED   0   0     2     0    0    0   0     0    0        4     0", b"dev\0\0\0"),
        entry(" 4 2180   0   0     1     0    0    0   0     5    1        C     0", b"dev/console\0\0\0"),
        entry(" 5 61B0   0   0     1     0    0    0   0    FE    0        8     0", b"dev/vda\0\0\0"),
        entry(" 6 81A4   0   0     1     0    0    0   0     0    0        8     0", b"gr\xc3\xbc\xc3\x9fe\0\0\0"),
        entry(" 7 81ED   0   0     1     0    A    0   0     0    0        5     0", b"init\0\0" + b"#!/bin/sh\n\0\0"),
        entry(" 8 A1FF   0   0     1     0    3    0   0     0    0        5     0", b"sbin\0\0" + b"bin\0"),
        entry(" 0    0   0   0     1     0    0    0   0     0    0        B     0", b"TRAILER!!!\0\0\0\0"),
    ]
).ljust(1536, b"\0")


def written(*records: Record) -> bytes:
    out = io.BytesIO()
    size = cpio.write(records, out)
    assert size == len(out.getvalue())
    return out.getvalue()


def run(*command: str, stdin: bytes = b"", cwd: Path | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    done = subprocess.run(command, input=stdin, cwd=cwd, env=environment, capture_output=True, check=True)
    return done.stdout.decode()


def test_every_kind_of_entry_is_written_to_the_byte() -> None:
    assert written(*EVERY_KIND) == GOLDEN


def test_the_order_of_records_does_not_matter() -> None:
    for seed in range(20):
        shuffled = list(EVERY_KIND)
        random.Random(seed).shuffle(shuffled)
        assert written(*shuffled) == GOLDEN


def test_naming_the_other_name_of_a_hard_link_first_does_not_matter() -> None:
    one = written(cpio.file("a", b"x", mode=0o600), cpio.hardlink("b", "a"))
    assert one == written(cpio.file("b", b"x", mode=0o600), cpio.hardlink("a", "b"))


def test_the_bytes_depend_neither_on_locale_nor_time_zone_nor_umask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    before = os.umask(0o077)
    try:
        assert written(*EVERY_KIND) == GOLDEN
    finally:
        os.umask(before)


def test_gnu_cpio_lists_every_entry_as_it_is() -> None:
    rows = [line.split() for line in run("cpio", "-itvn", "--quiet", stdin=GOLDEN).splitlines()]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("drwxr-xr-x", "2", "bin"),
        ("-rwsr-xr-x", "2", "bin/busybox"),
        ("-rwsr-xr-x", "2", "bin/sh"),
        ("drwxr-xr-x", "2", "dev"),
        ("crw-------", "1", "dev/console"),
        ("brw-rw----", "1", "dev/vda"),
        ("-rw-r--r--", "1", "grüße"),
        ("-rwxr-xr-x", "1", "init"),
        ("lrwxrwxrwx", "1", "bin"),
    ]
    assert rows[4][4:6] == ["5,", "1"]
    assert rows[5][4:6] == ["254,", "0"]
    assert rows[8][-3:] == ["sbin", "->", "bin"]
    assert all(row[2:4] == ["0", "0"] and row[-2] == "1970" for row in rows[:8])


def test_bsdtar_lists_every_entry_as_it_is() -> None:
    rows = [line.split() for line in run("bsdtar", "-tvnf", "-", stdin=GOLDEN).splitlines()]
    assert [(row[0], " ".join(row[8:])) for row in rows] == [
        ("drwxr-xr-x", "bin"),
        ("-rwsr-xr-x", "bin/busybox"),
        ("-rwsr-xr-x", "bin/sh link to bin/busybox"),
        ("drwxr-xr-x", "dev"),
        ("crw-------", "dev/console"),
        ("brw-rw----", "dev/vda"),
        ("-rw-r--r--", "grüße"),
        ("-rwxr-xr-x", "init"),
        ("lrwxrwxrwx", "sbin -> bin"),
    ]
    assert [row[4] for row in rows[4:6]] == ["5,1", "254,0"]


def test_gnu_cpio_extracts_content_modes_and_links(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(3_000_001))
    archive = written(
        cpio.file("a/copy", tmp_path / "big", mode=0o640),
        cpio.hardlink("a/twin", "a/copy"),
        cpio.symlink("link", "a/copy"),
        cpio.directory("empty", mode=0o700),
        cpio.file("ключ", b"text"),
    )
    root = tmp_path / "root"
    root.mkdir()
    run("cpio", "-id", "--quiet", "--no-absolute-filenames", stdin=archive, cwd=root)
    assert (root / "a/copy").read_bytes() == (tmp_path / "big").read_bytes()
    assert (root / "a/copy").samefile(root / "a/twin")
    assert stat.S_IMODE((root / "a/twin").stat().st_mode) == 0o640
    assert (root / "link").readlink() == Path("a/copy")
    assert stat.S_IMODE((root / "empty").stat().st_mode) == 0o700
    assert (root / "ключ").read_bytes() == b"text"


def test_what_gnu_cpio_writes_is_read(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/one").write_bytes(b"content")
    (tmp_path / "dir/one").chmod(0o751)
    (tmp_path / "dir/two").hardlink_to(tmp_path / "dir/one")
    (tmp_path / "dir/three").symlink_to("nowhere")
    os.mkfifo(tmp_path / "dir/four", 0o600)
    names = b"dir\ndir/one\ndir/two\ndir/three\ndir/four\n"
    done = subprocess.run(
        ["cpio", "-oH", "newc", "--quiet"], input=names, cwd=tmp_path, capture_output=True, check=True
    )
    records = [replace(record, uid=0, gid=0, mtime=0) for record in cpioreader.read(io.BytesIO(done.stdout))]
    assert records[1:] == [
        Record("dir/one", stat.S_IFREG | 0o751, b"content"),
        Record("dir/two", stat.S_IFREG | 0o751, hardlink="dir/one"),
        cpio.symlink("dir/three", "nowhere"),
        Record("dir/four", stat.S_IFIFO | 0o600),
    ]


def test_content_in_the_first_name_of_a_hard_link_is_read_too() -> None:
    first = GOLDEN.index(b"bin/busybox") - 110
    second = GOLDEN.index(b"bin/sh") - 110
    head, busybox, sh, tail = GOLDEN[:first], GOLDEN[first:second], GOLDEN[second:-1], GOLDEN[-1:]
    busybox = busybox[:54] + b"00000005" + busybox[62:] + b"abcde\0\0\0"
    sh = sh[:54] + b"00000000" + sh[62:].replace(b"abcde\0\0\0", b"", 1)
    assert cpioreader.read(io.BytesIO(head + busybox + sh + tail)) == cpio.normalise(EVERY_KIND)


def test_missing_parents_are_added_before_their_children() -> None:
    names = [record.name for record in cpio.normalise([cpio.file("a/b/c", b""), cpio.file("a-b", b"")])]
    assert names == ["a", "a-b", "a/b", "a/b/c"]


def test_a_hard_link_to_a_symbolic_link_becomes_one_of_its_own() -> None:
    assert cpio.normalise([cpio.symlink("b", "x"), cpio.hardlink("a", "b")]) == (
        cpio.symlink("a", "x"),
        cpio.symlink("b", "x"),
    )


@pytest.mark.parametrize(
    "name",
    [
        *("", "/etc", "..", "../x", "a/../b", "a/..", ".", "./a", "a//b", "a/", "a\0b", "TRAILER!!!", "\ud800"),
        *("n" * 256, "/".join(["n" * 200] * 21)),
    ],
)
def test_a_name_that_is_no_plain_relative_path_is_refused(name: str) -> None:
    with pytest.raises(InvalidArchive):
        cpio.normalise([cpio.file(name, b"")])


@pytest.mark.parametrize(
    "records",
    [
        [cpio.file("a", b"1"), cpio.file("a", b"2")],
        [cpio.file("a", b""), cpio.file("a/b", b"")],
        [cpio.symlink("a", "/tmp"), cpio.file("a/b/c", b"")],
        [cpio.hardlink("a", "b")],
        [cpio.hardlink("a", "a")],
        [cpio.directory("a"), cpio.hardlink("b", "a")],
        [cpio.file("a", b""), cpio.hardlink("b", "a"), cpio.hardlink("c", "b")],
        [cpio.symlink("a", "")],
        [cpio.symlink("a", "x\0y")],
        [cpio.symlink("a", "x" * 4096)],
        [Record("a", stat.S_IFLNK | 0o777, Path("/etc/hostname"))],
        [cpio.char_device("a", 4096, 0)],
        [cpio.block_device("a", 0, 1 << 20)],
        [cpio.char_device("a", -1, 0)],
        [replace(cpio.file("a", b""), rdev=(1, 3))],
        [replace(cpio.directory("a"), data=b"x")],
        [Record("a", 0o644)],
        [Record("a", 0o1100644)],
        [replace(cpio.file("a", b""), uid=-1)],
        [replace(cpio.file("a", b""), mtime=1 << 32)],
    ],
)
def test_what_the_format_or_the_kernel_cannot_hold_is_refused(records: list[Record]) -> None:
    with pytest.raises(InvalidArchive):
        cpio.normalise(records)


def test_a_link_target_that_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(InvalidArchive, match="link target"):
        cpio.symlink("a", "\udfff\ud800")


def test_a_file_of_four_gibibytes_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(1 << 32)
    with pytest.raises(InvalidArchive, match="4294967296"):
        written(cpio.file("huge", tmp_path / "huge"))


def test_a_file_that_changes_its_size_while_it_is_copied_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "file"

    class Meddling(io.BytesIO):
        """The first flush happens in the middle of the file; that is when it changes."""

        size = 0

        def write(self, data: object, /) -> int:
            os.truncate(source, self.size)
            return super().write(data)  # type: ignore[arg-type]

    for size in (1_500_000, 3_000_000):
        source.write_bytes(bytes(2_000_000))
        out = Meddling()
        out.size = size
        with pytest.raises(InvalidArchive, match="size changed"):
            cpio.write([cpio.file("file", source)], out)


@pytest.mark.parametrize("kind", ["missing", "link", "fifo", "directory"])
def test_only_a_regular_file_is_read_from_the_host(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "link":
        path.symlink_to("/etc/hostname")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    with pytest.raises(InvalidArchive):
        written(cpio.file("a", path))


def test_a_stream_that_takes_a_little_at_a_time_gets_everything() -> None:
    class Slow(io.BytesIO):
        def write(self, data: memoryview, /) -> int:  # type: ignore[override]
            return super().write(data[:100])

    out = Slow()
    cpio.write(EVERY_KIND, out)
    assert out.getvalue() == GOLDEN


def test_content_larger_than_any_buffer_survives(tmp_path: Path) -> None:
    content = os.urandom((5 << 20) + 3)
    (tmp_path / "file").write_bytes(content)
    archive = written(cpio.file("a", content), cpio.file("b", tmp_path / "file"), cpio.file("c", b"end"))
    assert [record.data for record in cpioreader.read(io.BytesIO(archive))] == [content, content, b"end"]


def test_an_archive_cut_before_its_end_is_refused() -> None:
    whole = len(GOLDEN.rstrip(b"\0")) + 4  # the trailer's padding
    for length in range(whole):
        with pytest.raises(InvalidArchive):
            cpioreader.read(io.BytesIO(GOLDEN[:length]))
    assert cpioreader.read(io.BytesIO(GOLDEN[:whole])) == cpio.normalise(EVERY_KIND)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"070701", b"070707"),
        (b"070701", b"070702"),
        (b"00000004", b"0000_004"),
        (b"00000004", b"      +4"),
        (b"00000004", b"00000000"),
        (b"00000004", b"FFFFFFFF"),
        (b"00000004", b"00000003"),
        (b"bin\0\0\0", b"b\0n\0\0\0"),
        (b"bin\0\0\0", b"bin\0x\0"),
        (b"000041ED", b"000001ED"),
        (b"000041ED", b"100041ED"),
        (b"00000002" + b"00000000" * 2, b"00000002" + b"00000000" + b"00000010"),
    ],
)
def test_a_damaged_header_is_refused(old: bytes, new: bytes) -> None:
    with pytest.raises(InvalidArchive):
        cpioreader.read(io.BytesIO(GOLDEN.replace(old, new, 1)))


def test_anything_after_the_trailer_is_refused() -> None:
    with pytest.raises(InvalidArchive, match="after the trailer"):
        cpioreader.read(io.BytesIO(GOLDEN + b"\0" * 5000 + b"x"))
    assert cpioreader.read(io.BytesIO(GOLDEN + b"\0" * 5000)) == cpio.normalise(EVERY_KIND)


def test_more_than_the_limits_is_refused_before_it_is_read() -> None:
    with pytest.raises(InvalidArchive, match="8 entries"):
        cpioreader.read(io.BytesIO(GOLDEN), limits=Limits(entries=8))
    with pytest.raises(InvalidArchive, match="1000 bytes"):
        cpioreader.read(io.BytesIO(GOLDEN), limits=Limits(size=1000))
    with pytest.raises(InvalidArchive, match="larger than"):
        cpioreader.read(io.BytesIO(GOLDEN.replace(b"0000000A", b"FFFFFFF0", 1)))


def test_two_contents_of_one_file_are_refused() -> None:
    start = GOLDEN.index(b"bin/busybox") - 110
    end = GOLDEN.index(b"bin/sh") - 110
    other = GOLDEN[start:end]
    other = other[:54] + b"00000005" + other[62:] + b"other\0\0\0"
    with pytest.raises(InvalidArchive, match="two contents"):
        cpioreader.read(io.BytesIO(GOLDEN[:start] + other + GOLDEN[end:]))


def test_names_that_are_not_utf_8_survive() -> None:
    archive = GOLDEN.replace(b"gr\xc3\xbc\xc3\x9fe", b"gr\xfc\xdf\x00e"[:4] + b"\xfe\xffe")
    records = cpioreader.read(io.BytesIO(archive))
    assert records[6].name.encode("utf-8", "surrogateescape") == b"gr\xfc\xdf\xfe\xffe"
    assert written(*records) == archive


PARTS = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8)
NAMES = st.lists(PARTS.filter(lambda part: part not in (".", "..")), min_size=1, max_size=4).map("/".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, st.binary(max_size=20), st.integers(0, 0o7777), st.integers(0, 3)), max_size=12))
def test_what_was_written_is_what_is_read(entries: list[tuple[str, bytes, int, int]]) -> None:
    records: dict[str, Record] = {}
    for name, data, mode, kind in entries:
        parents = {"/".join(name.split("/")[:depth]) for depth in range(1, name.count("/") + 1)}
        inside = any(other.startswith(f"{name}/") for other in records)
        if name == "TRAILER!!!" or name in records or any(parent in records for parent in parents) or inside:
            continue
        first = next((r.name for r in records.values() if r.type == stat.S_IFREG and not r.hardlink), None)
        if kind == 1 and data.strip(b"\0"):
            records[name] = cpio.symlink(name, data.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
        elif kind == 2 and first:
            records[name] = cpio.hardlink(name, first)
        elif kind == 3:
            records[name] = cpio.char_device(name, mode, mode, mode=mode)
        else:
            records[name] = cpio.file(name, data, mode=mode)
    normal = cpio.normalise(records.values())
    assert cpioreader.read(io.BytesIO(written(*records.values()))) == normal == cpio.normalise(reversed(normal))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.binary())
def test_arbitrary_damage_gives_records_or_one_typed_error(damage: list[tuple[int, int]], junk: bytes) -> None:
    archive = bytearray(GOLDEN)
    for place, value in damage:
        archive[place] = value
    for stream in (bytes(archive), junk, GOLDEN[:110] + junk):
        try:
            records = cpioreader.read(io.BytesIO(stream))
        except InvalidArchive:
            continue
        assert all(isinstance(record, Record) for record in records)
