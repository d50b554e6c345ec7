"""Kernels, archives and modules, changed, given to those who take them apart."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hypothesis import strategies as st

from systemfiles.foundation import cpio, cpioreader
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.deb import read_deb
from systemfiles.foundation.errors import SystemFilesError
from systemfiles.foundation.kernelfile import describe
from systemfiles.foundation.kernelimage import bootable_form, check_kernel
from systemfiles.recipes.busybox import applets, layer_from_deb
from systemfiles.recipes.initrd import build_initrd, init_versions
from systemfiles.recipes.kernel import build_kernel
from systemfiles.recipes.kmod import ALIAS, BUILTIN, DEP, SOFTDEP, ModuleIndex, closure, subset
from systemfiles.recipes.layers import apply_layers
from systemfiles.recipes.modinfo import read_modinfo
from tests.unit import test_deb as debs
from tests.unit import test_kernelimage as kernels
from tests.unit import test_kmod as modules
from tests.unit import test_layers as layers

X86, ARM = Arch.X86_64, Arch.AARCH64
Call = Callable[[bytes, Path], object]

# --- kernels ---

CODE = kernels.CODE[:300]
VMLINUX = kernels.vmlinux(code=CODE)
IMAGE = kernels.image(code=kernels.CODE[:4500])
IMAGES = (
    IMAGE,
    kernels.image(efi=False, code=kernels.CODE[:4100]),
    kernels.image(code=kernels.CODE[:4500], certificate=64),
)
BZIMAGES = tuple(kernels.packed(name, VMLINUX) for name in kernels.COMPRESSORS)
WORDS_FOR_ELF = (b"Xen\0", b"GNU\0", struct.pack("<III", 4, 8, 18), struct.pack("<III", 4, 16, 5), bytes(64))


def take_kernel(arch: Arch) -> Call:
    def call(data: bytes, work: Path) -> None:
        source, scratch = work / "source", work / "scratch"
        source.write_bytes(data)
        assert describe(source)
        try:
            path, image = bootable_form(source, scratch, arch)
        except SystemFilesError:
            assert not scratch.exists()
            raise
        size = path.stat().st_size
        assert image.size == size
        assert check_kernel(path, arch).facts == image.facts
        if arch is X86:
            raw, entry = path.read_bytes(), int(str(dict(image.facts)["pvh_entry"]), 16)
            offset, count = struct.unpack_from("<Q", raw, 32)[0], struct.unpack_from("<H", raw, 56)[0]
            headers = [struct.unpack_from("<IIQQQQQQ", raw, offset + 56 * n) for n in range(count)]
            assert any(kind == 1 and start <= entry < start + held for kind, _, _, _, start, held, _, _ in headers)
        else:
            assert size <= int(dict(image.facts)["image_size"])

    return call


def in_bzimage(vmlinux: bytes) -> bytes:
    return kernels.packed("gzip", vmlinux)


def with_notes(notes: bytes) -> bytes:
    return kernels.vmlinux(notes=notes, code=CODE)


NOTES = (
    kernels.PVH,
    kernels.note(b"GNU\0", 3, bytes(20))
    + kernels.note(b"GNU\0", 5, struct.pack("<IIQ", 0xC0000002, 4, 3))
    + kernels.PVH,
    kernels.note(b"GNU\0", 1, bytes(16)) + kernels.note(b"stapsdt\0", 3, bytes(40)) + kernels.PVH,
    kernels.note(b"CORE", 0x46494C45, bytes(64)) + kernels.note(b"FreeBSD\0", 1, bytes(4)) + kernels.PVH,
)


# --- archives ---

TREE = layers.LOWER
TARS = (
    TREE,
    layers.tar(layers.file("d" * 120 + "/ü", b"x" * 600), layers.symlink("l", "t" * 150), format=tarfile.GNU_FORMAT),
    layers.tar(layers.file("d" * 120 + "/ü", b"x" * 600), layers.symlink("l", "t" * 150), pax={"comment": "c"}),
    layers.tar(layers.directory("etc"), layers.file("etc/.wh.passwd"), layers.file("etc/.wh..wh..opq")),
    layers.tar(layers.symlink("a", "b/../c"), layers.symlink("c", "/d"), layers.file("a/x"), layers.hardlink("h", "c")),
)
TAR_WORDS = (
    *(b"../../etc/x\0", b"/etc/passwd\0", b".wh.", b".wh..wh..opq\0", b"././@PaxHeader\0", b"././@LongLink\0"),
    *(b"30 GNU.sparse.major=1\n", b"20 GNU.sparse.map=0\n", b"22 size=99999999999999\n", b"19 hdrcharset=BINARY\n"),
    *(b"15 path=../../x\n", b"11 size=-1\n", b"9 uid=-1\n", b"12 mtime=nan\n", b"99999999999999999999 a=b\n", b"=\n"),
    *(b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", *(b"%d" % n for n in range(8)), b"S", b"x", b"g", b"L"),
)


def _member(path: str, kind: bytes, link: str, mode: int) -> layers.Member:
    return layers.member(path, kind, b"x" * (kind == tarfile.REGTYPE), mode=mode, link=link)


_PATHS = st.lists(
    st.sampled_from(("a", "b", "etc", "..", ".", "", ".wh.a", ".wh..wh..opq", ".wh.", ".wh..wh.x", "a" * 300, "a\0")),
    min_size=1,
    max_size=5,
).map("/".join)
_KINDS = st.sampled_from(
    (
        *(tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE),
        *(tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, b"z"),
    )
)
_MEMBERS = st.lists(st.builds(_member, _PATHS, _KINDS, _PATHS, st.integers(0, 0o7777)), max_size=12)
trees = _MEMBERS.map(lambda members: layers.tar(*members))


_EDGES = st.sampled_from((0, 1, 2, 3, 10, 0o40755, 0o100644, 0o120777, 0o20600, 0x7FFFFFFF, 0xFFFFFFFF))
_PLAIN = st.sampled_from((b"a", b"b", b"c", b"d/e", b"d/f", b"g", b"h"))
_NAMES = (
    st.sampled_from((b"..", b"/x", b".", b"a/b", b"TRAILER!!!", b"", b"a\0b", b"\xff", b"n" * 300)) | _PLAIN | _PLAIN
)


def _cpio_entry(mode: int, nlink: int, inode: int, name: bytes, data: bytes, wrong: tuple[int, int] | None) -> bytes:
    """An entry whose fields are right but for one; `wrong` is the number of that one and its value."""
    if not wrong and mode not in (0o120777, 0o100644, 0o100755):
        data = b""
    fields = [inode, mode, 0, 0, nlink, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
    if wrong:
        fields[wrong[0]] = wrong[1]
    head = b"070701" + b"%08X" * 13 % tuple(fields) + name + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


_ENTRIES = st.lists(
    st.builds(
        _cpio_entry,
        st.sampled_from((0o100644, 0o100755, 0o100600, 0o104755, 0o120777, 0o40755, 0o20600)),
        st.integers(1, 3),
        st.integers(0, 2),
        _NAMES,
        st.sampled_from((b"", b"", b"x", b"a/b", b"content")),
        st.none() | st.tuples(st.integers(0, 12), _EDGES),
    ),
    max_size=8,
)
cpio_archives = _ENTRIES.map(lambda entries: b"".join((*entries, _cpio_entry(0, 1, 0, b"TRAILER!!!", b"", None))))


def plain(records: Sequence[cpio.Record]) -> None:
    """Names lead nowhere but down, and the records can be written and read back."""
    for record in records:
        assert not record.name.startswith("/")
        assert not {"", ".", ".."} & {*record.name.split("/")}
        assert "\0" not in record.name
    out = io.BytesIO()
    cpio.write(records, out)
    out.seek(0)
    assert len(cpioreader.read(out)) == len(records)


def take_cpio(data: bytes, _: Path) -> None:
    plain(cpio.normalise(cpioreader.read(io.BytesIO(data))))


def take_layers(data: bytes, _: Path) -> None:
    plain(apply_layers([io.BytesIO(TREE), io.BytesIO(data)]))


DEB = debs.package(debs.tar(debs.FILES, mode="w"), "data.tar")
DEBS = (DEB, debs.package(debs.tar(debs.FILES, mode="w:gz"), "data.tar.gz"), debs.package(debs.tar(debs.FILES)))
DEB_WORDS = (*TAR_WORDS, b"data.tar", b"data.tar.zst", b"!<arch>\n", b"`\n", b"9999999999", b"-1        ")


def take_deb(data: bytes, work: Path) -> None:
    path = work / "x.deb"
    path.write_bytes(data)
    for file in read_deb(path):
        assert isinstance(file.path, str)
        total = sum(map(len, file.blocks()))
        assert total <= max(file.size, 0), "a file has more bytes than it says"


def in_deb(tar: bytes) -> bytes:
    return debs.package(tar, "data.tar")


MODINFO = b"license=GPL\0alias=fs-a-*\0depends=b-c\0softdep=pre: b-c post: d\0name=a\0vermagic=1 SMP \0"
KERNEL_FILES = {
    "./boot/vmlinuz-1": kernels.packed("gzip", VMLINUX),
    "./usr/lib/modules/1/modules.builtin": b"kernel/built.ko\n",
    "./usr/lib/modules/1/kernel/a.ko": modules.module(MODINFO),
    "./usr/lib/modules/1/kernel/b_c.ko.xz": lzma.compress(modules.module(b"name=b_c\0depends=built\0vermagic=1 \0")),
    "./usr/lib/modules/1/kernel/d.ko.gz": gzip.compress(modules.module(b"softdep=post: a\0alias=pci:v*d[0-9]*\0")),
}
KERNEL_TARS = (debs.tar(KERNEL_FILES, mode="w"), debs.tar({**KERNEL_FILES, "./boot/vmlinuz-1": VMLINUX}, mode="w"))


def take_kernel_package(data: bytes, work: Path) -> None:
    path = work / "kernel.deb"
    path.write_bytes(data)
    build = build_kernel(path, work, X86)
    if build.modules:
        with tarfile.open(build.modules) as tar:
            names = tar.getnames()
        assert all(name.startswith(f"lib/modules/{build.release}/") and ".." not in name.split("/") for name in names)


# --- busybox and modules ---

NAMES = (b"[", b"ash", b"cat", *(b"applet%02d" % n for n in range(60)), b"mount", b"sh", b"umount")
BUSYBOX = kernels.vmlinux(code=b"\xff\0" + b"\0".join(sorted(NAMES)) + b"\0\xff", notes=b"")
BASE = layers.tar(layers.file("bin/busybox", BUSYBOX, mode=0o755))


def take_busybox(data: bytes, work: Path) -> None:
    path = work / "busybox.deb"
    path.write_bytes(debs.package(debs.tar({"./bin/busybox": data}, mode="w"), "data.tar"))
    layer = layer_from_deb(path, X86)
    assert [record.name for record in apply_layers([io.BytesIO(layer)])] == ["bin", "bin/busybox"]
    assert all(name.isascii() and "/" not in name for name in applets(data))


def take_modinfo(data: bytes, _: Path) -> None:
    info = read_modinfo(data, name="kernel/a-b.ko")
    assert all(word.split() == [word] for word in (info.name, *info.depends, *info.softdeps_pre, *info.softdeps_post))


SEPARATOR = b"\n===\n"
INDEX = (
    b"kernel/a.ko: kernel/b.ko kernel/c.ko\nkernel/b.ko: kernel/c.ko\nkernel/c.ko:\n",
    b"# soft\nsoftdep a pre: c crc32 post: d-*\nsoftdep b post: a\n",
    b"alias fs-a a\nalias d-[0-9]* b\nalias crc32 c\nalias pci:v*d*sv*sd*bc*sc*i* c\n",
    b"kernel/built.ko\n",
)
INDEX_WORDS = (
    b": ",
    b"pre:",
    b"post:",
    b"alias ",
    b"softdep ",
    b"[",
    b"]",
    b"[!a-",
    b"*" * 30,
    b"?",
    b"a" * 3000,
    b"-",
)


INDEXES = SEPARATOR.join(INDEX)


def take_index(data: bytes, _: Path) -> None:
    texts = data.decode("utf-8", "surrogateescape").split(SEPARATOR.decode())
    index = ModuleIndex.parse(dict(zip((DEP, SOFTDEP, ALIAS, BUILTIN), texts, strict=False)))
    for wanted in (["a"], ["fs-a", "b"], ["d-7-x"], ["built"]):
        chosen = closure(index, wanted)
        assert set(chosen) <= index.dependencies.keys()
        assert ModuleIndex.parse(subset(index, chosen)).dependencies.keys() == set(chosen)


def modules_tar() -> bytes:
    texts = dict(zip((DEP, SOFTDEP, ALIAS, BUILTIN), INDEX, strict=True))
    files = {f"lib/modules/1/{name}": text for name, text in sorted(texts.items())}
    return debs.tar({**files, **{f"lib/modules/1/kernel/{name}.ko": name.encode() for name in "abc"}}, mode="w")


def take_modules_tar(data: bytes, work: Path) -> None:
    path = work / "modules.tar"
    path.write_bytes(data)
    out = io.BytesIO()
    build_initrd([io.BytesIO(BASE)], out, init=init_versions()[0], modules=path, load=["a"], carry=["fs-a"])
    plain(cpioreader.read(io.BytesIO(gzip.decompress(out.getvalue()))))
