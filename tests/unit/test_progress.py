"""Progress: bars on a terminal, silence everywhere else, and never a failure of their own."""

from __future__ import annotations

import fcntl
import io
import os
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator

import pytest

from systemfiles.foundation.progress import ProgressBars, silent


class Terminal:
    """A pseudo-terminal in place of stderr."""

    def __init__(self) -> None:
        self._reader, self._writer = os.openpty()
        self.resize(80)
        self.stream = os.fdopen(self._writer, "w", buffering=1)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._writer, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))

    def shown(self) -> str:
        self.stream.flush()
        os.set_blocking(self._reader, False)
        try:
            return os.read(self._reader, 1 << 16).decode()
        except BlockingIOError:
            return ""

    def close(self) -> None:
        self.stream.close()
        os.close(self._reader)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen.stream)
    yield screen
    screen.close()


@pytest.fixture
def bars(terminal: Terminal) -> Iterator[ProgressBars]:
    shown = ProgressBars()
    yield shown
    shown.close()


def test_without_a_terminal_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    bars = ProgressBars()
    for done in range(0, 101, 10):
        bars("kernel", done, 100)
        silent("kernel", done, 100)
    bars.close()
    assert stream.getvalue() == ""


def test_without_a_terminal_tqdm_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setitem(sys.modules, "tqdm", None)
    ProgressBars()("kernel", 1, 2)


def test_short_work_shows_no_bar(bars: ProgressBars, terminal: Terminal) -> None:
    bars("kernel", 1, 100)
    bars("kernel", 100, 100)
    assert "kernel" not in terminal.shown()


@pytest.mark.parametrize("columns", [100, 0], ids=["a terminal", "a serial console, which knows no width"])
def test_long_work_shows_a_bar(bars: ProgressBars, terminal: Terminal, columns: int) -> None:
    terminal.resize(columns)
    bars("kernel", 1, 100)
    time.sleep(1.1)
    bars("kernel", 50, 100)
    assert "kernel:  50%" in terminal.shown()


def test_work_of_unknown_size_is_shown_too(bars: ProgressBars) -> None:
    for done in range(1, 5):
        bars("kernel", done << 20, None)


def test_work_of_size_nothing_is_done_at_once(bars: ProgressBars) -> None:
    bars("kernel", 0, 0)
    bars("kernel", 0, 0)


def test_work_that_starts_again_goes_back(bars: ProgressBars) -> None:
    for done in (10, 90, 0, 10, 100):
        bars("kernel", done, 100)


def test_work_that_was_done_may_be_done_again(bars: ProgressBars) -> None:
    for _ in range(2):
        bars("kernel", 50, 100)
        bars("kernel", 100, 100)


def test_closing_removes_what_is_left_and_may_be_repeated(bars: ProgressBars) -> None:
    bars("kernel", 1, 100)
    bars("initrd", 1, 100)
    bars.close()
    bars.close()


def test_many_threads_may_report_at_once(bars: ProgressBars) -> None:
    failures: list[BaseException] = []

    def report(subject: str) -> None:
        try:
            for done in range(0, 101):
                bars(subject, done, 100)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=report, args=(f"kernel {number % 4}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
