"""Disks made without privilege, read back by the tools of those who made the file systems."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from systemfiles.content.descriptors import Descriptor
from systemfiles.content.layout import Layout
from systemfiles.foundation.errors import InvalidArchive, NoSpace, StoreError, UsageError
from systemfiles.foundation.paths import Paths
from systemfiles.recipes.disks import (
    DiskFormat,
    write_config_disk,
    write_overlay_disk,
    write_rootfs_disk,
)
from systemfiles.recipes.guestconfig import GuestConfig
from systemfiles.recipes.imagetree import Limits
from tests.conftest import CHECKOUT, Provisioned
from tests.integration.support import as_nobody, nobody
from tests.unit.test_layers import Member, directory, file, hardlink, member, symlink, tar

FORMATS: tuple[DiskFormat, ...] = get_args(DiskFormat)
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service+ep
GUEST = GuestConfig(entrypoint=["/bin/sh", "-c"], cmd=["echo it's $HOME"])

both = pytest.mark.parametrize("format", FORMATS)


def layer(*members: Member) -> io.BytesIO:
    return io.BytesIO(tar(*members))


def owned(entry: Member, uid: int, gid: int, *, mtime: str = "0", xattrs: dict[str, bytes] | None = None) -> Member:
    info, data = entry
    info.uid, info.gid = uid, gid
    info.pax_headers = {"mtime": mtime}
    for name, value in (xattrs or {}).items():
        info.pax_headers[f"SCHILY.xattr.{name}"] = value.decode("utf-8", "surrogateescape")
    return info, data


def device(name: str, kind: bytes, major: int, minor: int) -> Member:
    info, data = member(name, kind)
    info.devmajor, info.devminor = major, minor
    return info, data


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(*command: str | Path) -> str:
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="surrogateescape")
    return done.stdout


def check(disk: Path, format: str) -> None:
    """Lets the file system's own checker look at everything; it fails when it would change anything."""
    run(*(("e2fsck", "-fn") if format == "ext4" else ("fsck.erofs",)), disk)


def unpacked(disk: Path, format: str, to: Path) -> dict[str, bytes | str | None]:
    """All names, with files' bytes, links' targets, and None for directories. Device nodes need privilege."""
    to.mkdir()
    if format == "ext4":
        run("debugfs", "-R", f"rdump / {to}", disk)
    else:
        run("fsck.erofs", f"--extract={to}/root", "--no-preserve", disk)
        to /= "root"
    found: dict[str, bytes | str | None] = {}
    for path in to.rglob("*"):
        name = str(path.relative_to(to))
        if path.is_symlink():
            found[name] = os.readlink(path)  # noqa: PTH115  # which keeps every slash
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def stated(disk: Path, format: str, path: str) -> dict[str, str]:
    """Mode, owner, links, modification time (as it is kept) and attributes of one file, in the checker's words."""
    if format == "ext4":
        text = run("debugfs", "-R", f'stat "{path}"', disk)
        pattern = r"Type: (?P<type>.+?) +Mode: +(?P<mode>\d+).*User: +(?P<uid>\d+) +Group: +(?P<gid>\d+).*"
        pattern += r"Links: (?P<links>\d+).*mtime: (?P<mtime>0x\w+:\w+)"
    else:
        text = run("dump.erofs", f"--path={path}", disk)
        pattern = r"On-disk size: \d+ +(?P<type>\w+).*Links: (?P<links>\d+).*Xattr size: (?P<xattrs>\d+)\n"
        pattern += r"Uid: (?P<uid>\d+) +Gid: (?P<gid>\d+) +Access: (?P<mode>\d+).*Timestamp: (?P<mtime>.+)"
    told = re.search(pattern, text, re.DOTALL)
    assert told, text
    return told.groupdict()


SAMPLE = (
    directory("bin", mode=0o755),
    owned(file("bin/su", b"su" * 5000, mode=0o4755), 0, 0, mtime="1700000000.123456789"),
    hardlink("bin/su-too", "bin/su"),
    owned(file("bin/ping", b"ping", mode=0o755), 1, 2, xattrs={"security.capability": CAPABILITY}),
    owned(directory("home", mode=0o2770), 70000, 80000, mtime="-5"),
    symlink("short", "bin"),
    symlink("long", "x/" * 2000),
    symlink("just-inline", "y" * 59),
    symlink("just-not-inline", "y" * 60),
    file("empty"),
    file("a-block", b"b" * 4096),
    file("a-block-and-a-byte", b"b" * 4097),
    device("null", tarfile.CHRTYPE, 1, 3),
    device("disk", tarfile.BLKTYPE, 259, 70000),
    member("fifo", tarfile.FIFOTYPE),
    file("täg"),
    file("latin-\udcff"),
    file("two\nlines"),
)


# --- what is on a disk ---


@both
def test_everything_in_the_layers_is_on_the_disk(tmp_path: Path, format: DiskFormat) -> None:
    disk = tmp_path / "disk"
    write_rootfs_disk(disk, [layer(*SAMPLE)], format=format)
    check(disk, format)
    found = unpacked(disk, format, tmp_path / "found")
    with tarfile.open(fileobj=layer(*SAMPLE), errors="surrogateescape") as archive:
        for info in archive:
            if info.issym():
                assert found[info.name] == info.linkname
            elif info.isreg() or info.islnk():
                content = archive.extractfile(info)
                assert content is not None
                assert found[info.name] == content.read()
            elif info.isdir():
                assert found[info.name] is None


def test_modes_owners_times_links_and_devices_are_those_of_the_layers_on_ext4(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    write_rootfs_disk(disk, [layer(*SAMPLE)])
    su = stated(disk, "ext4", "/bin/su")
    # seconds, and nanoseconds shifted by the two bits that extend the seconds
    assert su == stated(disk, "ext4", "/bin/su-too") | {"mtime": f"0x{1700000000:08x}:{123456789 << 2:08x}"}
    assert (su["mode"], su["links"]) == ("04755", "2")
    home = stated(disk, "ext4", "/home")
    assert home == {
        "type": "directory",
        "mode": "02770",
        "uid": "70000",
        "gid": "80000",
        "links": "2",
        "mtime": f"0x{(1 << 32) - 5:08x}:00000000",
    }
    assert "(New-style) Device major/minor number: 259:70000" in run("debugfs", "-R", "stat /disk", disk)
    assert "Device major/minor number: 01:03" in run("debugfs", "-R", "stat /null", disk)
    assert stated(disk, "ext4", "/fifo")["type"] == "FIFO"


def test_modes_owners_times_and_links_are_those_of_the_layers_on_erofs(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    write_rootfs_disk(disk, [layer(*SAMPLE)], format="erofs")
    su = stated(disk, "erofs", "/bin/su")
    assert su["links"] == "2"
    assert su["mtime"].strip().endswith(".123456789")
    home = stated(disk, "erofs", "/home")
    assert (home["uid"], home["gid"], home["links"]) == ("70000", "80000", "2")
    # dump.erofs shows no bits above the permissions: setuid as it stands in the inode, by its number
    number = re.search(r"NID: (\d+)", run("dump.erofs", "--path=/bin/su", disk))
    assert number
    (mode,) = struct.unpack_from("<H", disk.read_bytes(), int(number[1]) * 32 + 4)
    assert mode == stat.S_IFREG | 0o4755


def test_attributes_are_those_of_the_layers_on_ext4(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    xattrs = {"security.capability": CAPABILITY, "user.b": b"", "user.a": b"\x01\xff", "trusted.t": b"t" * 1000}
    xattrs |= {"trusted.overlay.opaque": b"y", "system.nfs4_acl": b"x"}
    write_rootfs_disk(disk, [layer(owned(file("f"), 0, 0, xattrs=xattrs), owned(directory("d"), 0, 0, xattrs=xattrs))])
    check(disk, "ext4")
    for name in ("/f", "/d"):
        listed = run("debugfs", "-R", f"ea_list {name}", disk)
        assert re.findall(r"^  (\S+)", listed, re.MULTILINE) == [
            "user.a",
            "user.b",
            "trusted.t",
            "security.capability",
        ]
        run("debugfs", "-R", f"ea_get -f {tmp_path}/value {name} security.capability", disk)
        assert (tmp_path / "value").read_bytes() == CAPABILITY


def test_attributes_are_on_erofs_and_fill_more_than_a_block(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    many = {f"user.{number:03}": b"v" * 50 for number in range(200)}
    with_one = owned(file("one", b"1"), 0, 0, xattrs={"security.capability": CAPABILITY})
    write_rootfs_disk(disk, [layer(with_one, owned(file("many", b"2" * 5000), 0, 0, xattrs=many))], format="erofs")
    check(disk, "erofs")
    assert stated(disk, "erofs", "/one")["xattrs"] == str(12 + 4 + len("capability") + len(CAPABILITY) + 2)
    assert stated(disk, "erofs", "/many")["xattrs"] == str(12 + 200 * 60)
    assert unpacked(disk, "erofs", tmp_path / "found")["many"] == b"2" * 5000


def test_access_lists_are_on_ext4_in_its_own_form(tmp_path: Path) -> None:
    none = 0xFFFFFFFF
    entries = [(1, 6, none), (2, 4, 1000), (4, 4, none), (0x10, 4, none), (0x20, 4, none)]
    value = b"\2\0\0\0" + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    disk = tmp_path / "disk"
    write_rootfs_disk(disk, [layer(owned(file("f"), 0, 0, xattrs={"system.posix_acl_access": value}))])
    check(disk, "ext4")
    listed = run("debugfs", "-R", "ea_list /f", disk).replace(" ", "")
    assert "01000000" + "01000600" + "02000400e8030000" + "04000400" + "10000400" + "20000400" in listed


@both
def test_upper_layers_remove_and_replace(tmp_path: Path, format: DiskFormat) -> None:
    disk = tmp_path / "disk"
    lower = layer(file("gone", b"x"), directory("opaque"), file("opaque/old"), file("kept", b"old"), directory("d"))
    upper = layer(file(".wh.gone"), file("opaque/.wh..wh..opq"), file("opaque/new"), file("kept", b"new"), file("d"))
    write_rootfs_disk(disk, [lower, upper], format=format)
    check(disk, format)
    assert unpacked(disk, format, tmp_path / "found") == {"opaque": None, "opaque/new": b"", "kept": b"new", "d": b""}


@both
def test_the_root_directory_is_the_layers_too(tmp_path: Path, format: DiskFormat) -> None:
    disk = tmp_path / "disk"
    write_rootfs_disk(disk, [layer(owned(directory("./", mode=0o710), 7, 8))], format=format)
    check(disk, format)
    told = stated(disk, format, "/")
    assert (told["mode"][-3:], told["uid"], told["gid"]) == ("710", "7", "8")


@both
def test_an_image_without_layers_is_an_empty_disk(tmp_path: Path, format: DiskFormat) -> None:
    write_rootfs_disk(tmp_path / "disk", [], format=format)
    check(tmp_path / "disk", format)
    assert unpacked(tmp_path / "disk", format, tmp_path / "found") == {}


@both
def test_directories_and_files_of_many_blocks(tmp_path: Path, format: DiskFormat) -> None:
    disk = tmp_path / "disk"
    many = [file(f"many/{'n' * 200}-{number}", b"%d" % number) for number in range(1000)]
    noise = random.Random(0).randbytes(3_000_001)
    write_rootfs_disk(disk, [layer(*many, file("noise", noise))], format=format)
    check(disk, format)
    found = unpacked(disk, format, tmp_path / "found")
    assert found["noise"] == noise
    assert len(found) == 1002
    assert found[many[999][0].name] == b"999"


@both
def test_a_disk_of_many_groups_is_sparse_and_whole(tmp_path: Path, format: DiskFormat) -> None:
    """600 MB in one file: its extents do not fit into an inode, and it goes around copies of the super block."""
    disk = tmp_path / "disk"
    info, _ = file("huge")
    info.size = 600_000_000
    packed = tmp_path / "layer.tar"
    with packed.open("wb") as out:
        out.write(info.tobuf())
        for place in range(0, info.size, 60_000_000):
            out.seek(512 + place)
            out.write(b"here is %d" % place)
        out.truncate(512 + -(-info.size // 512) * 512 + 1024)
    with packed.open("rb") as stream:
        write_rootfs_disk(disk, [stream, layer(file("z", b"behind"))], format=format)
    check(disk, format)
    assert disk.stat().st_blocks * 512 < 10_000_000
    if format == "ext4":
        run("debugfs", "-R", f"dump /huge {tmp_path}/huge", disk)
    else:
        run("fsck.erofs", f"--extract={tmp_path}/x", "--no-preserve", disk)
        (tmp_path / "x" / "huge").rename(tmp_path / "huge")
    with (tmp_path / "huge").open("rb") as stream:
        for place in range(0, info.size, 60_000_000):
            stream.seek(place)
            assert stream.read(20).rstrip(b"\0") == b"here is %d" % place
    assert (tmp_path / "huge").stat().st_size == info.size
    (tmp_path / "huge").unlink()


@both
def test_a_real_busybox_image(tmp_path: Path, provisioned: Provisioned, format: DiskFormat) -> None:
    layout = Layout(Paths(provisioned.data_dir))
    target = next(target for name, target in layout.names().items() if name.startswith("busybox-static-"))
    digests = [Descriptor.from_json(part).digest for part in layout.read_json(target.digest)["layers"]]
    streams = [layout.blob(digest).open("rb") for digest in digests]
    write_rootfs_disk(tmp_path / "disk", streams, format=format)
    for stream in streams:
        stream.close()
    check(tmp_path / "disk", format)
    found = unpacked(tmp_path / "disk", format, tmp_path / "found")
    assert found["bin/busybox"] in (provisioned.busybox("x86_64"), provisioned.busybox("aarch64"))


names = st.text(st.sampled_from("ab. é\n\"'\\-"), min_size=1, max_size=6).filter(
    lambda name: name not in (".", "..") and not name.startswith(".wh.")
)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
members = st.one_of(
    st.builds(file, paths, st.integers(0, 9000).map(lambda size: b"x" * size), mode=st.integers(0, 0o7777)),
    st.builds(directory, paths, mode=st.integers(0, 0o7777)),
    st.builds(symlink, paths, st.text(st.sampled_from("ab/."), min_size=1, max_size=100)),
    st.builds(device, paths, st.just(tarfile.CHRTYPE), st.integers(0, 4095), st.integers(0, (1 << 20) - 1)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(members, max_size=12), st.lists(members, max_size=6))
def test_any_tree_makes_disks_that_their_checkers_accept(
    tmp_path: Path, lower: list[Member], upper: list[Member]
) -> None:
    for format in FORMATS:
        disk = tmp_path / format
        try:
            write_rootfs_disk(disk, [layer(*lower), layer(*upper)], format=format)
        except InvalidArchive:  # a name leads through something that is no directory
            continue
        check(disk, format)


# --- the other two disks ---


def test_the_config_disk_holds_config_sh(tmp_path: Path) -> None:
    disk = tmp_path / "config"
    write_config_disk(disk, GUEST)
    check(disk, "ext4")
    assert unpacked(disk, "ext4", tmp_path / "found") == {"config.sh": GUEST.script()}
    assert stat.S_IMODE(disk.stat().st_mode) == 0o600  # an environment may hold secrets
    assert disk.stat().st_size < 100_000


def test_a_config_disk_takes_the_place_of_another(tmp_path: Path) -> None:
    disk = tmp_path / "config"
    write_config_disk(disk, GuestConfig(cmd=["old"]))
    with disk.open("rb") as attached:
        write_config_disk(disk, GUEST)
        assert b"old" in attached.read()  # whoever has the old one open keeps it
    assert unpacked(disk, "ext4", tmp_path / "found") == {"config.sh": GUEST.script()}


@pytest.mark.parametrize("size", [1 << 20, 8 << 20, 16 << 20, (1 << 30) + 4097, 135 << 20, 10 << 30])
def test_an_overlay_disk_is_an_empty_ext4_of_its_size(tmp_path: Path, size: int) -> None:
    disk = tmp_path / "overlay"
    write_overlay_disk(disk, size)
    check(disk, "ext4")
    assert disk.stat().st_size == size
    assert disk.stat().st_blocks * 512 < 2_000_000
    head = run("dumpe2fs", "-h", disk)
    assert ("has_journal" in head) == (size >= 16 << 20)
    assert unpacked(disk, "ext4", tmp_path / "found") == dict.fromkeys(("lost+found", "upper", "work"))
    free = re.search(r"Free blocks: +(\d+)", head)
    assert free
    assert int(free[1]) * 4096 > size * 0.7


def test_an_overlay_disk_can_be_grown_and_written_by_others(tmp_path: Path) -> None:
    disk = tmp_path / "overlay"
    write_overlay_disk(disk, 64 << 20)
    (tmp_path / "file").write_bytes(b"x" * 9_000_000)
    run("debugfs", "-w", "-R", f"write {tmp_path}/file file", disk)
    check(disk, "ext4")
    os.truncate(disk, 200 << 20)
    run("e2fsck", "-fp", disk)
    run("resize2fs", disk)
    check(disk, "ext4")


def test_an_overlay_disk_is_never_replaced(tmp_path: Path) -> None:
    disk = tmp_path / "overlay"
    disk.write_bytes(b"what a guest wrote")
    with pytest.raises(UsageError, match="it was kept"):
        write_overlay_disk(disk, 8 << 20)
    assert disk.read_bytes() == b"what a guest wrote"
    assert list(tmp_path.iterdir()) == [disk]


@pytest.mark.parametrize("size", [0, 1, 4096, 20_000, 1 << 45])
def test_no_overlay_disk_that_could_hold_nothing_or_is_too_large(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError):
        write_overlay_disk(tmp_path / "overlay", size)
    assert list(tmp_path.iterdir()) == []


@both
def test_a_root_disk_has_the_size_it_is_told(tmp_path: Path, format: DiskFormat) -> None:
    disk = tmp_path / "disk"
    write_rootfs_disk(disk, [layer(*SAMPLE)], format=format, size=200_000_000)
    check(disk, format)
    assert disk.stat().st_size == 200_000_000
    write_rootfs_disk(disk, [layer(*SAMPLE)], format=format)
    least = disk.stat().st_size
    write_rootfs_disk(disk, [layer(*SAMPLE)], format=format, size=least)
    with pytest.raises(UsageError, match="too small") as refused:
        write_rootfs_disk(disk, [layer(*SAMPLE)], format=format, size=least - 4096)
    assert f"{least} bytes would do" in str(refused.value)


# --- the same bytes, always ---

_WRITE = """
import io, os, random, sys
from pathlib import Path
from systemfiles.recipes.disks import write_config_disk, write_overlay_disk, write_rootfs_disk
from systemfiles.recipes.guestconfig import GuestConfig
target = Path(sys.argv[1])
os.umask(int(sys.argv[2], 8))
layers = lambda: [io.BytesIO((target / "layer").read_bytes())]
write_rootfs_disk(target / "ext4", layers())
write_rootfs_disk(target / "erofs", layers(), format="erofs")
write_overlay_disk(target / "overlay", 64 << 20)
write_config_disk(target / "config", GuestConfig(cmd=["a", "é"], environment={"B": "1", "A": "2"}))
"""


def test_disks_are_the_same_bytes_whoever_writes_them_where_and_when(public: Path, staged: Path) -> None:
    shuffled = [*SAMPLE]
    random.Random(1).shuffle(shuffled)
    shuffled.sort(key=lambda entry: entry[0].islnk())  # a hard link comes behind what it links to
    here, there = public / "here", public / "there"
    for target, entries in ((here, SAMPLE), (there, shuffled)):
        target.mkdir()
        (target / "layer").write_bytes(tar(*entries))
    surroundings = os.environ | {"TZ": "UTC", "LC_ALL": "C", "PYTHONHASHSEED": "0"}
    subprocess.run([sys.executable, "-c", _WRITE, here, "022"], check=True, cwd=CHECKOUT, env=surroundings)
    subprocess.run(["chown", "-R", f"{nobody().pw_uid}:{nobody().pw_gid}", str(there)], check=True)
    surroundings = {"TZ": "Asia/Tokyo", "LC_ALL": "tr_TR.UTF-8", "PYTHONHASHSEED": "4711", "HOME": "/nonexistent"}
    done = as_nobody(_WRITE, there, "077", package=staged, env=surroundings)
    assert done.returncode == 0, done.stderr
    for name in ("ext4", "erofs", "overlay", "config"):
        assert sha256(here / name) == sha256(there / name)
        assert (here / name).stat().st_mode == (there / name).stat().st_mode


@both
def test_how_a_layer_is_cut_and_packed_changes_nothing(tmp_path: Path, format: DiskFormat) -> None:
    import gzip

    write_rootfs_disk(tmp_path / "a", [layer(*SAMPLE)], format=format)
    packed = io.BytesIO(gzip.compress(layer(*SAMPLE).getvalue()))
    write_rootfs_disk(tmp_path / "b", [layer(*SAMPLE[:3]), packed], format=format)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


# --- layers that mean harm, and disks that cannot be written ---

HOSTILE: dict[str, Callable[[], Sequence[io.BytesIO]]] = {
    "traversal": lambda: [layer(file("../../evil"))],
    "inner traversal": lambda: [layer(file("a/../../evil"))],
    "hard link out": lambda: [layer(hardlink("evil", "../../etc/passwd"))],
    "hard link to nothing": lambda: [layer(hardlink("evil", "etc/passwd"))],
    "through a file": lambda: [layer(file("a"), file("a/b"))],
    "symbolic link loop": lambda: [layer(symlink("a", "b"), symlink("b", "a"), file("a/x"))],
    "empty link": lambda: [layer(symlink("a", ""))],
    "too long a link": lambda: [layer(symlink("a", "x" * 4096))],
    "too long a name": lambda: [layer(file("x" * 256))],
    "no such device": lambda: [layer(device("a", tarfile.BLKTYPE, 5000, 0))],
    "owner": lambda: [layer(owned(file("a"), (1 << 32) - 1, 0))],
    "attribute": lambda: [layer(owned(file("a"), 0, 0, xattrs={"user." + "x" * 300: b""}))],
    "attribute without a name": lambda: [layer(owned(file("a"), 0, 0, xattrs={"user.": b"x"}))],
    "attributes": lambda: [layer(owned(file("a"), 0, 0, xattrs={f"user.{x}": b"x" * 65535 for x in range(9)}))],
    "no access list": lambda: [layer(owned(file("a"), 0, 0, xattrs={"system.posix_acl_access": b"123"}))],
    "truncated": lambda: [io.BytesIO(layer(file("a", b"x" * 9000)).getvalue()[:5000])],
    "no archive": lambda: [io.BytesIO(b"no archive" * 1000)],
    "entries": lambda: [layer(*(file(f"{number}") for number in range(101)))],
    "size": lambda: [layer(file("a", bytes(600_000))), layer(file("b", bytes(600_000)))],
}
SMALL = Limits(entries=100, size=1_000_000)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_layer_is_one_refusal_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    formats: tuple[DiskFormat, ...] = ("ext4",) if name in ("attributes", "no access list") else FORMATS
    for format in formats:
        with pytest.raises(InvalidArchive):
            write_rootfs_disk(tmp_path / "disk", HOSTILE[name](), format=format, limits=SMALL)
        assert list(tmp_path.iterdir()) == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_a_damaged_layer_is_one_refusal_or_a_disk_that_checkers_accept(
    tmp_path: Path, changes: list[tuple[int, bytes]]
) -> None:
    data = bytearray(tar(*SAMPLE))
    for place, change in changes:
        place %= len(data) - len(change)
        data[place : place + len(change)] = change
    for format in FORMATS:
        try:
            write_rootfs_disk(tmp_path / "disk", [io.BytesIO(data)], format=format, limits=Limits(size=10_000_000))
        except InvalidArchive:
            continue
        check(tmp_path / "disk", format)


def test_a_bomb_costs_little(tmp_path: Path) -> None:
    import gzip

    bomb = gzip.compress(tar(file("a", bytes(60 << 20))), 9)
    start = time.monotonic()
    with pytest.raises(InvalidArchive, match="times its size"):
        write_rootfs_disk(tmp_path / "disk", [io.BytesIO(bomb)])
    assert time.monotonic() - start < 10
    assert list(tmp_path.iterdir()) == []


@both
def test_a_link_that_leads_out_stays_inside_the_disk(tmp_path: Path, format: DiskFormat) -> None:
    out = tmp_path / "out"
    out.mkdir()
    up = "../" * 20 + str(out).lstrip("/")
    entries = (symlink("here", str(out)), file("here/a", b"a"), symlink("there", up), file("there/b", b"b"))
    write_rootfs_disk(tmp_path / "disk", [layer(*entries)], format=format)
    check(tmp_path / "disk", format)
    assert list(out.iterdir()) == []
    found = unpacked(tmp_path / "disk", format, tmp_path / "found")
    assert found[f"{str(out).lstrip('/')}/a"] == b"a"
    assert found[f"{str(out).lstrip('/')}/b"] == b"b"


@both
def test_of_a_name_that_is_twice_in_a_layer_the_last_counts(tmp_path: Path, format: DiskFormat) -> None:
    twice = layer(file("a", b"first"), directory("b"), file("a", b"last"), file("b", b"file"), hardlink("c", "a"))
    write_rootfs_disk(tmp_path / "disk", [twice], format=format)
    check(tmp_path / "disk", format)
    found = unpacked(tmp_path / "disk", format, tmp_path / "found")
    assert found == {"a": b"last", "b": b"file", "c": b"last"}


def test_a_refused_disk_leaves_the_one_that_was_there(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"old")
    with pytest.raises(InvalidArchive):
        write_rootfs_disk(disk, [layer(file("../a"))])
    with pytest.raises(UsageError, match="nothing to run"):
        write_config_disk(disk, GuestConfig())
    with pytest.raises(UsageError, match="no disk format"):
        write_rootfs_disk(disk, [], format="fat")  # type: ignore[arg-type]
    assert disk.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [disk]


def test_a_full_disk_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    writes: tuple[Callable[[], None], ...] = (
        lambda: write_config_disk(tmp_path / "disk", GUEST),
        lambda: write_overlay_disk(tmp_path / "disk", 8 << 20),
        lambda: write_rootfs_disk(tmp_path / "disk", [layer(file("a", b"x"))]),
    )
    for write in writes:
        with pytest.raises(NoSpace):
            write()
        assert list(tmp_path.iterdir()) == []


def test_a_directory_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with pytest.raises(StoreError):
        write_config_disk(tmp_path / "disk", GUEST)
    assert list(tmp_path.iterdir()) == [tmp_path / "disk"]


_WRITE_ONE = """
import sys
from pathlib import Path
from systemfiles.recipes.disks import write_rootfs_disk
print(flush=True)
write_rootfs_disk(Path(sys.argv[1]), [open(sys.argv[2], "rb")])
"""


def test_a_kill_leaves_the_old_disk_or_the_new_one(tmp_path: Path) -> None:
    packed = tmp_path / "layer"
    packed.write_bytes(tar(*(file(str(number), bytes(range(256)) * 200) for number in range(400))))
    disk = tmp_path / "disk"
    write_rootfs_disk(tmp_path / "whole", [packed.open("rb")])
    disk.write_bytes(b"old")
    for delay in (0.02, 0.06, 0.1, 0.15, 0.3):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITE_ONE, disk, packed], cwd=CHECKOUT, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        assert disk.read_bytes() in (b"old", (tmp_path / "whole").read_bytes())


_WRITE_SLOWLY = """
import sys, time
from pathlib import Path
from systemfiles.recipes.disks import write_rootfs_disk
def stop(*_):
    print(flush=True)
    time.sleep(60)
write_rootfs_disk(Path(sys.argv[1]), [Path(sys.argv[2])], progress=stop)
"""


def test_what_a_killed_process_left_beside_a_disk_goes_with_the_next_that_is_made_there(tmp_path: Path) -> None:
    packed = tmp_path / "layer"
    packed.write_bytes(tar(file("a", b"x" * 100_000)))
    place = tmp_path / "place"
    command: list[str | Path] = [sys.executable, "-c", _WRITE_SLOWLY, place / "disk", packed]
    with (
        subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE) as killed,
        subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE) as alive,
    ):
        for process in (killed, alive):
            assert process.stdout
            process.stdout.readline()
        everyone = set(place.iterdir())
        assert len(everyone) == 2
        killed.kill()
        killed.wait()
        write_rootfs_disk(place / "disk", [packed])
        assert set(place.iterdir()) - everyone == {place / "disk"}
        assert everyone <= set(place.iterdir())  # for a while it could be one that was just made
        mine = place / ".systemfiles-disk-of-mine"
        mine.mkdir()
        for path in (*everyone, mine):
            os.utime(path, (0, 0))
        write_overlay_disk(place / "overlay", 8 << 20)
        left = set(place.iterdir()) - {place / "disk", place / "overlay", mine}
        assert len(left) == 1
        assert left < everyone
        alive.kill()
    os.utime(left.pop(), (0, 0))
    write_config_disk(place / "config", GUEST)
    assert {path.name for path in place.iterdir()} == {"disk", "overlay", "config", mine.name}


def inodes(disk: Path) -> tuple[int, int]:
    """How many there are, and how many are free."""
    head = run("dumpe2fs", "-h", disk)
    counts = [re.search(rf"^{what} +(\d+)", head, re.MULTILINE) for what in ("Inode count:", "Free inodes:")]
    total, free = (int(count[1]) for count in counts if count)
    return total, free


def test_a_root_disk_with_space_to_spare_has_inodes_to_spare(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    full = [file(str(number), b"x" * 4096) for number in range(3000)]
    write_rootfs_disk(disk, [layer(*full)])
    least = disk.stat().st_size
    assert inodes(disk)[1] < 16
    for size in (least, least + 4096, least + 8 * 4096, least + (1 << 20), 200 << 20, 3 << 30):
        write_rootfs_disk(disk, [layer(*full)], size=size)
        check(disk, "ext4")
        spare = (size - least) // 8192
        assert spare * 0.9 - 16 < inodes(disk)[1] < spare * 1.1 + 64
        assert disk.stat().st_size == size
