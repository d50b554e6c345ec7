"""What a kernel module says of itself: the section .modinfo of its ELF file, a run of NUL-ended `key=value`.

A module's name is its file's without suffix, `-` written `_`; both spellings mean the same everywhere.

Of the file three things are read, all little-endian and 64 bits wide, and none is believed further than the file goes:
the ELF header (offset, number and size of the section headers, and which of them is the names'), the section headers
(name, type, flags, offset, size), and the names.

Sources: System V ABI, "ELF Header" and "Sections"; Linux include/linux/module.h (MODULE_INFO); modprobe.d(5) "softdep".
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from systemfiles.foundation.archive import BadStream, Fault
from systemfiles.foundation.errors import InvalidArchive
from systemfiles.foundation.unpack import Compression, Limits, Packed, unpacked

MODULE_MAX = 128 << 20
"""Bytes a module may have, decompressed."""

_COMPRESSIONS = (Compression.GZIP, Compression.XZ, Compression.ZSTD)
_SUFFIX = re.compile(r"\.ko(?:\.(?:gz|xz|zst))?$")
_WORD = re.compile(r"[!-~]+")
_PATTERN = re.compile(r"[!-~](?:[ -~]*[!-~])?")
_HYPHEN = re.compile(r"\[[^]]*(?:\]|\Z)|-")  # a range in brackets is no hyphen; an open bracket has no end

_ELF = b"\x7fELF\x02\x01"  # 64 bits, little-endian, as on both architectures
_EHDR = struct.Struct("<40xQ10xHHH")  # e_shoff; e_shentsize, e_shnum, e_shstrndx
_SHDR = struct.Struct("<IIQ8xQQ24x")  # sh_name, sh_type, sh_flags; sh_offset, sh_size
_SECTIONS_MAX = 0xFF00  # SHN_LORESERVE; more would need one more indirection, and no module has a tenth
_PROGBITS = 1
_COMPRESSED = 0x800  # SHF_COMPRESSED


@dataclass(frozen=True, slots=True)
class Modinfo:
    """What a module says of itself. `release` is the kernel it was built for, "" when it does not say."""

    name: str
    depends: tuple[str, ...] = ()
    softdeps_pre: tuple[str, ...] = ()
    softdeps_post: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    release: str = ""


def module_name(path: str) -> str:
    """The name of the module in the file `path`."""
    return normal_name(_SUFFIX.sub("", PurePosixPath(path).name))


def read_modinfo(data: bytes | Path, *, name: str | None = None) -> Modinfo:
    """What the module in `data`, plain or compressed as `unpack_module` takes it, says of itself.

    `name` is its path for messages, and names a module that does not name itself. Raises InvalidArchive, ToolMissing.
    """
    subject = name or (str(data) if isinstance(data, Path) else "kernel module")
    raw = unpack_module(data.read_bytes() if isinstance(data, Path) else data, name=subject)
    facts: dict[str, list[str]] = {}
    for item in modinfo_section(raw, subject).split(b"\0"):
        key, _, value = item.decode("utf-8", "surrogateescape").partition("=")
        facts.setdefault(key, []).append(value)
    softdeps = [parse_softdep(value.split()) for value in facts.get("softdep", ())]
    info = Modinfo(
        name=normal_name(facts.get("name", [module_name(subject)])[0]),
        depends=tuple(need for value in facts.get("depends", ()) for need in value.split(",") if need),
        softdeps_pre=tuple(word for pre, _ in softdeps for word in pre),
        softdeps_post=tuple(word for _, post in softdeps for word in post),
        aliases=tuple(facts.get("alias", ())),
        release=facts.get("vermagic", [""])[0].partition(" ")[0],
    )
    words = (info.name, *info.depends, *info.softdeps_pre, *info.softdeps_post)
    wrong = [word for word in words if not _WORD.fullmatch(word)]
    wrong += [alias for alias in info.aliases if not _PATTERN.fullmatch(alias)]
    if wrong:
        _refuse(subject, f"its .modinfo holds {wrong[0][:200]!r} as a name")
    return info


def modinfo_section(raw: bytes, subject: str) -> bytes:
    if len(raw) < _EHDR.size or not raw.startswith(_ELF):
        _refuse(subject, "it is no 64-bit, little-endian ELF file")
    start, size, count, names_index = _EHDR.unpack_from(raw)
    if size != _SHDR.size or not names_index < count < _SECTIONS_MAX:
        _refuse(subject, f"its header tells of {count} sections, the names of which are in number {names_index}")
    headers = list(_SHDR.iter_unpack(_part(raw, start, count * size, "its section headers", subject)))
    _, _, _, offset, length = headers[names_index]
    names = _part(raw, offset, length, "the names of its sections", subject)
    for name, kind, flags, offset, length in headers:
        if not names.startswith(b".modinfo\0", name):
            continue
        if kind != _PROGBITS or flags & _COMPRESSED:
            _refuse(subject, "its section .modinfo is not plain data")
        return _part(raw, offset, length, "its section .modinfo", subject)
    _refuse(subject, "it has no section .modinfo, so it is no kernel module")


def _part(raw: bytes, offset: int, size: int, what: str, subject: str) -> bytes:
    if offset + size > len(raw):
        _refuse(subject, f"{what} should be {size} bytes at {offset}, which is not inside the file")
    return raw[offset : offset + size]


def unpack_module(data: bytes, *, name: str = "kernel module") -> bytes:
    """The plain .ko of a module that may be compressed with gzip, xz or zstd, told by its first bytes.

    Raises InvalidArchive for damaged data, for other data behind it, and for more than MODULE_MAX bytes; ToolMissing
    for zstd without libarchive.
    """
    compression = Compression.of(data)
    if compression not in _COMPRESSIONS:
        return data
    try:
        return b"".join(unpacked(Packed(io.BytesIO(data), length=len(data)), compression, Limits(MODULE_MAX)))
    except BadStream as error:
        larger = f"it is larger than {MODULE_MAX} bytes"
        damaged = f"its compressed data is damaged ({error})"
        raise InvalidArchive(name, larger if error.fault is Fault.SIZE else damaged) from error


def parse_softdep(words: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What follows `pre:` and what follows `post:`. Words before either mean nothing, as for modprobe."""
    lists: dict[str, list[str]] = {"": [], "pre:": [], "post:": []}
    side = ""
    for word in words:
        if word in ("pre:", "post:"):
            side = word
        else:
            lists[side].append(word)
    return tuple(lists["pre:"]), tuple(lists["post:"])


def normal_name(name: str) -> str:
    """`name` as the kernel writes it."""
    return _HYPHEN.sub(lambda found: "_" if found[0] == "-" else found[0], name) if "-" in name else name


def _refuse(subject: str, problem: str) -> NoReturn:
    raise InvalidArchive(subject, problem)
