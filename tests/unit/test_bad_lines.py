"""Downloads over lines that are cut, and from servers that end and start again."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import SourceUnavailable
from systemfiles.foundation.files import NewFile
from systemfiles.sources.http import fetch
from systemfiles.sources.transport import Bounds
from tests.contract import origins
from tests.contract.answers import Answer, body, content, cut, in_turn, reset

DATA = os.urandom(3 << 20)
DIGEST = Digest.of(DATA)
IMPATIENT = Bounds(connect=2, read=2, total=10, attempts=3, pause=0.01)
SECRET = "vm-7: password=hunter2"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "tmp"


STEP = 300_000


@pytest.fixture
def cutting() -> Iterator[origins.Origin]:
    """An origin that resumes, and hangs up after each 300 kB."""
    with contextlib.closing(origins.Origin()) as origin:
        origin.answers["/x"] = cut(DATA, STEP)
        yield origin


def over_a_bad_line(scratch: Path, origin: origins.Origin, bounds: Bounds) -> bytes:
    with NewFile(scratch) as out:
        fetch(origin.url("/x"), out, subject="it", digest=DIGEST, size=len(DATA), bounds=bounds)
        return out.path.read_bytes()


def test_cuts_do_not_add_up_as_long_as_enough_comes_between_them(cutting: origins.Origin, scratch: Path) -> None:
    bounds = replace(IMPATIENT, attempts=2, enough=STEP)
    assert over_a_bad_line(scratch, cutting, bounds) == DATA
    ranges = [request.headers.get("range") for request in cutting.requests]
    assert ranges == [None, *(f"bytes={start}-" for start in range(STEP, len(DATA), STEP))]


def test_what_several_attempts_bring_together_may_be_enough(cutting: origins.Origin, scratch: Path) -> None:
    assert over_a_bad_line(scratch, cutting, replace(IMPATIENT, attempts=3, enough=2 * STEP)) == DATA


def test_cuts_that_too_little_comes_between_add_up(cutting: origins.Origin, scratch: Path) -> None:
    with pytest.raises(SourceUnavailable):
        over_a_bad_line(scratch, cutting, replace(IMPATIENT, attempts=3, enough=3 * STEP + 1))
    assert len(cutting.requests) == 3


@pytest.mark.parametrize(
    "each",
    [
        body(DATA[:STEP], length=len(DATA)),
        in_turn(*(cut(os.urandom(len(DATA)), STEP) for _ in range(6))),
    ],
    ids=["starts over each time", "has another file each time"],
)
def test_bytes_that_come_again_are_no_progress(cutting: origins.Origin, scratch: Path, each: Answer) -> None:
    cutting.answers["/x"] = each
    with pytest.raises(SourceUnavailable):
        over_a_bad_line(scratch, cutting, replace(IMPATIENT, attempts=3, enough=STEP))
    assert len(cutting.requests) == 3


def test_no_progress_moves_the_deadline(cutting: origins.Origin, scratch: Path) -> None:
    cutting.answers["/x"] = cut(DATA, 1000)
    with pytest.raises(SourceUnavailable):
        over_a_bad_line(scratch, cutting, replace(IMPATIENT, total=0.5, pause=0.05, enough=1))
    assert 3 < len(cutting.requests) <= 10


# a server that starts again


def test_a_closed_port_does_not_end_what_has_begun(scratch: Path) -> None:
    """The server that sent some of it ends, and is back a while later under the same address."""
    running = [origins.Origin()]
    running[0].answers["/x"] = cut(DATA, STEP)
    host, url = running[0].host, running[0].url("/x")

    def start_again() -> None:
        origin = origins.Origin(port=int(host.rpartition(":")[2]))
        origin.answers["/x"] = content(DATA)
        running.append(origin)

    def progress(subject: str, done: int, total: int | None) -> None:
        if done == STEP and len(running) == 1:
            running[0].close()
            timer.start()

    timer = threading.Timer(0.3, start_again)
    bounds = replace(IMPATIENT, pause=0.1, attempts=8)
    with NewFile(scratch) as out:
        fetch(url, out, subject="it", digest=DIGEST, size=len(DATA), bounds=bounds, progress=progress)
        assert out.path.read_bytes() == DATA
    assert [request.headers["range"] for request in running[1].requests] == [f"bytes={STEP}-"]
    running[1].close()


def test_a_port_that_stays_closed_ends_it_in_time(scratch: Path) -> None:
    origin = origins.Origin()
    origin.answers["/x"] = cut(DATA, STEP)
    url = origin.url("/x")

    def progress(subject: str, done: int, total: int | None) -> None:
        if done == STEP:
            origin.close()

    with NewFile(scratch) as out, pytest.raises(SourceUnavailable, match="Connection refused"):
        fetch(url, out, subject="it", digest=DIGEST, size=len(DATA), bounds=IMPATIENT, progress=progress)


def test_a_hand_shake_that_is_cut_is_tried_again(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, context = origins.tls(tmp_path / "tls")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with contextlib.closing(origins.Origin(tls=context)) as origin:
        origin.answers["/x"] = content(DATA)
        origin.hang_up = 2
        assert over_a_bad_line(scratch, origin, IMPATIENT) == DATA
        assert (origin.hang_up, len(origin.requests)) == (0, 1)
        origin.hang_up = 9
        with pytest.raises(SourceUnavailable, match="EOF"):
            over_a_bad_line(scratch, origin, IMPATIENT)
        assert origin.hang_up == 9 - IMPATIENT.attempts


# in the middle of the caller's own trouble


def test_what_the_caller_is_busy_with_is_not_told(cutting: origins.Origin, scratch: Path) -> None:
    cutting.close()
    try:
        raise KeyError(SECRET)
    except KeyError:
        with pytest.raises(SourceUnavailable, match="Connection refused") as caught:
            over_a_bad_line(scratch, cutting, IMPATIENT)
    assert SECRET not in str(caught.value)


def test_a_reset_is_tried_again_whatever_the_caller_is_busy_with(cutting: origins.Origin, scratch: Path) -> None:
    cutting.answers["/x"] = in_turn(reset, content(DATA))
    try:
        raise KeyError(SECRET)
    except KeyError:
        assert over_a_bad_line(scratch, cutting, IMPATIENT) == DATA
    assert len(cutting.requests) == 2
