"""Progress of long work: the library reports, whoever called decides what to show."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

Progress = Callable[[str, int, int | None], None]
"""Called with (subject, bytes done so far, bytes in all or None). Raise from it to cancel the work."""


def silent(subject: str, done: int, total: int | None) -> None:
    """Shows nothing."""


class ProgressBars:
    """A `Progress` that draws one tqdm bar per subject on stderr when that is a terminal, and nothing otherwise."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm[Any]] = {}
        self._lock = threading.Lock()
        self._stream = sys.stderr
        self._visible = self._stream.isatty()

    def __call__(self, subject: str, done: int, total: int | None) -> None:
        if not self._visible:
            return
        with self._lock:
            bar = self._bars.get(subject)
            if bar is None:  # the truth of a bar is its length, which may be unknown
                bar = self._open(subject, total)
            bar.update(done - bar.n)
            if total is not None and done >= total:
                self._bars.pop(subject).close()

    def _open(self, subject: str, total: int | None) -> tqdm[Any]:
        from tqdm import tqdm

        size = os.get_terminal_size(self._stream.fileno())
        bar: tqdm[Any] = tqdm(
            desc=subject,
            total=total,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            leave=False,
            delay=1,
            # a serial console says it is 0 columns wide and 0 rows high, in which tqdm would show nothing
            ncols=(size.columns or 80) - 1,
            nrows=size.lines or 25,
            file=self._stream,
        )
        self._bars[subject] = bar
        return bar

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Lets others write to the terminal: the bars are not there meanwhile."""
        if not self._bars:
            yield
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self._stream):
            yield

    def close(self) -> None:
        """Removes the bars that are left."""
        with self._lock:
            for bar in self._bars.values():
                bar.close()
            self._bars.clear()
