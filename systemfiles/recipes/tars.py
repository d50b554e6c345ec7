"""tarfile without its belief in what it reads: for archives that came from elsewhere.

tarfile takes a damaged header for the end of the archive, believes any size an extended header has, makes up the holes
of sparse files, and lets errors of other kinds through. Give it `Header` as `tarinfo` and work inside `intact`.

Source: POSIX pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager

from systemfiles.foundation.errors import InvalidArchive

MEMBER_MAX = 128 << 20
_EXTENDED_MAX = 1 << 20  # bytes of one pax or GNU header
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *tarfile.GNU_TYPES)


@contextmanager
def intact(subject: object) -> Iterator[None]:
    """Turns whatever tarfile raises for a damaged archive into InvalidArchive."""
    try:
        yield
    except (tarfile.TarError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        # besides its own errors tarfile lets through those of the numbers, maps and chains in extended headers
        raise InvalidArchive(subject, f"it is no intact tar archive ({error})") from error


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The content of a plain file of at most MEMBER_MAX bytes. Raises InvalidArchive for any other, and as tarfile."""
    stream = tar.extractfile(member) if member.isreg() and not member.issparse() else None
    if stream is None or member.size > MEMBER_MAX:  # as much memory as it claims is taken before any of it is read
        raise InvalidArchive(tar.name, f"{member.name!r:.200} in it is no plain file of at most {MEMBER_MAX} bytes")
    return stream.read()


class Header(tarfile.TarInfo):
    """A header that is refused when it is damaged; tarfile alone would take it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:  # type: ignore[override]
        try:
            return _checked(super().fromtarfile(archive))  # what extended headers made of it
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise  # a block of zeros, the only end there is
            raise tarfile.ReadError(str(error)) from error

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:  # type: ignore[override]
        return _checked(super().frombuf(buf, encoding, errors))

    @classmethod
    def _frombuf(cls, buf: bytes, encoding: str, errors: str, *, dircheck: bool = True) -> tarfile.TarInfo:
        # what the releases of 2026 call instead, for every header; older ones do not have it
        return _checked(super()._frombuf(buf, encoding, errors, dircheck=dircheck))  # type: ignore[misc]


def _checked(header: tarfile.TarInfo) -> tarfile.TarInfo:
    if header.size < 0 or (header.type in _EXTENDED and header.size > _EXTENDED_MAX):
        msg = f"a header of {header.size} bytes"
        raise tarfile.ReadError(msg)
    if header.type == tarfile.GNUTYPE_SPARSE:
        msg = "sparse files are not supported"
        raise tarfile.ReadError(msg)
    return header
