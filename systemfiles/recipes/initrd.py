"""Initrds: a busybox root, /init, the modules a kernel needs → a reproducible newc cpio, gzip'd.

The content depends on the inputs alone: names are sorted, times and owners are zero, nothing is read from the host's
file system. Its identity is the sha256 of the uncompressed cpio; the compressor is recorded and may change.
"""

from __future__ import annotations

import stat
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from systemfiles.foundation import cpio, cpioreader
from systemfiles.foundation.archive import BadStream
from systemfiles.foundation.digest import Digest, Hasher
from systemfiles.foundation.errors import DigestMismatch, InvalidArchive, UnknownVersion
from systemfiles.foundation.unpack import Compression, Limits, Packed, unpacked
from systemfiles.recipes import busybox
from systemfiles.recipes.kernel import read_index
from systemfiles.recipes.kmod import closure, subset
from systemfiles.recipes.layers import apply_layers
from systemfiles.recipes.tars import Header, intact, read_member

TREE = 2
"""The version of what `_skeleton` and `_links` add; part of every initrd's inputs."""

LEVEL = 9
try:  # the same version wherever that is pinned, as for releases, and four times as fast
    from zlib_ng import zlib_ng as _zlib

    COMPRESSOR = f"zlib-ng {_zlib.ZLIBNG_VERSION} level {LEVEL}"
except ImportError:
    import zlib as _zlib  # type: ignore[no-redef]

    COMPRESSOR = f"zlib {zlib.ZLIB_RUNTIME_VERSION} level {LEVEL}"
CONTENT_LIMITS = Limits(cpioreader.Limits().size, max_ratio=200, ratio_free=256 << 20)
"""How far an initrd may unpack here: to what the reader of cpio archives takes."""
_PLAIN = b"\x1f\x8b\x08\x00"
"""How what is written here begins: gzip, deflated, without flags (RFC 1952, 2.3)."""
INIT = "init"
_GUEST = Path(__file__).parent / "guest"
_DIRECTORIES = (
    *("bin", "dev", "etc", "mnt", "proc", "root", "run", "sbin", "sys", "tmp"),
    *("etc/dev", "etc/dev/pts", "etc/dev/shm"),
    *("run/config", "run/overlay", "run/root", "run/rootfs"),  # where init mounts what it is given
)
# what a devtmpfs lacks; init copies all of etc/dev there
_DEV = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"}


class Sink(Protocol):
    """Where compressed bytes go."""

    def write(self, data: bytes, /) -> int: ...


@dataclass(frozen=True, slots=True)
class InitrdBuild:
    """A finished initrd: identity, number of cpio entries, names of the modules inside, and how it was compressed."""

    content_sha256: str
    content_size: int
    entries: int
    modules: tuple[str, ...]
    compressor: str


def init_versions() -> tuple[str, ...]:
    """The versions of the init script in this release, sorted."""
    return tuple(sorted(path.name[len("init-") : -len(".sh")] for path in _GUEST.glob("init-*.sh")))


def init_script(version: str) -> bytes:
    """The init script of that version. Raises UnknownVersion."""
    if version not in init_versions():
        raise UnknownVersion(INIT, version, known=init_versions())
    return (_GUEST / f"init-{version}.sh").read_bytes()


def initrd_inputs(
    *,
    init: str,
    busybox: Mapping[str, Any],
    kernel: Mapping[str, Any] | None,
    load: Sequence[str],
    carry: Sequence[str],
) -> dict[str, Any]:
    """The whole preimage of an initrd's content. `busybox` and `kernel` identify theirs by digest."""
    script = Hasher()
    script.update(init_script(init))
    inputs: dict[str, Any] = {
        "tree": TREE,
        "init": {"version": init, "sha256": script.digest().hex},
        "busybox": dict(busybox),
    }
    if kernel is not None:
        inputs |= {"kernel": dict(kernel), "load": [*load], "carry": [*carry]}
    return inputs


def build_initrd(
    layers: Sequence[BinaryIO],
    out: Sink,
    *,
    init: str,
    modules: Path | None = None,
    load: Sequence[str] = (),
    carry: Sequence[str] = (),
) -> InitrdBuild:
    """Writes the initrd to `out`: the image `layers`, the init script `init`, modules from the tar at `modules`.

    Raises InvalidArchive, UnknownVersion.
    """
    root = {record.name: replace(record, uid=0, gid=0, mtime=0) for record in apply_layers(layers)}
    root |= _named(_skeleton(init_script(init)))
    root |= _named(link for link in _links(root) if link.name not in root)
    taken: tuple[str, ...] = ()
    if modules is not None:
        taken, records = _modules(modules, load, carry)
        root |= _named(records)
    gzip = _Gzip(out)
    entries = cpio.normalise(root.values())
    cpio.write(entries, gzip)
    gzip.close()
    return InitrdBuild(gzip.content.digest().hex, gzip.content.size, len(entries), taken, COMPRESSOR)


def _named(records: Iterable[cpio.Record]) -> dict[str, cpio.Record]:
    return {record.name: record for record in records}


def _skeleton(init: bytes) -> list[cpio.Record]:
    return [
        *(cpio.directory(name) for name in _DIRECTORIES),
        cpio.directory("tmp", mode=0o1777),
        *(cpio.symlink(f"etc/dev/{name}", target) for name, target in _DEV.items()),
        # The kernel opens /dev/console for init before anyone could mount a /dev, and the entrypoint has it for its
        # stdout. Whoever that runs as may open /dev/stdout, too, which looks at the mode of this one.
        cpio.char_device("dev/console", 5, 1, mode=0o666),
        cpio.char_device("dev/null", 1, 3, mode=0o666),
        cpio.Record("run/ended", stat.S_IFIFO | 0o600),  # by which init learns that all has ended
        cpio.file(INIT, init, mode=0o755),
    ]


def _links(root: Mapping[str, cpio.Record]) -> list[cpio.Record]:
    binary = root.get(busybox.PATH)
    if binary is not None and binary.hardlink:  # as in Docker Hub's image, where every applet is a name of one file
        binary = root.get(binary.hardlink)
    if binary is None or not isinstance(binary.data, bytes):
        raise InvalidArchive(busybox.PATH, "the busybox image does not hold it")
    links = [cpio.symlink(f"bin/{name}", "busybox") for name in busybox.applets(binary.data) if name != "busybox"]
    # where the kernel looks for it when it wants a module by itself
    return [*links, cpio.symlink("sbin/modprobe", "../bin/busybox")]


def _modules(tar: Path, load: Sequence[str], carry: Sequence[str]) -> tuple[tuple[str, ...], list[cpio.Record]]:
    with intact(tar), tarfile.open(tar, "r:", tarinfo=Header) as archive:
        release, index = read_index(archive)
        wanted = closure(index, [*load, *carry])
        root = f"lib/modules/{release}"
        records = [cpio.file(f"{root}/{name}", text.encode()) for name, text in subset(index, wanted).items()]
        missing = {f"{root}/{path}" for path in wanted}
        for member in archive:  # from its beginning: who reads the index has met the first module, too
            if not missing:
                break
            if member.name in missing:
                records.append(cpio.file(member.name, read_member(archive, member)))
                missing.remove(member.name)
    if missing:
        raise InvalidArchive(tar, f"its index names modules that it does not hold: {', '.join(sorted(missing))}")
    records.append(cpio.file("etc/modules", "".join(f"{name}\n" for name in load).encode()))
    return tuple(Path(path).name.split(".")[0] for path in wanted), records


def check_content(path: Path, sha256: str, *, subject: object) -> None:
    """Makes sure that the initrd at `path` is one gzip member whose content has this digest, in hex.

    And that the kernel finds the same in it: that would unpack whatever follows the member (its early-userspace/
    buffer-format), and takes what flags of the header announce, but for a name, for content (its
    lib/decompress_inflate.c). Raises DigestMismatch.
    """
    expected, got = Digest.from_hex(sha256), _content_of(path)
    if got != expected:
        raise DigestMismatch(subject, expected=f"the content {expected}", got=got, consequence="it was refused")


def _content_of(path: Path) -> str:
    """The digest of what is compressed there, or what is wrong with it."""
    content = Hasher()
    try:
        with path.open("rb") as stream:
            if stream.read(len(_PLAIN)) != _PLAIN:
                return "something else than a gzip member without flags"
            stream.seek(0)
            for block in unpacked(Packed(stream, length=path.stat().st_size), Compression.GZIP, CONTENT_LIMITS):
                content.update(block)
    except (OSError, BadStream) as error:
        return str(error)
    return content.digest()


class _Gzip:
    """Hashes what is written to it and passes it on compressed (RFC 1952), without a time or a name in the header."""

    def __init__(self, out: Sink) -> None:
        self.content = Hasher()
        self._out = out
        self._deflate = _zlib.compressobj(LEVEL, zlib.DEFLATED, zlib.MAX_WBITS | 16)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self.content.update(data)
        self._out.write(self._deflate.compress(data))
        return len(data)

    def close(self) -> None:
        self._out.write(self._deflate.flush())
