"""Ctrl-C (SIGINT), SIGTERM or SIGHUP while several threads work: all stop at their next step and clean up.

Python raises KeyboardInterrupt in the main thread alone. When that only waits for others, they would be cut off
wherever they are as soon as it ends. Here they learn of it where they report progress, and the main thread goes on
waiting for them. A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from systemfiles.foundation.progress import Progress

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """Whether this process was interrupted, and who has to know."""

    def __init__(self) -> None:
        self.status: int | None = None
        """What the process should end with: 128 and the signal, as of a shell."""
        self._main_works = False

    @property
    def happened(self) -> bool:
        return self.status is not None

    def expect(self) -> None:
        """Takes these signals over from here on, but for those that are ignored. Only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._handle)

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Work that is stopped by KeyboardInterrupt: before it begins, at its next progress, or, in the main thread,
        wherever it is.
        """
        self.check()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._main_works = True
        try:
            yield
        finally:
            self._main_works = False

    def watched(self, progress: Progress) -> Progress:
        """`progress`, which also stops whoever reports it."""

        def report(subject: str, done: int, total: int | None) -> None:
            self.check()
            progress(subject, done, total)

        return report

    def check(self) -> None:
        """Raises KeyboardInterrupt in whatever thread asks after it happened."""
        if self.happened:
            raise KeyboardInterrupt

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.happened:
            os._exit(128 + signum)
        self.status = 128 + signum
        if self._main_works:
            raise KeyboardInterrupt
        # not through sys.stderr, which the main thread may be writing to just now
        os.write(2, b"\ninterrupted: what is in flight is being given up (Ctrl-C again: at once)\n")
