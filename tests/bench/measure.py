"""What two things cost in relation to each other, on a machine that does other things too.

The two run alternately, so that a slow moment meets both. The ratio is the median of the ratios of neighbours; the
least and the greatest of them tell how far it can be trusted.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

Seconds = float
Timed = Callable[[], Seconds]

_WIDTHS = (42, 9, 53, 23)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Seconds of each round, ours and the alternative's."""

    ours: tuple[Seconds, ...]
    theirs: tuple[Seconds, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def difference(self) -> Seconds:
        return median(a - b for a, b in zip(self.ours, self.theirs, strict=True))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `met` is None where there is no aim."""

    what: str
    ours: str
    alternative: str
    ratio: str
    aim: str = ""
    met: bool | None = None

    def __str__(self) -> str:
        cells = (self.what, self.ours, self.alternative, self.ratio)
        verdict = {None: "", True: ": met", False: ": MISSED"}[self.met]
        columns = (f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))
        return " | ".join([*columns, self.aim + verdict]).rstrip()


HEAD = Row("what", "ours", "alternative", "ratio (least to most)", "aim")


def compared(what: str, cost: Comparison, alternative: str, *, most: float | None = None) -> Row:
    """A row whose aim, if any, is a ratio of at most `most`."""
    aim = "" if most is None else f"≤ {most:g}x"
    return row(what, cost, alternative, aim, None if most is None else cost.ratio <= most)


def row(what: str, cost: Comparison, alternative: str, aim: str, met: bool | None) -> Row:
    """A row whose aim is something else than a ratio."""
    ratio = f"{cost.ratio:.2f}x ({min(cost.ratios):.2f} to {max(cost.ratios):.2f})"
    return Row(what, duration(median(cost.ours)), f"{duration(median(cost.theirs))}  {alternative}", ratio, aim, met)


def duration(seconds: Seconds) -> str:
    """Three digits or so, with the unit that suits them."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def alternate(ours: Timed, theirs: Timed, *, rounds: int) -> Comparison:
    """Runs both in turn, after once each to warm up."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return Comparison(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


def process(words: Sequence[str | Path], environ: Mapping[str, str], *, cwd: Path | None = None) -> Timed:
    """A whole process, from its start to its end. Raises CalledProcessError when it fails."""

    def run() -> Seconds:
        start = time.perf_counter()
        subprocess.run(words, env=environ, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        return time.perf_counter() - start

    return run


def calls(function: Callable[[], object], *, count: int = 1) -> Timed:
    """One call in this process, taken from `count` in a row."""

    def run() -> Seconds:
        start = time.perf_counter()
        for _ in range(count):
            function()
        return (time.perf_counter() - start) / count

    return run
