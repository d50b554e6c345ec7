"""Image layers merged in memory: what the image-spec asks for, and layers that mean harm."""

from __future__ import annotations

import bz2
import gzip
import io
import stat
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systemfiles.foundation import cpio
from systemfiles.foundation.cpio import Record
from systemfiles.foundation.errors import InvalidArchive
from systemfiles.recipes.layers import Limits, apply_layers

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, kind: bytes, data: bytes = b"", *, mode: int = 0o644, link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode, info.linkname = kind, len(data), mode, link
    return info, data


def file(name: str, data: bytes = b"", *, mode: int = 0o644) -> Member:
    return member(name, tarfile.REGTYPE, data, mode=mode)


def directory(name: str, *, mode: int = 0o755) -> Member:
    return member(name, tarfile.DIRTYPE, mode=mode)


def symlink(name: str, target: str) -> Member:
    return member(name, tarfile.SYMTYPE, mode=0o777, link=target)


def hardlink(name: str, target: str) -> Member:
    return member(name, tarfile.LNKTYPE, link=target)


def tar(*members: Member, format: int = tarfile.PAX_FORMAT, pax: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, pax_headers=pax) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zstd(data: bytes) -> bytes:
    """A zstd frame of raw blocks (RFC 8878, sections 3.1.1 and 3.1.1.2)."""
    frame = b"\x28\xb5\x2f\xfd" + b"\x00\x58"
    for start in range(0, len(data), 1 << 16):
        block = data[start : start + (1 << 16)]
        last = start + len(block) == len(data)
        frame += (len(block) << 3 | last).to_bytes(3, "little") + block
    return frame


def merged(*layers: bytes, limits: Limits | None = None) -> tuple[Record, ...]:
    streams: list[BinaryIO] = [io.BytesIO(layer) for layer in layers]
    return apply_layers(streams, limits=limits)


def names(*layers: bytes) -> list[str]:
    return [record.name for record in merged(*layers)]


LOWER = tar(
    directory("./"),
    directory("./etc/"),
    file("./etc/passwd", b"root"),
    file("./etc/group", b"wheel"),
    file("./usr/bin/busybox", b"elf", mode=0o4755),
    hardlink("./usr/bin/sh", "./usr/bin/busybox"),
    symlink("./bin", "usr/bin"),
)


def test_one_layer_is_the_tree_it_holds() -> None:
    assert merged(LOWER) == cpio.normalise(
        [
            cpio.file("etc/passwd", b"root"),
            cpio.file("etc/group", b"wheel"),
            cpio.file("usr/bin/busybox", b"elf", mode=0o4755),
            cpio.hardlink("usr/bin/sh", "usr/bin/busybox"),
            cpio.symlink("bin", "usr/bin"),
        ]
    )


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect_gives_the_same_tree(format: int) -> None:
    long = "/".join(["directory"] * 12) + "/файл"
    tree = merged(tar(file(long, b"x"), symlink("link", "t" * 90), format=format))
    assert {cpio.file(long, b"x"), cpio.symlink("link", "t" * 90)} < set(tree)


def gzip_in_members(data: bytes) -> bytes:
    return gzip.compress(data[:700]) + gzip.compress(data[700:]) + gzip.compress(b"")


@pytest.mark.parametrize("pack", [gzip.compress, gzip_in_members, zstd])
def test_a_compressed_layer_gives_the_same_tree(pack: Callable[[bytes], bytes]) -> None:
    assert merged(pack(LOWER)) == merged(LOWER)


def test_owners_and_setuid_bits_are_kept_and_times_are_not() -> None:
    info, data = file("a", b"x", mode=0o6755)
    info.uid, info.gid, info.mtime = 1000, 100000, 1234567890
    assert merged(tar((info, data))) == (Record("a", stat.S_IFREG | 0o6755, b"x", uid=1000, gid=100000),)


def test_an_upper_file_replaces_a_lower_one_and_keeps_its_neighbours() -> None:
    tree = merged(LOWER, tar(file("etc/passwd", b"new", mode=0o600)))
    assert cpio.file("etc/passwd", b"new", mode=0o600) in tree
    assert cpio.file("etc/group", b"wheel") in tree


def test_an_upper_directory_changes_the_mode_and_keeps_what_is_inside() -> None:
    tree = merged(LOWER, tar(directory("etc", mode=0o700)))
    assert cpio.directory("etc", mode=0o700) in tree
    assert cpio.file("etc/group", b"wheel") in tree


def test_a_file_replaces_a_directory_with_all_that_is_in_it() -> None:
    assert merged(LOWER, tar(file("etc", b"x"), file("usr"), file("bin"))) == (
        cpio.file("bin", b""),
        cpio.file("etc", b"x"),
        cpio.file("usr", b""),
    )


def test_a_directory_replaces_a_file_and_a_symbolic_link() -> None:
    tree = merged(LOWER, tar(directory("etc/passwd"), directory("bin"), file("bin/x", b"1")))
    assert {cpio.directory("etc/passwd"), cpio.directory("bin"), cpio.file("bin/x", b"1")} < set(tree)


def test_a_whiteout_removes_what_is_below_and_nothing_of_its_own_layer() -> None:
    upper = tar(file("etc/passwd", b"new"), file("etc/.wh.passwd"), file("etc/.wh.group"), file(".wh.usr"))
    assert merged(LOWER, upper) == (
        cpio.symlink("bin", "usr/bin"),
        cpio.directory("etc"),
        cpio.file("etc/passwd", b"new"),
    )


@pytest.mark.parametrize("first", [True, False])
def test_an_opaque_directory_hides_what_is_below_wherever_it_stands(first: bool) -> None:
    entries = [file("etc/.wh..wh..opq"), file("etc/new", b"1")]
    upper = tar(directory("etc"), *(entries if first else reversed(entries)))
    assert [name for name in names(LOWER, upper) if name.startswith("etc/")] == ["etc/new"]


def test_whiteouts_of_what_is_not_there_change_nothing() -> None:
    upper = tar(file(".wh.nothing"), file("no/such/.wh.x"), file("etc/passwd/.wh.x"), file("no/.wh..wh..opq"))
    assert merged(LOWER, upper) == merged(LOWER)


def test_what_a_layer_removed_a_later_one_may_bring_back() -> None:
    tree = merged(LOWER, tar(file("etc/.wh.passwd")), tar(file("etc/passwd", b"again")))
    assert cpio.file("etc/passwd", b"again") in tree


def test_leftovers_of_aufs_are_ignored() -> None:
    assert names(tar(file(".wh..wh.aufs"), directory(".wh..wh.plnk"), file(".wh..wh.plnk/1.2", b"x"))) == []


def test_the_other_name_of_a_removed_file_keeps_its_content() -> None:
    tree = merged(LOWER, tar(file("usr/bin/.wh.busybox")))
    assert cpio.file("usr/bin/sh", b"elf", mode=0o4755) in tree


def test_a_hard_link_may_name_a_file_of_a_lower_layer() -> None:
    tree = merged(LOWER, tar(hardlink("copy", "etc/passwd")))
    assert {cpio.file("copy", b"root"), Record("etc/passwd", stat.S_IFREG | 0o644, hardlink="copy")} < set(tree)


def test_replacing_one_name_of_a_hard_link_leaves_the_other() -> None:
    tree = merged(LOWER, tar(file("usr/bin/sh", b"dash")))
    assert {cpio.file("usr/bin/sh", b"dash"), cpio.file("usr/bin/busybox", b"elf", mode=0o4755)} < set(tree)


def test_a_hard_link_to_a_symbolic_link_is_a_symbolic_link() -> None:
    assert cpio.symlink("other", "usr/bin") in merged(LOWER, tar(hardlink("other", "bin")))


def test_the_last_of_two_equal_names_in_one_layer_counts() -> None:
    assert merged(tar(file("a", b"1"), symlink("a", "x"), file("./a", b"2"))) == (cpio.file("a", b"2"),)


@pytest.mark.parametrize(
    ("target", "real"),
    [
        ("usr/bin", "usr/bin/x"),
        ("/usr/bin", "usr/bin/x"),
        ("../../../usr/./bin/", "usr/bin/x"),
        ("usr/../new/dir", "new/dir/x"),
        ("/", "x"),
        ("../..", "x"),
    ],
)
def test_a_parent_that_is_a_link_is_followed_inside_the_root(target: str, real: str) -> None:
    lower = tar(directory("usr/bin"), symlink("bin", target))
    tree = merged(lower, tar(file("bin/x", b"1"), file("bin/.wh.y")))
    assert {cpio.symlink("bin", target), cpio.file(real, b"1")} < set(tree)


def test_a_whiteout_behind_a_link_removes_the_real_file() -> None:
    assert "usr/bin/sh" not in names(LOWER, tar(file("bin/.wh.sh")))


def test_a_link_out_of_the_root_leads_nowhere_on_the_host(tmp_path: Path) -> None:
    tree = merged(tar(symlink("out", str(tmp_path)), file("out/evil", b"x")))
    assert cpio.file(f"{str(tmp_path).lstrip('/')}/evil", b"x") in tree
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["/etc/x", "./etc/x", "//etc//x", "etc/./x", "etc/x"])
def test_a_leading_slash_or_dot_means_nothing(name: str) -> None:
    assert names(tar(file(name))) == ["etc", "etc/x"]


def test_device_nodes_and_fifos_hide_what_is_below_and_are_left_out() -> None:
    null, _ = member("etc/passwd", tarfile.CHRTYPE)
    null.devmajor, null.devminor = 1, 3
    upper = tar((null, b""), member("pipe", tarfile.FIFOTYPE), hardlink("pipe2", "pipe"))
    assert names(LOWER, upper) == ["bin", "etc", "etc/group", "usr", "usr/bin", "usr/bin/busybox", "usr/bin/sh"]


@pytest.mark.parametrize(
    "members",
    [
        [file("../x")],
        [file("a/../../x")],
        [file("a/..")],
        [hardlink("a", "../../etc/passwd")],
        [hardlink("a", "missing")],
        [hardlink("a", "/")],
        [directory("d"), hardlink("a", "d")],
        [hardlink("a", "a")],
        [file("f"), file("f/x")],
        [file("f"), symlink("l", "f"), file("l/x")],
        [symlink("a", "b"), symlink("b", "a"), file("a/x")],
        [symlink("a", "a/b"), file("a/x")],
        [symlink("a", "")],
        [symlink("a", "x" * 4096)],
        [file(".wh.")],
        [file("a/.wh..")],
        [file("a/.wh...")],
        [file(".wh.a/b")],
        [file("n" * 256)],
        [file("/".join(["d" * 100] * 41))],
        [member("a", b"V")],
    ],
)
def test_an_entry_that_cannot_be_meant_well_is_refused(members: list[Member]) -> None:
    with pytest.raises(InvalidArchive):
        merged(tar(*members))


@pytest.mark.parametrize("field", ["path", "linkpath"])
def test_a_nul_in_a_name_is_refused(field: str) -> None:
    info, data = symlink("a", "b")
    info.pax_headers = {field: "x\0y"}
    with pytest.raises(InvalidArchive):
        merged(tar((info, data)))


@pytest.mark.parametrize("uid", [-1, 1 << 32])
def test_an_owner_beyond_32_bits_is_refused(uid: int) -> None:
    info, data = file("a")
    info.uid = uid
    with pytest.raises(InvalidArchive):
        merged(tar((info, data), format=tarfile.GNU_FORMAT))


@pytest.mark.parametrize(
    "layer",
    [
        b"",
        b"\0" * 100,
        b"<html>not found</html>" * 100,
        LOWER[:1000],
        LOWER[: LOWER.rindex(b"bin") + 600],
        LOWER.replace(b"passwd", b"passwD"),
        gzip.compress(LOWER, mtime=0)[:-9],
        gzip.compress(LOWER, mtime=0)[:-8] + b"\0" * 8,
        gzip.compress(LOWER, mtime=0)[:60],
        gzip.compress(LOWER, mtime=0) + b"junk",
        zstd(LOWER)[:3000],
        zstd(LOWER)[:7],
        b"\x28\xb5\x2f\xfd" + b"\xff" * 50,
        bz2.compress(LOWER),
    ],
)
def test_damage_truncation_and_garbage_are_refused(layer: bytes) -> None:
    with pytest.raises(InvalidArchive):
        merged(layer)


def test_every_cut_through_a_header_or_a_file_of_a_plain_layer_is_refused() -> None:
    whole = tar(file("a", b"x" * 600), file("b", b"y"), symlink("c", "d"))
    for length in (*range(0, 512 + 600, 64), *range(1536 + 64, 2048 + 1, 64), *range(2560 + 64, 3072, 64)):
        with pytest.raises(InvalidArchive):
            merged(whole[:length])


@pytest.mark.parametrize("end", [512 + 600, 512 + 601, 1535, 1536, 2049, 2500, 2560, 3072, 3072 + 512])
def test_a_plain_layer_may_end_behind_its_last_content(end: int) -> None:
    whole = tar(file("a", b"x" * 600), file("b", b"y"), symlink("c", "d"))
    assert names(whole[:end]) == ["a", "b", "c"][: 1 + (end > 2048) + (end >= 3072)]


def with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header[:512]):06o}\0 ".encode()
    return bytes(header)


def test_a_negative_size_is_refused() -> None:
    layer = bytearray(tar(file("a"), format=tarfile.GNU_FORMAT))
    layer[124:136] = b"\xff" * 10 + b"\xfe\x00"
    with pytest.raises(InvalidArchive):
        merged(with_checksum(layer[:512]) + bytes(layer[512:]))


@pytest.mark.parametrize("size", ["-512", "-1024", "999999999999999", "9" * 5000])
def test_a_size_in_an_extended_header_is_not_believed(size: str) -> None:
    info, data = file("a", b"x")
    info.pax_headers = {"size": size}
    with pytest.raises(InvalidArchive):
        merged(tar((info, data), file("b")))


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1000000000000"},
        {"GNU.sparse.map": "0,1,5", "GNU.sparse.size": "9"},
        {"GNU.sparse.map": "0,1", "GNU.sparse.size": "99999999999999"},
        {"GNU.sparse.size": "1", "GNU.sparse.offset": "x", "GNU.sparse.numbytes": "1"},
    ],
)
def test_a_sparse_file_is_refused(headers: dict[str, str]) -> None:
    info, data = file("a", b"1000000\n0\n")
    info.pax_headers = headers
    with pytest.raises(InvalidArchive):
        merged(tar((info, data)))


def test_an_old_sparse_file_is_refused() -> None:
    layer = bytearray(tar(file("a"), format=tarfile.GNU_FORMAT))
    layer[156:157] = b"S"
    with pytest.raises(InvalidArchive, match="sparse"):
        merged(with_checksum(layer[:512]) + bytes(layer[512:]))


def test_a_long_chain_of_extended_headers_is_refused() -> None:
    header = tar(file("a"), format=tarfile.USTAR_FORMAT)[:512]
    extended = bytearray(header)
    extended[156:157] = b"x"
    with pytest.raises(InvalidArchive):
        merged(with_checksum(extended) * 5000 + header + bytes(1024))


def test_a_huge_extended_header_is_refused_before_it_is_read() -> None:
    header = bytearray(tar(file("a"), format=tarfile.USTAR_FORMAT)[:512])
    header[156:157] = b"x"
    header[124:136] = b"77777777777\0"
    with pytest.raises(InvalidArchive, match="8589934591 bytes"):
        merged(with_checksum(header) + bytes(10240))


def test_global_headers_without_number_are_refused() -> None:
    with pytest.raises(InvalidArchive, match="global headers"):
        merged(tar(file("a"), pax={f"key{number}": "x" for number in range(200)}))


def test_more_entries_than_allowed_are_refused_across_layers_and_implied_directories() -> None:
    limits = Limits(entries=5)
    assert len(merged(tar(file("a/b/c")), tar(file("d"), file("e")), limits=limits)) == 5
    with pytest.raises(InvalidArchive, match="5 entries"):
        merged(tar(file("a/b/c")), tar(file("d"), file("e"), file("f")), limits=limits)
    with pytest.raises(InvalidArchive, match="5 entries"):
        merged(tar(file("1/2/3/4/5/6/7")), limits=limits)


def test_more_bytes_than_allowed_are_refused_across_layers() -> None:
    layer = gzip.compress(tar(file("a", bytes(300_000))))
    with pytest.raises(InvalidArchive, match="500000 bytes"):
        merged(layer, layer, limits=Limits(size=500_000))


def test_a_size_beyond_the_limit_is_refused_before_it_is_read() -> None:
    info, _ = file("a")
    info.size = 1 << 40
    with pytest.raises(InvalidArchive, match="larger than"):
        merged(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))


def test_a_bomb_is_refused_by_its_ratio() -> None:
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = pack.compress(tar(file("a", bytes(20 << 20)))) + pack.flush()
    with pytest.raises(InvalidArchive, match="200 times"):
        merged(bomb)


def test_links_that_nest_beyond_any_name_are_refused() -> None:
    deep = "/".join(["d"] * 500)
    members = [symlink("s0", deep)]
    for number in range(1, 40):
        members += [symlink(f"s{number}", f"s{number - 1}/{deep}")]
    with pytest.raises(InvalidArchive):
        merged(tar(*members, file("s39/x")))


def test_paths_that_take_for_ever_to_follow_are_refused_in_time() -> None:
    detour = "./" * 2000 + "."
    members = [symlink("s0", detour), *(symlink(f"s{n}", f"s{n - 1}/{detour}"[:4000]) for n in range(1, 39))]
    start = time.monotonic()
    with pytest.raises(InvalidArchive, match="too long to follow"):
        merged(tar(*members, *(file(f"s38/{number}") for number in range(500))), limits=Limits(ratio=10**6))
    assert time.monotonic() - start < 10


PACKED = gzip.compress(LOWER, mtime=0)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([LOWER, PACKED, zstd(LOWER)]),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 3),
)
def test_arbitrary_damage_gives_a_tree_or_one_typed_error(
    layer: bytes, damage: list[tuple[float, int]], repaired: int
) -> None:
    broken = bytearray(layer)
    for place, value in damage:
        broken[int(place * len(broken))] = value
    if layer is LOWER:  # so that damage gets beyond the checksum
        start = repaired * 1024
        broken[start : start + 512] = with_checksum(broken[start : start + 512])
    try:
        merged(bytes(broken))
    except InvalidArchive:
        return


NAMES = st.sampled_from(
    ["a", "b", "a/b", "a/a", "b/a", ".wh.a", "a/.wh.b", "a/.wh..wh..opq", "a/b/a", "/", "..", "b/b/b"]
)
MEMBERS = st.one_of(
    st.builds(file, NAMES, st.binary(max_size=3)),
    st.builds(directory, NAMES),
    st.builds(symlink, NAMES, st.sampled_from(["a", "b", "..", "/", "a/b", "../b"])),
    st.builds(hardlink, NAMES, NAMES),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(MEMBERS, max_size=6), max_size=3))
def test_any_layers_give_a_normalised_tree_or_one_typed_error(layers: list[list[Member]]) -> None:
    try:
        tree = merged(*(tar(*members) for members in layers))
    except InvalidArchive:
        return
    assert cpio.normalise(tree) == tree
    assert not any(part.startswith(".wh.") for record in tree for part in record.name.split("/"))
