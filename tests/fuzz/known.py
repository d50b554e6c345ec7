"""Inputs that once were too much for a parser, or are meant to be: given to each target before any others.

They are made when they are needed: some take longer to make than to refuse.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable

from tests.fuzz import archives, stores
from tests.fuzz.mutations import sealed
from tests.unit import test_deb as debs
from tests.unit import test_kernelimage as kernels
from tests.unit import test_kmod as modules

GIB = 1 << 30
DEPTHS = (*range(950, 985, 3), 1500, 5000)  # where one of the JSON readers and writers gives up, and another may not


def claiming(size: int, name: str) -> bytes:
    """A tar of one file whose extended header claims `size` bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = 1, {"size": str(size)}
    return info.tobuf(tarfile.PAX_FORMAT) + bytes(10240)


def sparse(name: str, size: int) -> bytes:
    """A tar of one file (GNU tar manual, "Old GNU Format") that is one hole of `size` bytes and a little content."""
    info = tarfile.TarInfo(name)
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    raw[386:410] = b"%011o\0%011o\0" % (size - 512, 512)
    raw[483:495] = b"%011o\0" % size
    return sealed(bytes(raw) + bytes(512 + 1024))


def bzip2_bomb() -> bytes:
    """4 GB of a file, in a stream for each 45 MB of it."""
    zeros = bz2.compress(bytes(45 << 20))
    info = tarfile.TarInfo("./boot/vmlinuz-1")
    info.size = 4 * GIB - 4096
    return bz2.compress(info.tobuf(tarfile.GNU_FORMAT)) + zeros * 90


def pax_record(body: bytes) -> bytes:
    """A tar whose first header is an extended one of these bytes."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512) + archives.TREE


def chain(count: int) -> bytes:
    """A package of modules of which each needs the next."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in archives.KERNEL_FILES.items():
            if name.startswith("./boot/"):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        for number in range(count):
            last = number == count - 1
            data = modules.module(b"depends=%s\0" % (b"" if last else b"m%d" % (number + 1)))
            info = tarfile.TarInfo(f"./lib/modules/1/kernel/m{number}.ko")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def index(*, softdep: bytes = b"", alias: bytes = b"") -> bytes:
    return archives.SEPARATOR.join((archives.INDEX[0], softdep, alias + archives.INDEX[2], b""))


def record_with(value: str) -> bytes:
    """An artifact.json with this JSON text among its inputs."""
    return json.dumps({**stores.RECORDS[0], "inputs": {"x": "VALUE"}}).replace('"VALUE"', value).encode()


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


KNOWN: dict[str, dict[str, Callable[[], bytes]]] = {
    "catalog": {
        "nested arrays": lambda: b"schema = 1\nx = " + b"[" * 900 + b"]" * 900,
        "more nested arrays": lambda: b"schema = 1\nx = " + b"[\n" * 50_000,
        "a key of many parts": lambda: b"schema = 1\n" + b"a." * 100_000 + b"b = 1",
        "many keys of many parts": lambda: (
            b"schema = 1\n" + b"".join(b"a%d." % n + b"b." * 480 + b"c=1\n" for n in range(120))
        ),
    },
    "versions.lock": {
        "nested inputs": lambda: json.dumps(stores.LOCK).replace('"tree": 1', f'"tree": {nested(195)}').encode(),
        "a number of 4300 digits": lambda: (
            json.dumps(stores.LOCK).replace('"tree": 1', f'"tree": {"9" * 4300}').encode()
        ),
    },
    "ELF notes": {
        "64 KiB of empty notes": lambda: archives.with_notes(bytes(65532)),
        "a name of 4 GiB": lambda: archives.with_notes(b"\xff" * 12 + kernels.PVH),
    },
    "bzImage": {
        f"{name} bomb": lambda name=name: kernels.bzimage(kernels.COMPRESSORS[name](bytes(16 << 20)), size=16 << 20)  # type: ignore[misc]
        for name in ("gzip", "xz")
    },
    "Image.gz": {"bomb": lambda: gzip.compress(bytes(130 << 20), 1)},
    "cpio": {
        "a file of 4 GiB": lambda: (
            b"070701" + b"00000001000081A4" + b"0" * 32 + b"FFFFFFFF" + b"0" * 32 + b"00000002" + b"0" * 8
        ),
    },
    "tar layer": {
        "a negative size": lambda: claiming(-1024, "x"),
        "a size beyond all disks": lambda: claiming(1 << 62, "x"),
        "a hole": lambda: sparse("x", 3 * GIB),
        "digits without end in an extended header": lambda: pax_record(b"1" * (1 << 20)),
        "many digits in an extended header": lambda: pax_record(b"1" * 5000 + b" hdrcharset=BINARY\n"),
    },
    "gzip layer": {"bomb": lambda: gzip.compress(bytes(130 << 20), 1)},
    "deb": {
        "bomb of little streams": lambda: debs.package(bzip2_bomb(), "data.tar.bz2"),
        "a hole": lambda: archives.in_deb(sparse("./x", 3 * GIB)),
    },
    "kernel package": {
        "bomb of little streams": lambda: debs.package(bzip2_bomb(), "data.tar.bz2"),
        "a kernel that is a hole": lambda: archives.in_deb(sparse("./boot/vmlinuz-1", 3 * GIB)),
        "a modules.builtin that is a hole": lambda: archives.in_deb(sparse("./lib/modules/1/modules.builtin", 3 * GIB)),
        "a module that is a hole": lambda: archives.in_deb(sparse("./lib/modules/1/kernel/a.ko", 3 * GIB)),
        "a modules.builtin that is no text": lambda: archives.in_deb(
            debs.tar({"./lib/modules/1/modules.builtin": b"\xff"}, mode="w")
        ),
        "a chain of modules": lambda: archives.in_deb(chain(5000)),
    },
    "module": {
        "gzip bomb": lambda: gzip.compress(bytes(130 << 20), 1),
        "xz bomb": lambda: lzma.compress(bytes(130 << 20), preset=0),
    },
    "modinfo": {"a name of open brackets": lambda: modules.module(b"name=-" + b"[" * 100_000 + b"\0")},
    "modules.dep": {
        "an alias of open brackets": lambda: index(alias=b"alias -" + b"[" * 100_000 + b" a\n"),
        "an alias of many stars": lambda: index(
            softdep=b"softdep a pre: " + b"a" * 3000, alias=b"alias " + b"*a" * 2000 + b"b a\n"
        ),
        "more matches than there is time for": lambda: index(
            softdep=b"softdep a pre: " + b" ".join(b"x%d" % n for n in range(5000)),
            alias=b"".join(b"alias *-%d a\n" % n for n in range(5000)),
        ),
    },
    "modules.tar": {
        "the first module of all": archives.modules_tar,
        "no tar": lambda: b"junk" * 1000,
        "no index": lambda: debs.tar({"x": b""}, mode="w"),
        "a negative size": lambda: claiming(-1024, "lib/modules/1/modules.dep"),
        "a size beyond all disks": lambda: claiming(1 << 62, "lib/modules/1/modules.dep"),
        "a hole": lambda: sparse("lib/modules/1/modules.dep", 3 * GIB),
        "an index that is no text": lambda: debs.tar({"lib/modules/1/modules.dep": b"\xff"}, mode="w"),
    },
    "docker config": {
        "nested arrays": lambda: nested(100_000).encode(),
        "half a character": lambda: b'{"auths":{"r.example.com":{"username":"\\ud800"}}}',
    },
    "credentials": {"a byte that is no UTF-8": lambda: b"r.example.com=basic:me:\xff"},
    "download": {
        "a wait without end": lambda: b"503\nRetry-After: " + b"9" * 5000 + b"\n\n",
        "a date before all time": lambda: b"503\nRetry-After: Mon, 1 Jan 1 00:00:00 -0000\n\n",
    },
    "token": {"nested arrays": lambda: nested(100_000).encode()},
    "WWW-Authenticate": {
        name: lambda piece=piece: piece * 8000  # type: ignore[misc]
        for name, piece in {"commas": b",", "words": b"a ", "quotes": b'a="', "spaces": b", a   "}.items()
    },
    "manifest": {"nested arrays": lambda: nested(100_000).encode()},
    **{
        name: {f"nested {depth} deep": lambda depth=depth: record_with(nested(depth)) for depth in DEPTHS}  # type: ignore[misc]
        for name in ("artifact.json", "artifact.json on disk", "artifact.json in the layout")
    },
    "stamp.json": {
        f"nested {depth} deep": lambda depth=depth: f'{{"x":[{nested(depth)}]}}'.encode()  # type: ignore[misc]
        for depth in DEPTHS
    },
    "index.json": {
        f"nested {depth} deep": lambda depth=depth: f'{{"manifests":[],"x":{nested(depth)}}}'.encode()  # type: ignore[misc]
        for depth in DEPTHS
    },
    "manifest in the layout": {
        f"nested {depth} deep": lambda depth=depth: f'{{"layers":[{nested(depth)}],"x":{nested(depth)}}}'.encode()  # type: ignore[misc]
        for depth in DEPTHS
    },
}
