"""busybox: which names a binary answers to, and what of a package becomes a layer."""

from __future__ import annotations

import io
import struct
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import InvalidArchive
from systemfiles.recipes.busybox import applets, layer_from_deb

INSTALLED = Path("/bin/busybox")  # busybox-static, which `doit setup tests=yes` installs
HOST = Arch.host()
OTHER = next(arch for arch in Arch if arch is not HOST)


def deb(path: Path, files: dict[str, bytes]) -> Path:
    """A Debian package (deb(5)) with these files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1
            archive.addfile(info, io.BytesIO(content))
    with path.open("wb") as out:
        out.write(b"!<arch>\n")
        for name, content in (("debian-binary", b"2.0\n"), ("data.tar.gz", data.getvalue())):
            out.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
            out.write(content + b"\n" * (len(content) % 2))
    return path


def elf(*, machine: int = 62, segments: tuple[int, ...] = (1,), kind: int = 2) -> bytes:
    """The headers of a 64-bit little-endian program (elf(5)) with segments of these types: 1 PT_LOAD, 3 PT_INTERP."""
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    return identity + header + b"".join(struct.pack("<IIQQQQQQ", part, 5, 0, 0, 0, 0, 0, 0) for part in segments)


@pytest.fixture(scope="module")
def binary() -> bytes:
    return INSTALLED.read_bytes()


def problem(package: Path, arch: Arch = Arch.X86_64) -> str:
    with pytest.raises(InvalidArchive) as caught:
        layer_from_deb(package, arch)
    return str(caught.value)


# names


def test_the_names_are_those_that_busybox_itself_lists(binary: bytes) -> None:
    listed = subprocess.run([INSTALLED, "--list"], check=True, capture_output=True, text=True).stdout.split()
    assert applets(binary) == tuple(sorted(listed))
    assert len(listed) > 200


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF" + bytes(1000), b"sh\0mount\0cat\0", b"aa\0" * 1000, b"\0" * 1_000_000]
)
def test_what_has_no_table_of_names_is_no_busybox(content: bytes) -> None:
    with pytest.raises(InvalidArchive):
        applets(content)


def test_other_lists_of_words_are_not_taken_for_the_table() -> None:
    words = b"".join(b"word%d\0" % number for number in range(100))
    table = b"".join(b"%s\0" % name for name in [b"cat", b"mount", b"sh", *(b"x%d" % number for number in range(60))])
    assert set(applets(b"\xff" + words + b"\xff" + table + b"\xff")) >= {"cat", "mount", "sh", "x59"}
    assert "word1" not in applets(b"\xff" + words + b"\xff" + table + b"\xff")


@pytest.mark.parametrize(
    "content",
    [b"a" * 50_000, b"ab\0" * 30_000, (b"\0mount\0" + b"a" * 16_000) * 8, b"\0mount\0" * 20_000],
    ids=["long word", "many words", "mount and long words", "mount alone"],
)
def test_a_hostile_binary_is_searched_in_no_time(content: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidArchive):
        applets(content)
    assert time.monotonic() - began < 0.5


# layers


@pytest.mark.parametrize("place", ["./bin/busybox", "./usr/bin/busybox", "bin/busybox"])
def test_a_layer_holds_busybox_alone(tmp_path: Path, binary: bytes, place: str) -> None:
    package = deb(tmp_path / "busybox.deb", {"./usr/share/doc/busybox": b"text", place: binary})
    with tarfile.open(fileobj=io.BytesIO(layer_from_deb(package, HOST))) as layer:
        assert [(info.name, info.type, info.mode) for info in layer] == [
            ("bin", tarfile.DIRTYPE, 0o755),
            ("bin/busybox", tarfile.REGTYPE, 0o755),
        ]
        assert {(info.uid, info.gid, info.mtime, info.uname) for info in layer} == {(0, 0, 0, "")}
        content = layer.extractfile("bin/busybox")
        assert content is not None
        assert content.read() == binary


def test_the_same_busybox_is_the_same_layer_whatever_is_packed_around_it(tmp_path: Path) -> None:
    one = deb(tmp_path / "one.deb", {"./bin/busybox": elf()})
    other = deb(tmp_path / "other.deb", {"./a": b"a", "./usr/bin/busybox": elf(), "./z": b"z"})
    assert layer_from_deb(one, Arch.X86_64) == layer_from_deb(other, Arch.X86_64)


def test_a_package_without_busybox_is_refused(tmp_path: Path) -> None:
    package = deb(tmp_path / "x.deb", {"./bin/toybox": elf(), "./opt/bin/busybox": elf(), "./bin/busybox/x": elf()})
    assert "/bin/busybox" in problem(package)


def test_a_busybox_for_another_architecture_is_refused(tmp_path: Path, binary: bytes) -> None:
    found = problem(deb(tmp_path / "x.deb", {"./bin/busybox": binary}), OTHER)
    assert str(OTHER) in found


def test_a_busybox_that_needs_libraries_is_refused(tmp_path: Path) -> None:
    package = deb(tmp_path / "x.deb", {"./bin/busybox": elf(segments=(1, 3))})
    assert "shared libraries" in problem(package)


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF", elf()[:40], elf()[:-10], elf(machine=0xBEEF)])
def test_a_busybox_that_is_no_program_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "busybox" in problem(deb(tmp_path / "x.deb", {"./bin/busybox": content}))


def test_an_absurdly_large_busybox_is_refused_without_reading_it(tmp_path: Path) -> None:
    package = deb(tmp_path / "x.deb", {"./bin/busybox": bytes((64 << 20) + 1)})
    assert "/bin/busybox" in problem(package)


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.deb").write_bytes(b"<html>")
    assert "not a Debian package" in problem(tmp_path / "x.deb")


@given(st.lists(st.tuples(st.integers(0, 175), st.integers(0, 255)), min_size=1, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
def test_damaged_headers_are_refused_or_harmless(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(elf(segments=(1, 1)) + bytes(100))
    for position, value in changes:
        content[position] = value
    package = deb(tmp_path / "x.deb", {"./bin/busybox": bytes(content)})
    try:
        layer = layer_from_deb(package, Arch.X86_64)
    except InvalidArchive:
        return
    assert bytes(content) in layer
