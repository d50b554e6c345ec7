"""Content digests (OCI image-spec, descriptor.md "Digests"). Only sha256 is registered here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from systemfiles.foundation.errors import InvalidDigest

if TYPE_CHECKING:
    from hashlib import _Hash

CHUNK = 1 << 20
_HEX = re.compile(r"[0-9a-f]{64}")


class Digest(str):
    """`sha256:` and 64 lower-case hex digits; nothing else can be constructed by `parse`.

    It is a string, so it serialises as one, and its `hex` is safe as a file name.
    """

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Digest:
        """The digest written as `text`. Raises InvalidDigest for anything but a full sha256 digest."""
        if not isinstance(text, str):  # as JSON of others may have it
            raise InvalidDigest(repr(text))
        algorithm, _, hexadecimal = text.partition(":")
        if algorithm != "sha256" or not _HEX.fullmatch(hexadecimal):
            raise InvalidDigest(text)
        return cls(text)

    @classmethod
    def from_hex(cls, hexadecimal: str) -> Digest:
        """The digest with these 64 hex digits. Raises InvalidDigest."""
        return cls.parse(f"sha256:{hexadecimal}")

    @classmethod
    def of(cls, data: bytes) -> Digest:
        """The digest of `data`, as stored."""
        hasher = Hasher()
        hasher.update(data)
        return hasher.digest()

    @property
    def hex(self) -> str:
        return self[7:]


class Hasher:
    """Counts and hashes bytes as they pass by."""

    def __init__(self) -> None:
        import hashlib  # 2 ms, and resolving an intact artifact hashes nothing

        self._hash: _Hash = hashlib.sha256()
        self.size = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._hash.update(data)
        self.size += len(data)

    def digest(self) -> Digest:
        return Digest("sha256:" + self._hash.hexdigest())


def hash_stream(stream: BinaryIO) -> tuple[Digest, int]:
    """Digest and size in bytes of what is left in `stream`."""
    hasher = Hasher()
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    while count := stream.readinto(buffer):  # type: ignore[attr-defined]
        hasher.update(view[:count])
    return hasher.digest(), hasher.size


def hash_file(path: Path) -> tuple[Digest, int]:
    """Digest and size in bytes of the file at `path`. Raises OSError."""
    with path.open("rb", buffering=0) as stream:
        return hash_stream(stream)
