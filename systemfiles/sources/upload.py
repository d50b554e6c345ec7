"""What is sent to a registry, at a pace: a receiver that takes a byte now and then would hold us for ever."""

from __future__ import annotations

import io
import time
from typing import BinaryIO

from systemfiles.sources.transport import Bounds, Interrupted


class Upload(io.RawIOBase):
    """The `size` bytes of `content`; reading them raises Interrupted when they are taken too slowly or too late.

    `deadline` is on the monotonic clock.
    """

    def __init__(self, content: BinaryIO, size: int, bounds: Bounds, deadline: float) -> None:
        self._content = content
        self._size = size
        self._bounds = bounds
        self._deadline = deadline
        self._since = time.monotonic()
        self._sent = 0

    def __len__(self) -> int:
        return self._size

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._content.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._content.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        """More of it, once what was read before is on its way."""
        now = time.monotonic()
        if now > self._deadline:
            msg = f"it took longer than {self._bounds.total:g} s in all"
            raise Interrupted(msg)
        if (passed := now - self._since) > self._bounds.read:
            if self._sent < self._bounds.slowest * passed:
                msg = f"it took only {self._sent} bytes in {passed:.0f} s"
                raise Interrupted(msg)
            self._since, self._sent = now, 0
        data = self._content.read(size)
        self._sent += len(data)
        return data
