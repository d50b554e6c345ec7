"""How often and when something is tried again."""

from __future__ import annotations

import re
import threading
import time
from email.utils import formatdate

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from systemfiles.sources.transport import Answered, Attempts, Bounds, Interrupted, Unreachable

QUICK = Bounds(connect=1, read=0.3, total=2, attempts=3, pause=0.01)


def answered(code: int, **headers: str) -> Answered:
    response = requests.Response()
    response.status_code, response.url = code, "http://h/"
    response.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
    return Answered(response)


class Clock(threading.Event):
    """Nobody sets it, and nobody waits: what would be waited is on record."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.slept.append(timeout)
        return self.is_set()

    def attempts(self, bounds: Bounds) -> Attempts:
        return Attempts(bounds, "r.example", stop=self)


def about(*seconds: float) -> object:
    """These pauses, each up to a quarter longer, so that not all hosts of a fleet come back at one moment."""
    return pytest.approx([pause * 1.125 for pause in seconds], rel=0.125 / 1.125)


def test_pauses_double_until_the_attempts_are_used_up() -> None:
    clock = Clock()
    attempts = clock.attempts(Bounds(attempts=4, pause=0.5))
    assert [attempts.another(Interrupted()) for _ in range(4)] == [True, True, True, False]
    assert clock.slept == about(0.5, 1, 2)


def test_who_is_asked_again_is_told(caplog: pytest.LogCaptureFixture) -> None:
    attempts = Clock().attempts(Bounds(attempts=2, pause=2))
    for _ in range(2):
        attempts.another(Interrupted("it stayed silent for too long"))
    (said,) = caplog.messages
    assert re.fullmatch(r"r\.example: it stayed silent for too long; trying again in 2\.[0-5] s", said)


def test_no_two_hosts_pause_for_the_same_time() -> None:
    clock = Clock()
    for _ in range(20):
        clock.attempts(Bounds(attempts=2)).another(Interrupted())
    assert len(set(clock.slept)) > 10


def test_once_it_is_stopped_nothing_is_tried_again() -> None:
    clock = Clock()
    clock.set()
    assert not clock.attempts(Bounds(attempts=9)).another(answered(503))


def test_who_stops_it_need_not_wait_until_a_pause_is_over() -> None:
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    begun = time.monotonic()
    assert not Attempts(Bounds(longest_pause=100), "r.example", stop=stop).another(answered(503, Retry_After="30"))
    assert time.monotonic() - begun < 10


def test_what_comes_of_an_attempt_may_earn_as_many_again_and_no_more_time() -> None:
    clock = Clock()
    attempts = clock.attempts(Bounds(attempts=3, pause=0.5))
    assert [attempts.another(Interrupted()) for _ in range(2)] == [True, True]
    deadline = attempts.deadline
    attempts.renew()
    assert [attempts.another(Interrupted()) for _ in range(3)] == [True, True, False]
    assert clock.slept == about(0.5, 1, 0.5, 1)
    assert attempts.deadline == deadline


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(code: int) -> None:
    assert Clock().attempts(QUICK).another(answered(code))


@pytest.mark.parametrize("error", [Unreachable(), *map(answered, (302, 400, 401, 403, 404, 410, 416, 501)), OSError()])
def test_what_will_not_pass_is_not_tried_again(error: Exception) -> None:
    clock = Clock()
    assert not clock.attempts(QUICK).another(error)
    assert clock.slept == []


def test_the_origin_says_how_long_to_wait() -> None:
    clock = Clock()
    assert clock.attempts(Bounds(attempts=2)).another(answered(503, Retry_After="7"))
    assert clock.slept == [7]


def test_an_origin_that_says_at_once_is_not_asked_at_once() -> None:
    clock = Clock()
    attempts = clock.attempts(Bounds(attempts=3, pause=0.5))
    assert [attempts.another(answered(503, Retry_After="0")) for _ in range(2)] == [True, True]
    assert clock.slept == about(0.5, 1)


@pytest.mark.parametrize("bounds", [Bounds(total=5), Bounds(longest_pause=5)], ids=["in all", "at once"])
def test_nobody_waits_for_longer_than_bounds_allow(bounds: Bounds) -> None:
    clock = Clock()
    assert not clock.attempts(bounds).another(answered(429, Retry_After="6"))
    assert clock.slept == []


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("120", 120, 120),
        (" 5 ", 5, 5),
        ("9" * 5000, 1e300, float("inf")),
        (formatdate(time.time() + 1_000_000, usegmt=True), 900_000, 1_000_000),
        (formatdate(time.time() - 1000, usegmt=True), 0, 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 1e9, 1e12),
    ],
    ids=["seconds", "spaces", "far too many", "a date to come", "a date gone by", "the last date"],
)
def test_a_number_or_a_date_says_when_to_come_back(value: str, least: float, most: float) -> None:
    seconds = answered(429, Retry_After=value).retry_after
    assert seconds is not None
    assert least <= seconds <= most


@pytest.mark.parametrize(
    "value",
    ["0\x1f", "", "soon", "-1", "1.5", "1e9", "0x10", "\xb2", "nan", "inf", "Fri, 99 Foo 0000 99:99:99 +9999", "1, 2"],
)
def test_anything_else_says_nothing(value: str) -> None:
    assert answered(429, Retry_After=value).retry_after is None


@given(st.text(max_size=60))
def test_no_text_in_retry_after_is_an_error(value: str) -> None:
    seconds = answered(429, Retry_After=value).retry_after
    assert seconds is None or seconds >= 0
