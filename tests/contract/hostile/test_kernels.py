"""Kernels and packages of kernels: the digest is right, the content is not."""

from __future__ import annotations

import gzip
import lzma
import struct
import tarfile

import pytest

from systemfiles.foundation.errors import DigestMismatch, InvalidArchive, InvalidKernel, SourceUnavailable
from tests.contract.answers import body, content, cut, in_turn
from tests.contract.hostile.bombs import ZEROS, gzip_bomb, lz4_bomb, xz_of_4_gib, zstd_bomb
from tests.contract.hostile.world import HTML, OTHER, Check, Row, World, a_kernel, gives, run_row
from tests.contract.origins import digest_of
from tests.unit.test_deb import ar, member, package
from tests.unit.test_kernelimage import bzimage, image, vmlinux
from tests.unit.test_kmod import module
from tests.unit.test_layers import file, tar


def promises(kernel: bytes, arch: str = "x86_64") -> Check:
    """The catalog pins these bytes, and the origin has them."""

    def hostile(world: World) -> None:
        world.kernel, world.arch = kernel, arch
        world.origin.answers["/kernel"] = content(kernel)

    return hostile


def bzimage_that_says(payload: bytes, size: int) -> bytes:
    """A bzImage with this payload, which is said to unpack to `size` bytes: behind it, or in gzip's own trailer."""
    if payload.startswith(b"\x1f\x8b"):
        return bzimage(payload[:-4] + struct.pack("<I", size), size=None)
    return bzimage(payload, size=size)


def deb_with(*names: str, kernel: bytes = b"") -> bytes:
    """A kernel package with these files, and a kernel that is sound."""
    data = kernel or vmlinux()
    return package(
        gzip.compress(tar(file("./boot/vmlinuz-6.1", data), *(file(name, b"x") for name in names))), "data.tar.gz"
    )


def deb_with_modules(release: str, *names: str) -> bytes:
    """A kernel package with modules that say they are of this release."""
    data = module(b"vermagic=%s SMP\0depends=\0" % release.encode())
    entries = [file("./boot/vmlinuz-6.1", vmlinux())]
    for name in names:
        info, _ = entry = file("a", data)
        info.pax_headers = {"path": f"./lib/modules/{release}/kernel/{name}"}
        entries.append(entry)
    return package(gzip.compress(tar(*entries)), "data.tar.gz")


def deb_with_a_size(size: int) -> bytes:
    info = tarfile.TarInfo("./boot/vmlinuz-6.1")
    info.size = size
    return package(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240), "data.tar")


SOUND = gzip.compress(tar(file("./boot/vmlinuz-6.1", vmlinux())))
KERNELS = [
    Row("a kernel of another digest", a_kernel, gives(content(OTHER)), DigestMismatch, ["{origin}/kernel"]),
    Row("a web page for a kernel", a_kernel, gives(body(HTML)), DigestMismatch, [digest_of(HTML)], {"/kernel": 1}),
    Row(
        "a kernel that breaks off",
        a_kernel,
        gives(body(b"\x7fELF", length=9999)),
        SourceUnavailable,
        ["provide|mirror"],
    ),
    Row("a kernel that is cut and resumed", a_kernel, gives(in_turn(cut(vmlinux(), 5000), content(vmlinux())))),
    Row("no kernel but a page", a_kernel, promises(HTML), InvalidKernel, ["HTML page", "{origin}/kernel"]),
    Row("another architecture's kernel", a_kernel, promises(image()), InvalidKernel, ["an arm64 Image"]),
    Row("another architecture's kernel here", a_kernel, promises(vmlinux(), "aarch64"), InvalidKernel, ["x86_64"]),
    Row("a kernel that is cut off", a_kernel, promises(vmlinux()[:-2000]), InvalidKernel, ["truncated"]),
    *(
        Row(
            f"a bomb in {name} that says {words}",
            a_kernel,
            promises(bzimage_that_says(bomb, size)),
            InvalidKernel,
            ["{origin}/kernel"],
        )
        for name, bomb in (
            ("gzip", gzip_bomb()),
            ("xz", lzma.compress(bytes(ZEROS), check=lzma.CHECK_CRC32)),
            ("zstd", zstd_bomb()),
            ("lz4", lz4_bomb()),
        )
        for words, size in (("how large it is", ZEROS), ("it is small", 1000))
    ),
    Row("an Image.gz that is a bomb", a_kernel, promises(gzip_bomb(), "aarch64"), InvalidKernel, ["64 times"]),
    Row(
        "a kernel that wants 4 GiB of dictionary",
        a_kernel,
        promises(bzimage(xz_of_4_gib(vmlinux()), size=len(vmlinux()))),
        InvalidKernel,
        ["damaged"],
    ),
    Row(
        "a package with two data members",
        a_kernel,
        promises(ar(member("debian-binary", b"2.0\n"), *[member("data.tar.gz", SOUND)] * 2)),
        InvalidArchive,
        ["2 data.tar members", "{origin}/kernel"],
    ),
    Row(
        "a package that wants 4 GiB of dictionary",
        a_kernel,
        promises(package(xz_of_4_gib(tar(file("./boot/vmlinuz-6.1", vmlinux()))))),
        InvalidArchive,
        ["{origin}/kernel"],
    ),
    Row("a package that is cut off", a_kernel, promises(deb_with()[:-700]), InvalidArchive, ["cut off"]),
    Row("a package with a file of 1 TiB", a_kernel, promises(deb_with_a_size(1 << 40)), InvalidArchive, ["more than"]),
    Row(
        "a package without a kernel",
        a_kernel,
        promises(package(tar(file("x")), "data.tar")),
        InvalidKernel,
        ["vmlinuz"],
    ),
    *(
        Row(f"a package with {what}", a_kernel, promises(data), InvalidArchive, ["{origin}/kernel"], {"/kernel": 1})
        for what, data in (
            ("a module that leads out of it", deb_with_modules("6.1", "../../../../evil.ko")),
            ("a module with a colon in its name", deb_with_modules("6.1", "a:b.ko")),
            ("a module with a newline in its name", deb_with_modules("6.1", "a\nb.ko")),
            ("two modules of one name", deb_with_modules("6.1", "x/a.ko", "y/a.ko")),
            ("a release that is a path", deb_with_modules("..", "a.ko")),
            ("a release with a newline", deb_with_modules("6.1\nx", "a.ko")),
        )
    ),
    Row(
        "a package with a bomb for a kernel",
        a_kernel,
        promises(deb_with(kernel=bzimage(lz4_bomb(), size=ZEROS))),
        InvalidKernel,
        ["{origin}/kernel"],
    ),
]


@pytest.mark.parametrize("row", KERNELS, ids=str)
def test_an_origin_may_do_what_it_wants(row: Row, world: World) -> None:
    run_row(row, world)
