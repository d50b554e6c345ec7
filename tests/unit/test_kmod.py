"""Modules: what they say of themselves, depmod's files, and the order to load them in."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import lzma
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systemfiles.foundation.errors import InvalidArchive, SystemFilesError, UnknownModule
from systemfiles.recipes import modinfo
from systemfiles.recipes.kmod import ModuleIndex, build_index, closure, subset
from systemfiles.recipes.modinfo import Modinfo, module_name, read_modinfo, unpack_module

PROGBITS, NOBITS, STRTAB = 1, 8, 3
COMPRESSED = 0x800


def module(modinfo: bytes, *, kind: int = PROGBITS, flags: int = 0, size: int | None = None, count: int = 3) -> bytes:
    """An ELF64 relocatable file (System V gABI, chapter 4) with .shstrtab and .modinfo only."""
    names = b"\0.shstrtab\0.modinfo\0"
    start = 64 + len(names)
    sections = start + len(modinfo)
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, sections, 0, 64, 0, 0, 64, count, 1)
    table = bytes(64)
    table += struct.pack("<IIQQQQIIQQ", 1, STRTAB, 0, 0, 64, len(names), 0, 0, 1, 0)
    table += struct.pack("<IIQQQQIIQQ", 11, kind, flags, 0, start, len(modinfo) if size is None else size, 0, 0, 1, 0)
    return head + names + modinfo + table


def zstd(data: bytes) -> bytes:
    """A zstd frame of one raw block (RFC 8878, sections 3.1.1 and 3.1.1.2)."""
    return b"\x28\xb5\x2f\xfd\x00\x58" + (len(data) << 3 | 1).to_bytes(3, "little") + data


EROFS = module(
    b"license=GPL\0author=J\xf6rg\0alias=fs-erofs\0alias=dmi:*:svnSome Company:*\0depends=libcrc32c,xor-neon\0"
    b"softdep=pre: crc32c sha256 post: nls\0softdep=ignored pre: lz4\0name=erofs\0\0"
    b"vermagic=6.1.0-56-cloud-amd64 SMP preempt mod_unload modversions \0"
)


def test_modinfo_holds_what_the_module_says() -> None:
    assert read_modinfo(EROFS) == Modinfo(
        name="erofs",
        depends=("libcrc32c", "xor-neon"),
        softdeps_pre=("crc32c", "sha256", "lz4"),
        softdeps_post=("nls",),
        aliases=("fs-erofs", "dmi:*:svnSome Company:*"),
        release="6.1.0-56-cloud-amd64",
    )


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, zstd])
def test_a_compressed_module_is_read_and_unpacked(pack: object, tmp_path: Path) -> None:
    assert callable(pack)
    (tmp_path / "erofs.ko.xz").write_bytes(pack(EROFS))
    assert read_modinfo(tmp_path / "erofs.ko.xz") == read_modinfo(EROFS)
    assert unpack_module(pack(EROFS)) == EROFS


def test_a_module_without_a_name_is_called_after_its_file() -> None:
    assert read_modinfo(module(b"depends=\0"), name="kernel/crypto/xor-neon.ko.xz") == Modinfo("xor_neon")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x7fELF",
        b"<html>",
        EROFS[:63],
        EROFS[:200],
        EROFS[:-1],
        module(b"name=x\0", kind=NOBITS, size=1 << 40),
        module(b"name=x\0", size=1 << 40),
        module(b"name=x\0", size=1 << 63),
        module(b"name=x\0", flags=COMPRESSED),
        module(b"name=x\0", count=2),
        module(b"name=x\0", count=0),
        module(b"name=x\0", count=0xFFFF),
        module(b"name=a b\0"),
        module(b"alias=a\nalias b\0"),
        module(b"alias= a\0"),
        module(b"depends=a b\0alias=a b\0"),
        module("depends=größe\0".encode()),
        module(b"softdep=pre: \xff\0"),
        gzip.compress(EROFS, mtime=0)[:-9],
        gzip.compress(EROFS, mtime=0)[:40],
        lzma.compress(EROFS)[:-20],
        b"\xfd7zXZ\0" + b"junk" * 10,
        zstd(EROFS)[:100],
    ],
)
def test_what_is_no_intact_module_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArchive):
        read_modinfo(data)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, zstd])
def test_a_module_that_unpacks_to_too_much_is_refused(pack: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(pack)
    monkeypatch.setattr(modinfo, "MODULE_MAX", 10_000)
    assert len(unpack_module(pack(bytes(10_000)))) == 10_000
    with pytest.raises(InvalidArchive, match="larger"):
        unpack_module(pack(bytes(10_001)))


def test_a_module_that_names_more_sections_than_it_has_is_refused_at_once() -> None:
    data = bytearray(module(b"", count=0) + bytes(1 << 20))
    start = struct.unpack_from("<Q", data, 0x28)[0]
    struct.pack_into("<Q", data, start + 32, 1 << 62)
    with pytest.raises(InvalidArchive, match="sections"):
        read_modinfo(bytes(data))


@pytest.mark.parametrize(
    ("place", "new"),
    [
        (0x04, b"\1"),  # 32 bits
        (0x05, b"\2"),  # big-endian
        (0x28, b"\xff" * 8),  # section headers far behind the end
        (0x3A, b"\x20\0"),  # section headers of another size
        (0x3C, b"\xff\xfe"),  # more sections than there are
        (0x3E, b"\x03\0"),  # names in a section that is not there
        (0x3E, b"\x00\0"),  # names in the empty section
        (-128 + 24, b"\xff" * 8),  # names behind the end
        (-128 + 32, b"\xff" * 8),  # names without end
        (-64, b"\xff" * 4),  # a name behind all names
        (-64 + 24, b"\xff" * 8),  # .modinfo behind the end
        (-64 + 32, b"\xff" * 8),  # .modinfo without end
    ],
)
def test_a_header_that_leads_out_of_the_file_is_not_followed(place: int, new: bytes) -> None:
    data = bytearray(EROFS)
    start = place % len(data)
    data[start : start + len(new)] = new
    with pytest.raises(InvalidArchive):
        read_modinfo(bytes(data))


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, zstd])
def test_a_compressed_module_ends_where_its_stream_ends(pack: object) -> None:
    assert callable(pack)
    with pytest.raises(InvalidArchive, match="other data follows"):
        unpack_module(pack(EROFS) + b"junk")


MODULES = {
    "kernel/lib/libcrc32c.ko": Modinfo("libcrc32c", softdeps_pre=("crc32c",)),
    "kernel/crypto/crc32c-intel.ko": Modinfo("crc32c_intel", aliases=("crc32c", "crypto-crc32c")),
    "kernel/fs/erofs/erofs.ko": Modinfo("erofs", depends=("libcrc32c", "ext4"), aliases=("fs-erofs",)),
    "kernel/drivers/virtio/virtio.ko": Modinfo("virtio", depends=("virtio-ring",)),
    "kernel/drivers/virtio/virtio_ring.ko": Modinfo("virtio_ring"),
    "kernel/drivers/net/virtio_net.ko": Modinfo(
        "virtio_net", depends=("virtio", "virtio_ring", "net_failover"), aliases=("virtio:d0000000[1-3]v*",)
    ),
    "kernel/drivers/net/net_failover.ko": Modinfo("net_failover", depends=("failover",)),
    "kernel/net/core/failover.ko": Modinfo("failover"),
    "kernel/drivers/vfio/vfio.ko": Modinfo("vfio", softdeps_post=("vfio_iommu_type1", "vfio_spapr")),
    "kernel/drivers/vfio/vfio_iommu_type1.ko": Modinfo("vfio_iommu_type1", depends=("vfio",)),
}
INDEX = build_index("6.1.0", MODULES, "kernel/fs/ext4/ext4.ko\nkernel/lib/xor-neon.ko\n")


def test_the_index_is_written_as_depmod_writes_it() -> None:
    assert subset(INDEX, closure(INDEX, ["erofs", "virtio"])) == {
        "modules.dep": (
            "kernel/crypto/crc32c-intel.ko:\n"
            "kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko\n"
            "kernel/drivers/virtio/virtio_ring.ko:\n"
            "kernel/fs/erofs/erofs.ko: kernel/lib/libcrc32c.ko\n"
            "kernel/lib/libcrc32c.ko:\n"
        ),
        "modules.softdep": ("# Soft dependencies extracted from modules themselves.\nsoftdep libcrc32c pre: crc32c\n"),
        "modules.alias": (
            "# Aliases extracted from modules themselves.\n"
            "alias crc32c crc32c_intel\n"
            "alias crypto-crc32c crc32c_intel\n"
            "alias fs-erofs erofs\n"
        ),
        "modules.builtin": "kernel/fs/ext4/ext4.ko\nkernel/lib/xor-neon.ko\n",
    }


def test_modules_dep_names_all_that_is_needed_the_first_to_load_last() -> None:
    needs = INDEX.dependencies["kernel/drivers/net/virtio_net.ko"]
    names = [module_name(path) for path in needs]
    assert sorted(names) == ["failover", "net_failover", "virtio", "virtio_ring"]
    assert names.index("failover") > names.index("net_failover")
    assert names.index("virtio_ring") > names.index("virtio")


def test_the_index_survives_its_text_form() -> None:
    assert ModuleIndex.parse(INDEX.files()) == INDEX


@pytest.mark.parametrize(
    ("wanted", "order"),
    [
        (["erofs"], ["crc32c_intel", "libcrc32c", "erofs"]),
        (["fs-erofs"], ["crc32c_intel", "libcrc32c", "erofs"]),
        (["fs_erofs", "erofs"], ["crc32c_intel", "libcrc32c", "erofs"]),
        (["virtio-ring"], ["virtio_ring"]),
        (["crypto-crc32c"], ["crc32c_intel"]),
        (["virtio:d00000001v00001AF4"], ["virtio_ring", "failover", "virtio", "net_failover", "virtio_net"]),
        (["vfio"], ["vfio", "vfio_iommu_type1"]),
        (["ext4", "xor_neon"], []),
        ([], []),
    ],
)
def test_the_closure_is_all_that_is_needed_in_the_order_to_load_it(wanted: list[str], order: list[str]) -> None:
    assert [module_name(path) for path in closure(INDEX, wanted)] == order


def test_unknown_modules_are_all_named() -> None:
    with pytest.raises(UnknownModule, match="nvme, virtio:d00000009v1,"):
        closure(INDEX, ["virtio", "nvme", "virtio:d00000009v1"])


def test_a_subset_without_something_it_needs_is_refused() -> None:
    with pytest.raises(UnknownModule, match=r"libcrc32c\.ko"):
        subset(INDEX, ["kernel/fs/erofs/erofs.ko"])
    with pytest.raises(UnknownModule, match=r"missing\.ko"):
        subset(INDEX, ["kernel/missing.ko"])


def test_a_soft_dependency_that_was_not_taken_is_not_in_the_subset() -> None:
    files = subset(INDEX, ["kernel/lib/libcrc32c.ko"])
    assert "softdep libcrc32c" not in files["modules.softdep"]


@pytest.mark.parametrize(
    "modules",
    [
        {"a.ko": Modinfo("a", depends=("missing",))},
        {"a.ko": Modinfo("a", depends=("b",)), "b.ko": Modinfo("b", depends=("a",))},
        {"a.ko": Modinfo("a", depends=("a",))},
        {"a.ko": Modinfo("a", release="6.1.1")},
        {"x/a-b.ko": Modinfo("a_b"), "y/a_b.ko": Modinfo("a_b")},
        {"/a.ko": Modinfo("a")},
        {"../a.ko": Modinfo("a")},
        {"a b.ko": Modinfo("a_b")},
        {"a.ko:\nb.ko": Modinfo("a")},
    ],
)
def test_modules_that_cannot_be_indexed_are_refused(modules: Mapping[str, Modinfo]) -> None:
    with pytest.raises(InvalidArchive):
        build_index("6.1.0", modules, "")


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"modules.dep": "no colon\n"},
        {"modules.dep": "a.ko: b.ko\n"},
        {"modules.dep": "a.ko:\na.ko:\n"},
        {"modules.dep": "x/a.ko:\ny/a.ko:\n"},
        {"modules.dep": "../../a.ko:\n"},
        {"modules.dep": "/lib/a.ko:\n"},
        {"modules.dep": "", "modules.builtin": "../a.ko"},
        {"modules.dep": "", "modules.softdep": "softdep"},
        {"modules.dep": "", "modules.softdep": "install x"},
        {"modules.dep": "", "modules.alias": "alias x"},
        {"modules.dep": "", "modules.alias": "options x y"},
    ],
)
def test_index_files_that_make_no_sense_are_refused(files: dict[str, str]) -> None:
    with pytest.raises(InvalidArchive):
        ModuleIndex.parse(files)


def test_a_circle_in_modules_dep_is_refused_with_its_members() -> None:
    index = ModuleIndex.parse({"modules.dep": "a.ko: b.ko\nb.ko: c.ko\nc.ko: b.ko\n"})
    with pytest.raises(InvalidArchive, match=r"circle: (b\.ko c\.ko b\.ko|c\.ko b\.ko c\.ko)"):
        closure(index, ["a"])


def test_a_soft_dependency_never_comes_before_a_hard_one() -> None:
    modules = {
        "a.ko": Modinfo("a", depends=("b",)),
        "b.ko": Modinfo("b", softdeps_pre=("c",)),
        "c.ko": Modinfo("c", depends=("a",)),
    }
    for wanted in itertools.permutations("abc"):
        assert closure(build_index("1", modules, ""), wanted) == ("b.ko", "a.ko", "c.ko")


def test_too_many_circles_of_soft_dependencies_are_refused_in_time() -> None:
    modules = {}
    for number in range(1000):
        modules[f"a{number}.ko"] = Modinfo(f"a{number}", softdeps_pre=(f"b{number}",))
        modules[f"b{number}.ko"] = Modinfo(f"b{number}", softdeps_pre=(f"a{number}",))
    index = build_index("1", modules, "")
    with pytest.raises(InvalidArchive, match="100 circles"):
        closure(index, [f"a{number}" for number in range(1000)])


def test_a_chain_of_any_length_is_followed() -> None:
    modules = {f"m{n}.ko": Modinfo(f"m{n}", depends=(f"m{n - 1}",) if n else ()) for n in range(500)}
    assert closure(build_index("1", modules, ""), ["m499"]) == tuple(f"m{n}.ko" for n in range(500))


LETTERS = "abcdefgh"
EDGES = st.dictionaries(st.sampled_from(LETTERS), st.sets(st.sampled_from(LETTERS)), max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    hard=EDGES, pre=EDGES, post=EDGES, wanted=st.lists(st.sampled_from(LETTERS)), builtin=st.sampled_from(["", "z.ko"])
)
def test_in_any_graph_the_order_keeps_every_need(
    hard: dict[str, set[str]],
    pre: dict[str, set[str]],
    post: dict[str, set[str]],
    wanted: list[str],
    builtin: str,
) -> None:
    modules = {
        f"kernel/{name}.ko": Modinfo(
            name,
            depends=tuple(sorted(need for need in hard.get(name, ()) if need < name)),
            softdeps_pre=tuple(sorted(pre.get(name, ()))),
            softdeps_post=tuple(sorted(post.get(name, ()))),
            aliases=(f"fs-{name}", f"pci:{name}*"),
        )
        for name in LETTERS
    }
    index = build_index("6.1.0", modules, builtin)
    assert ModuleIndex.parse(index.files()) == index
    order = [module_name(path) for path in closure(index, wanted)]
    assert len(set(order)) == len(order)
    assert set(wanted) <= set(order)
    for name in order:
        info = modules[f"kernel/{name}.ko"]
        assert set(info.depends) <= set(order[: order.index(name)])
        assert {*info.softdeps_pre, *info.softdeps_post} <= set(order)
    assert ModuleIndex.parse(subset(index, closure(index, wanted))).dependencies.keys() == set(closure(index, wanted))


@settings(max_examples=100, deadline=None)
@given(pre=EDGES, wanted=st.permutations(LETTERS))
def test_without_circles_every_wish_is_kept(pre: dict[str, set[str]], wanted: list[str]) -> None:
    modules = {
        f"{name}.ko": Modinfo(
            name,
            softdeps_pre=tuple(need for need in pre.get(name, ()) if need < name),
            softdeps_post=tuple(need for need in pre.get(name, ()) if need > name),
        )
        for name in LETTERS
    }
    order = [module_name(path) for path in closure(build_index("1", modules, ""), wanted)]
    assert all(
        (order.index(need) < order.index(name)) == (need < name)
        for name in LETTERS
        for need in pre.get(name, set()) - {name}
    )


FILES = st.sampled_from(["modules.dep", "modules.softdep", "modules.alias", "modules.builtin", "modules.order"])
PIECES = st.sampled_from(
    [
        "a.ko",
        "b.ko:",
        ":",
        " ",
        "\n",
        "#",
        "alias",
        "softdep",
        "pre:",
        "post:",
        "a",
        "*",
        "[",
        "]",
        "-",
        "../",
        "\0",
        "é",
    ]
)
TEXTS = st.one_of(st.text(max_size=30), st.lists(PIECES, max_size=20).map("".join), st.lists(PIECES).map(" ".join))


def test_an_open_bracket_takes_no_longer_than_any_other_name() -> None:
    began = time.process_time()
    assert module_name("a-[-" + "[" * 200_000) == "a_[-" + "[" * 200_000
    assert time.process_time() - began < 0.5


def test_modules_that_need_each_other_in_too_many_ways_are_refused_before_memory_runs_out() -> None:
    modules = {f"kernel/m{n}.ko": Modinfo(f"m{n}", depends=(f"m{n + 1}",)) for n in range(5000)}
    modules["kernel/m5000.ko"] = Modinfo("m5000")
    began = time.process_time()
    with pytest.raises(InvalidArchive, match="ways"):
        build_index("1", modules, "")
    assert time.process_time() - began < 2


def test_aliases_that_take_too_long_to_match_are_refused() -> None:
    files = {
        "modules.dep": "kernel/a.ko:\n",
        "modules.softdep": "softdep a pre: " + " ".join(f"x{n}" for n in range(5000)),
        "modules.alias": "".join(f"alias *-{n} a\n" for n in range(5000)),
    }
    began = time.process_time()
    with pytest.raises(InvalidArchive, match="too long"):
        closure(ModuleIndex.parse(files), ["a"])
    assert time.process_time() - began < 2


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(FILES, TEXTS), TEXTS, st.lists(st.tuples(st.integers(0, len(EROFS) - 1), st.binary(min_size=1))))
def test_junk_gives_only_typed_errors(files: dict[str, str], name: str, damage: list[tuple[int, bytes]]) -> None:
    with contextlib.suppress(SystemFilesError):
        index = ModuleIndex.parse({"modules.dep": "", **files})
        subset(index, closure(index, [*index.dependencies, "a", name]))
    broken = bytearray(EROFS)
    for place, data in damage:
        broken[place : place + len(data)] = data
    with contextlib.suppress(InvalidArchive):
        read_modinfo(bytes(broken))
