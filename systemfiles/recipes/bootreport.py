"""What a boot check found, and how it is told: a line for each step of the guest contract, then how the guest ended.

::

    x86_64: kernel debian-cloud-6.1.192-2, initrd v1.0.0-3fa9c1d20b7e, QEMU q35 (tcg)
       1  kernel file systems, modules  ok
       5  network                       FAILED
            /etc/resolv.conf
              expected  nameserver 10.0.2.3
              seen      nothing
       6  volumes                       not seen
    init -> entrypoint 0.41 s (guest time); 3 boots in 7.9 s
    the guest contract does not hold
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from systemfiles.recipes.console import shown

ENDING = 10
"""The number of what comes after the steps."""

STEPS: Mapping[int, str] = {
    1: "kernel file systems, modules",
    2: "disks",
    3: "overlay root",
    4: "config",
    5: "network",
    6: "volumes",
    7: "links of /dev",
    8: "entrypoint",
    9: "INIT_MODE=systemd",
    ENDING: "ending",
}
"""As the head of the init script numbers them."""

FACT = "systemfiles-probe "
"""What the probe's lines begin with."""

_LAST_LINES = 15
_LONGEST = 200


class State(enum.Enum):
    """How a step is. It is not seen when something failed before it, and not looked at where this guest cannot tell."""

    OK = "ok"
    FAILED = "FAILED"
    UNSEEN = "not seen"
    LEFT_OUT = "not looked at"


@dataclass(frozen=True, slots=True)
class Problem:
    """That something is not as expected."""

    what: str
    expected: str
    seen: str

    def lines(self) -> Iterator[str]:
        yield f"     {self.what}"
        yield f"       expected  {brief(self.expected)}"
        yield f"       seen      {brief(self.seen) or 'nothing'}"


class Findings:
    """What is known of each step so far."""

    def __init__(self) -> None:
        self.guest = ""
        """Whose facts are looked at: said of what is wrong, unless it is empty."""
        self.problems: dict[int, list[Problem]] = {}
        self._seen: set[int] = set()
        self._beyond: set[int] = set()

    def expect(self, step: int, what: str, expected: object, seen: object) -> None:
        """Compares the two; whatever comes of that, the step was reached."""
        self._seen.add(step)
        if expected != seen:
            what = f"{what} ({self.guest})" if self.guest else what
            told = ("" if value is None else str(value) for value in (expected, seen))
            self.problems.setdefault(step, []).append(Problem(what, *told))

    def leave_out(self, step: int) -> None:
        self._beyond.add(step)

    def state(self, step: int) -> State:
        if step in self.problems:
            return State.FAILED
        if step in self._seen:
            return State.OK
        return State.LEFT_OUT if step in self._beyond else State.UNSEEN


@dataclass(frozen=True, slots=True)
class Report:
    """How a pair does as a guest. `init_seconds` is from init's start to the entrypoint's, by the guest's clock.

    `notes` tell of an image's own entrypoint. `console` is all that the guests wrote; `log` is where it was kept.
    """

    subject: Mapping[str, str]
    findings: Findings
    boots: int
    seconds: float
    init_seconds: float | None
    console: str = field(repr=False)
    notes: tuple[str, ...] = ()
    log: Path | None = None

    @property
    def holds(self) -> bool:
        """Whether every step that was looked at is as it should be."""
        return all(self.findings.state(step) in (State.OK, State.LEFT_OUT) for step in STEPS)

    def summary(self) -> str:
        """In one line."""
        if self.holds:
            return "the guest contract holds"
        failed = [STEPS[step] for step in STEPS if self.findings.state(step) is State.FAILED]
        return f"the guest contract does not hold ({', '.join(failed) or 'not all of it was seen'})"

    def lines(self) -> Iterator[str]:
        """All of it but the console."""
        subject = self.subject
        guest = (
            f"kernel {subject['kernel']}, initrd {subject['initrd']}, QEMU {subject['machine']} ({subject['accel']})"
        )
        yield f"{subject['arch']}: {guest}"
        width = max(map(len, STEPS.values()))
        for step, name in STEPS.items():
            number = "" if step == ENDING else str(step)
            yield f"  {number:>2}  {name:<{width}}  {self.findings.state(step).value}"
            for problem in self.findings.problems.get(step, ()):
                yield from problem.lines()
        yield from self.notes
        boots = f"{self.boots} boot{'s' * (self.boots != 1)} in {self.seconds:.1f} s"
        if self.init_seconds is not None:
            boots = f"init -> entrypoint {self.init_seconds:.2f} s (guest time); {boots}"
        yield boots
        yield self.summary()

    def ending(self) -> Iterator[str]:
        """What helps to understand a failure: the last that was written on the serial line, and where the rest is."""
        lines = shown(self.console).splitlines()
        last = [line for line in lines if line.strip() and not line.startswith(FACT)][-_LAST_LINES:]
        if last:
            yield "the last lines of the serial log:"
            yield from (f"  | {line[:_LONGEST]}" for line in last)
        if self.log:
            yield f"serial log: {self.log}"

    def text(self) -> str:
        """Everything there is to tell."""
        return "\n".join([*self.lines(), *(() if self.holds else self.ending())])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "holds": self.holds,
            **self.subject,
            "steps": [
                {
                    "step": None if step == ENDING else step,
                    "name": name,
                    "state": self.findings.state(step).value,
                    "problems": [
                        {"what": problem.what, "expected": problem.expected, "seen": problem.seen}
                        for problem in self.findings.problems.get(step, ())
                    ],
                }
                for step, name in STEPS.items()
            ],
            "notes": [*self.notes],
            "init_seconds": self.init_seconds,
            "boots": self.boots,
            "seconds": round(self.seconds, 3),
            "log": str(self.log) if self.log else None,
        }


def brief(text: str) -> str:
    """`text` in one line of a bearable length, harmless for a terminal."""
    line = " ".join(shown(text).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
