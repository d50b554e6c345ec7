"""Debian packages: every file of a sound one, one typed error for any other."""

from __future__ import annotations

import bz2
import contextlib
import io
import shutil
import subprocess
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from systemfiles.foundation import deb
from systemfiles.foundation.deb import read_deb
from systemfiles.foundation.errors import InvalidArchive

CONTROL = b"Package: thing\nVersion: 1\n"


def member(name: str, data: bytes, *, size: str | None = None, end: bytes = b"`\n") -> bytes:
    """One member of an ar archive (deb(5), ar(5)): a header of 60 bytes, the data, and a newline to make it even."""
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{size or str(len(data)):<10}".encode() + end
    return header + data + b"\n" * (len(data) % 2)


def ar(*members: bytes) -> bytes:
    return b"!<arch>\n" + b"".join(members)


def tar(files: dict[str, bytes], *, mode: str = "w:xz", more: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in more:
            archive.addfile(info)
    return out.getvalue()


def package(data: bytes, name: str = "data.tar.xz") -> bytes:
    return ar(
        member("debian-binary", b"2.0\n"),
        member("control.tar.gz", tar({"./control": CONTROL}, mode="w:gz")),
        member(name, data),
    )


def entry(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


FILES = {"./boot/vmlinuz-1": b"kernel" * 1000, "./usr/share/doc/ü": b"", "./odd": b"x" * 1001}
READ = {"boot/vmlinuz-1": FILES["./boot/vmlinuz-1"], "usr/share/doc/ü": b"", "odd": FILES["./odd"]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "thing.deb"


def read(path: Path, data: bytes) -> dict[str, bytes]:
    path.write_bytes(data)
    return {file.path: file.read() for file in read_deb(path)}


def problem(path: Path, data: bytes) -> str:
    with pytest.raises(InvalidArchive) as caught:
        read(path, data)
    assert caught.value.subject == path
    return caught.value.problem


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("data.tar.xz", "w:xz"),
        ("data.tar.gz", "w:gz"),
        ("data.tar.bz2", "w:bz2"),
        ("data.tar", "w"),
        ("data.tar/", "w"),
    ],
)
def test_every_file_of_a_package_is_read_however_it_is_packed(path: Path, name: str, mode: str) -> None:
    assert read(path, package(tar(FILES, mode=mode), name)) == READ


def test_a_package_made_by_debians_own_tool_is_read(path: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_bytes(CONTROL + b"Architecture: all\nMaintainer: x\nDescription: x\n")
    (root / "bin").mkdir()
    (root / "bin" / "busybox").write_bytes(b"busybox")
    (root / "bin" / "sh").symlink_to("busybox")
    tool = shutil.which("dpkg-deb")
    assert tool, "dpkg is part of what provisioning needs"
    subprocess.run([tool, "--root-owner-group", "-b", root, path], check=True, capture_output=True)
    assert {file.path: (file.size, file.read()) for file in read_deb(path)} == {"bin/busybox": (7, b"busybox")}


def test_the_packages_order_is_kept_and_files_may_be_passed_over(path: Path) -> None:
    path.write_bytes(package(tar(FILES)))
    assert [(file.path, file.size) for file in read_deb(path)] == [(name, len(data)) for name, data in READ.items()]


def test_a_large_file_comes_in_blocks(path: Path) -> None:
    path.write_bytes(package(tar({"./big": bytes(5 << 20)})))
    (sizes,) = ([len(block) for block in file.blocks()] for file in read_deb(path))
    assert sum(sizes) == 5 << 20
    assert max(sizes) <= 1 << 20


def test_only_regular_files_are_given_out(path: Path) -> None:
    others = (
        entry("./dir", tarfile.DIRTYPE),
        entry("./link", tarfile.SYMTYPE, "/etc/passwd"),
        entry("./null", tarfile.CHRTYPE),
        entry("./pipe", tarfile.FIFOTYPE),
    )
    assert read(path, package(tar({"./file": b"x"}, more=others))) == {"file": b"x"}


def test_a_name_that_is_no_utf8_is_a_text_all_the_same(path: Path) -> None:
    raw = tar({"./mus?": b"x"}, mode="w").replace(b"./mus?", b"./mus\xe9")
    checksum = sum(raw[:148]) + 8 * 32 + sum(raw[156:512])
    raw = raw[:148] + f"{checksum:06o}\0 ".encode() + raw[156:]
    with contextlib.suppress(InvalidArchive):
        assert all(isinstance(name, str) for name in read(path, package(raw, "data.tar")))


NO_PACKAGES = {
    "empty": b"",
    "web page": b"<!DOCTYPE html><html></html>",
    "other archive": tar(FILES),
    "cut in the magic": b"!<arc",
    "no members": ar(),
    "no data": ar(member("debian-binary", b"2.0\n")),
    "data under another name": package(tar(FILES), "data.zip"),
    "two data members": ar(member("data.tar.xz", tar(FILES)), member("data.tar", tar(FILES, mode="w"))),
    "cut in a header": package(tar(FILES)) + b"x" * 30,
    "header without its end": ar(member("data.tar", tar(FILES, mode="w"), end=b"??")),
    "size that is no number": ar(member("data.tar", b"", size="1e3")),
    "negative size": ar(member("data.tar", b"", size="-68")),
    "size beyond the end": ar(member("data.tar", b"x", size="9999999999")),
    "no size": ar(member("data.tar", b"", size=" ")),
    "data that is no tar": package(b"x" * 5000, "data.tar"),
    "data that is no xz": package(b"x" * 5000),
    "data that is cut off": package(tar(FILES)[:-100]),
    "tar that is cut off": package(tar(FILES, mode="w")[:2000], "data.tar"),
}


@pytest.mark.parametrize("data", NO_PACKAGES.values(), ids=NO_PACKAGES.keys())
def test_what_is_no_whole_package_is_refused_with_why(path: Path, data: bytes) -> None:
    assert problem(path, data)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_package_is_refused(path: Path, share: float) -> None:
    whole = package(tar(FILES))
    assert problem(path, whole[: int(len(whole) * share)])


def test_a_flipped_bit_in_the_packed_data_is_refused(path: Path) -> None:
    whole = bytearray(package(tar(FILES)))
    whole[-60] ^= 1
    assert problem(path, bytes(whole))


def test_too_many_entries_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deb, "MOST_ENTRIES", 100)
    assert len(read(path, package(tar({f"./{n}": b"" for n in range(100)})))) == 100
    assert "more than" in problem(path, package(tar({f"./{n}": b"" for n in range(101)})))


def test_more_than_the_limit_is_refused_before_it_is_unpacked(path: Path) -> None:
    info = tarfile.TarInfo("./bomb")
    info.size = deb.LARGEST_UNPACKED + 1
    bomb = info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)
    began = time.monotonic()
    assert "more than" in problem(path, package(bomb, "data.tar"))
    assert time.monotonic() - began < 2


def test_a_package_of_a_few_bytes_does_not_unpack_to_gigabytes(path: Path) -> None:
    head = tarfile.TarInfo("./bomb")
    head.size = 3 << 30
    zeros = bz2.compress(bytes(45 << 20))
    path.write_bytes(package(bz2.compress(head.tobuf(tarfile.GNU_FORMAT)) + zeros * 70, "data.tar.bz2"))
    assert path.stat().st_size < 10_000
    began = time.process_time()
    assert "too many times" in problem(path, path.read_bytes())
    assert time.process_time() - began < 3


def test_a_bomb_that_is_passed_over_takes_no_memory(path: Path) -> None:
    path.write_bytes(package(tar({"./bomb": bytes(64 << 20)}, mode="w:gz"), "data.tar.gz"))
    tracemalloc.start()
    try:
        assert [file.size for file in read_deb(path)] == [64 << 20]
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_any_damage_is_an_invalid_archive_or_none(path: Path, data: st.DataObject) -> None:
    whole = bytearray(package(tar(FILES, mode="w"), "data.tar"))
    for _ in range(data.draw(st.integers(1, 4))):
        # mostly headers: of ar, and the first of the tar
        position = data.draw(st.integers(0, 800) | st.integers(0, len(whole) - 1))
        whole[position] = data.draw(st.sampled_from(b"\0\xff09-` /") | st.integers(0, 255))
    with contextlib.suppress(InvalidArchive):
        assert all(isinstance(name, str) for name in read(path, bytes(whole)))


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_bytes_of_any_kind_after_the_magic_are_refused(path: Path, junk: bytes) -> None:
    assert problem(path, b"!<arch>\n" + junk)
