"""Hostile bytes made from sound ones: what a parser meets when a disk, a mirror or an attacker had its say.

Bytes at random are refused at the first magic number. So every input here begins as a valid sample, and is then changed
a little: most of it stays true, and a parser is led deep inside before it meets what is wrong. `mutated` does that to
any bytes, `values.json_texts` to JSON values, and `sealed` puts the checksums of a changed tar right again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hypothesis import strategies as st

_MOST_EDITS = 5
_LARGEST = 1 << 20  # no run of edits makes more than that
_NEAR = 192  # bytes: headers stand at the start of a file, trailers and tables at its end
_RUN = re.compile(rb"[0-9A-Fa-f]{2,}")  # numbers as text: cpio's, tar's, ar's
_SPLIT = re.compile(rb"[\s\0\"',:;={}\[\]]+")


@dataclass(frozen=True, slots=True)
class Format:
    """What edits know: sound `samples`, `words` that mean something, the `block` that sizes are multiples of."""

    samples: tuple[bytes, ...]
    words: tuple[bytes, ...]
    block: int = 1


def mutated(samples: Sequence[bytes], *, words: Sequence[bytes] = (), block: int = 1) -> st.SearchStrategy[bytes]:
    """One of `samples` after some edits; rarely none, so that the parser's way to success is walked, too.

    `words` are put in here and there. Whole blocks of `block` bytes come and go, most of the time.
    """
    return _mutated(Format(tuple(samples), (*words, *_WORDS), block))


_WORDS = (b"", b"\0", b"\xff", b"\n", b" ", b"../", b"/", b"\xed\xa0\x80", b"\xc3", b"-1", b"1e9", b"0x10")


@st.composite
def _mutated(draw: st.DrawFn, form: Format) -> bytes:
    data = bytearray(draw(st.sampled_from(form.samples)))
    for _ in range(draw(st.integers(0, _MOST_EDITS))):
        draw(st.sampled_from(_EDITS))(draw, data, form)
        del data[_LARGEST:]
    return bytes(data)


def _place(draw: st.DrawFn, data: bytearray, form: Format) -> int:
    """Anywhere, but rather near the start or the end, or at the start of a block."""
    size = len(data)
    match draw(st.integers(0, 4)):
        case 0:
            return draw(st.integers(0, min(_NEAR, size)))
        case 1:
            return size - draw(st.integers(0, min(_NEAR, size)))
        case 2:
            return min(size, draw(st.integers(0, size // form.block)) * form.block)
        case _:
            return draw(st.integers(0, size))


def _span(draw: st.DrawFn, data: bytearray, form: Format) -> slice:
    """A piece of the data: most of the time, whole blocks."""
    start, length = _place(draw, data, form), draw(st.sampled_from((1, 2, 4, 16, 60, 64, 512, 1024, 4096)))
    if draw(st.integers(0, 7)):
        start -= start % form.block
        length += -length % form.block
    return slice(start, min(len(data), start + length))


def _flip(draw: st.DrawFn, data: bytearray, form: Format) -> None:
    if data:
        data[_place(draw, data, form) % len(data)] ^= 1 << draw(st.integers(0, 7))


def _set(draw: st.DrawFn, data: bytearray, form: Format) -> None:
    if data:
        data[_place(draw, data, form) % len(data)] = draw(st.integers(0, 255))


def _integer(draw: st.DrawFn, data: bytearray, form: Format) -> None:
    """Overwrites a binary number by one at the edge of something."""
    width = draw(st.sampled_from((1, 2, 4, 8)))
    start = _place(draw, data, form)
    if draw(st.integers(0, 3)):
        start -= start % width  # headers are aligned
    order: Literal["big", "little"] = "big" if draw(st.integers(0, 4)) == 0 else "little"
    here = int.from_bytes(data[start : start + width], order)
    top = 1 << 8 * width
    edges = (0, 1, 2, 7, top - 1, top - 2, top // 2, top // 2 - 1, len(data), len(data) + 1, len(data) - 1)
    values = (*edges, here + 1, here - 1, here * 2, here // 2, here ^ 1, here + len(data), top - here)
    data[start : start + width] = (draw(st.sampled_from(values)) % top).to_bytes(width, order)


def _digits(draw: st.DrawFn, data: bytearray, form: Format) -> None:
    """Overwrites a number in digits by another of the same length."""
    runs = [match.span() for match in _RUN.finditer(data)]
    if not runs:
        return
    start, end = runs[draw(st.integers(0, len(runs) - 1))]
    if end - start > 12 and draw(st.integers(0, 7)):  # fields without anything between them: cpio's, of 8 digits
        start += 6 + 8 * draw(st.integers(0, (end - start - 14) // 8)) if end - start >= 14 else 0
        end = start + 8
    width = end - start
    if draw(st.integers(0, 1)):
        data[start:end] = bytes([draw(st.sampled_from(b"01789aAfF"))]) * width
        return
    near = int(data[start:end], 16) + draw(st.sampled_from((-2, -1, 1, 2, 16)))
    data[start:end] = (b"%0*x" % (width, max(near, 0)))[-width:]


def _truncate(draw: st.DrawFn, data: bytearray, form: Format) -> None:
    del data[_span(draw, data, form).start :]


def _delete(draw: st.DrawFn, data: bytearray, form: Format) -> None:
    del data[_span(draw, data, form)]


def _repeat(draw: st.DrawFn, data: bytearray, form: Format) -> None:
    span = _span(draw, data, form)
    data[span.start : span.start] = data[span] * draw(st.sampled_from((1, 1, 2, 40)))


def _fill(draw: st.DrawFn, data: bytearray, form: Format) -> None:
    span = _span(draw, data, form)
    data[span] = bytes([draw(st.sampled_from((0, 0xFF, 0x20, 0x41)))]) * len(data[span])


def _move(draw: st.DrawFn, data: bytearray, form: Format) -> None:
    piece = bytes(data[_span(draw, data, form)])
    place = _place(draw, data, form)
    data[place : place + len(piece)] = piece


def _splice(draw: st.DrawFn, data: bytearray, form: Format) -> None:
    """Goes on as another sample does."""
    other = bytearray(draw(st.sampled_from(form.samples)))
    start, end = _span(draw, data, form).start, _span(draw, other, form).start
    data[start:] = other[end:]


def _insert(draw: st.DrawFn, data: bytearray, form: Format) -> None:
    word = draw(st.sampled_from(form.words))
    place = _place(draw, data, form)
    # over what is there, where a shift would put all that follows out of place
    over = form.block > 1 and draw(st.integers(0, 7))
    data[place : place + len(word) if over else place] = word


def _exchange(draw: st.DrawFn, data: bytearray, form: Format) -> None:
    """Puts a word of the format where another one stands."""
    there = sorted({word for word in _SPLIT.split(bytes(data[:8192])) if word})
    if there:
        old = draw(st.sampled_from(there))
        new = draw(st.sampled_from((*there, *form.words)))
        if form.block > 1:
            new = new.ljust(len(old), b"\0")[: len(old)]
        data[:] = data.replace(old, new, draw(st.sampled_from((1, 1, 100))))


def _line(draw: st.DrawFn, data: bytearray, form: Format) -> None:
    """Drops, repeats or moves a line."""
    if form.block > 1:
        return
    lines = bytes(data).split(b"\n")
    line = lines.pop(draw(st.integers(0, len(lines) - 1)))
    for _copy in range(draw(st.integers(0, 2))):
        lines.insert(draw(st.integers(0, len(lines))), line)
    data[:] = b"\n".join(lines)


def edited(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` after one edit."""
    changed = bytearray(data)
    draw(st.sampled_from(_EDITS))(draw, changed, Format((data,), _WORDS))
    return bytes(changed)


_EDITS: tuple[Callable[[st.DrawFn, bytearray, Format], None], ...] = (
    _flip,
    _set,
    _integer,
    _integer,
    _integer,
    _digits,
    _digits,
    _truncate,
    _delete,
    _repeat,
    _fill,
    _move,
    _splice,
    _insert,
    _exchange,
    _line,
)


# --- tar: a change inside a header is met by nobody unless its checksum is right ---


def sealed(tar: bytes) -> bytes:
    """`tar` with the right checksum in every block of 512 bytes that has the mark of a header."""
    data = bytearray(tar)
    for start in range(0, len(data) - 511, 512):
        if data[start + 257 : start + 262] == b"ustar":
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)
