"""busybox: from a distribution's package to a one-layer OCI image, and from the binary to the names it answers to."""

from __future__ import annotations

import io
import re
import tarfile
from itertools import takewhile
from pathlib import Path

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.deb import read_deb
from systemfiles.foundation.errors import InvalidArchive

PATH = "bin/busybox"
_MOST_BYTES = 64 << 20
_MACHINES = {Arch.X86_64: "EM_X86_64", Arch.AARCH64: "EM_AARCH64"}
# the applet table: some hundred sorted names in a row, each ended by NUL
_NAME = re.compile(rb"[a-z0-9\[_.-]{1,40}")
_LAST_NAME = re.compile(_NAME.pattern + rb"\Z")
_LANDMARK = b"\0mount\0"
_LONGEST_TABLE = 16 << 10
_MOST_LANDMARKS = 50
_FEWEST = 50
_ALWAYS_THERE = frozenset({"sh", "mount", "cat"})


def layer_from_deb(package: Path, arch: Arch) -> bytes:
    """An uncompressed tar layer with only /bin/busybox from `package`, the same bytes for the same package.

    Raises InvalidArchive when there is none, or one that is not a static program for `arch`.
    """
    for member in read_deb(package):
        if member.path in (PATH, f"usr/{PATH}") and member.size <= _MOST_BYTES:
            binary = member.read()
            _check_static(binary, package, arch)
            return _layer(binary)
    raise InvalidArchive(package, f"it holds no /{PATH}")


def applets(binary: bytes) -> tuple[str, ...]:
    """The names `binary` can be called by, sorted: what `busybox --list` prints, without running it.

    Raises InvalidArchive when no table of applets is found.
    """
    place = -1
    for _ in range(_MOST_LANDMARKS):
        place = binary.find(_LANDMARK, place + 1)
        if place < 0:
            break
        names = _names_around(binary, place)
        if names >= _ALWAYS_THERE and len(names) >= _FEWEST:
            return tuple(sorted(names))
    raise InvalidArchive(PATH, "it holds no table of applets: it is no busybox, or a newer one than is understood")


def _names_around(binary: bytes, place: int) -> set[str]:
    """The unbroken run of names, each ended by NUL, before and behind the NUL at `place`."""
    before = binary[max(0, place - _LONGEST_TABLE) : place].split(b"\0")
    behind = binary[place + 1 : place + _LONGEST_TABLE].split(b"\0")
    above = [*takewhile(_NAME.fullmatch, reversed(before))]
    if first := _LAST_NAME.search(before[-len(above) - 1]) if len(above) < len(before) else None:
        above.append(first[0])  # what comes before the table need not end with a NUL
    return {name.decode() for name in (*above, *takewhile(_NAME.fullmatch, behind))}


def _layer(binary: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        directory = tarfile.TarInfo("bin")
        directory.type = tarfile.DIRTYPE
        directory.mode = 0o755
        tar.addfile(directory)
        file = tarfile.TarInfo(PATH)
        file.mode = 0o755
        file.size = len(binary)
        tar.addfile(file, io.BytesIO(binary))
    return out.getvalue()


def _check_static(binary: bytes, package: Path, arch: Arch) -> None:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        elf = ELFFile(io.BytesIO(binary))
        machine, dynamic = elf["e_machine"], any(part["p_type"] == "PT_INTERP" for part in elf.iter_segments())
    except (ELFError, ValueError, ArithmeticError, LookupError) as error:  # elftools believes every offset it reads
        raise InvalidArchive(package, f"its /{PATH} is not a program ({error})") from error
    if machine != _MACHINES[arch]:
        raise InvalidArchive(package, f"its /{PATH} is for {machine}, not for {arch}")
    if dynamic:
        raise InvalidArchive(package, f"its /{PATH} needs shared libraries; a static one is expected")
