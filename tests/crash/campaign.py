"""Which points are struck, what must hold after each, and the table of what came of it.

A point is written `scenario:action:n`, or `scenario:kill:n:m` for a run that is killed at its n-th call and the next
run, on what is left, at its m-th. After each, the directory is checked as it lies there; then the scenario runs again,
undisturbed, and must end as if nothing had been. Where there are holds, a collection runs on what is left as well.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import alembic.command  # noqa: F401  # imported once here instead of in every child
import elftools.elf.elffile  # noqa: F401
import libarchive  # noqa: F401
import requests  # noqa: F401
import sqlalchemy.dialects.sqlite  # noqa: F401
from doit.cmd_base import ModuleTaskLoader  # noqa: F401

import systemfiles
from tests.crash import checker, verdicts
from tests.crash.checker import Problem
from tests.crash.holding import COLLECT
from tests.crash.inject import ACTIONS, Injection, Outcome, run, run_freely
from tests.crash.running import Run, Scenario
from tests.crash.scenarios import PUSHED, RESOLVE, SCENARIOS, prepare
from tests.crash.verdicts import Measure
from tests.crash.world import World, copy_data_dir

KILLS = ("kill", "kill-program")
FAULTS = tuple(action for action in ACTIONS if action not in KILLS)
_SEED = 4
_USED = ("system", "tmp", "locks", "registry.sqlite")
"""Where there is none of these, a collection is told that nothing ever was there."""
_MOST_OF_A_KIND = 150


@dataclass(frozen=True, order=True)
class Point:
    """Where a scenario is struck; `again` is where the run after it is."""

    scenario: str
    action: str
    n: int
    again: int = 0

    @classmethod
    def parse(cls, text: str) -> Point:
        scenario, action, n, *again = text.split(":")
        return cls(scenario, action, int(n), int(again[0]) if again else 0)

    def __str__(self) -> str:
        return f"{self.scenario}:{self.action}:{self.n}" + (f":{self.again}" if self.again else "")


@dataclass(frozen=True)
class Result:
    """What came of one point. Not `reached` when the run had fewer calls than that; `struck` says what was hit."""

    point: Point
    reached: bool
    problems: tuple[str, ...]
    struck: str
    stderr: str

    def __str__(self) -> str:
        lines = [f"{self.point}  at {self.struck}", *(f"    {problem}" for problem in self.problems)]
        lines += [f"    | {line}" for line in self.stderr.splitlines()[-12:]]
        return "\n".join([*lines, f"    again: SYSTEMFILES_CRASH_POINTS={self.point} pytest tests/crash"])


# --- in a worker, where one point after another is struck ---


def warm_up() -> None:
    """Imports all that the children need, so that none of them has to."""
    for module in pkgutil.walk_packages(systemfiles.__path__, "systemfiles."):
        importlib.import_module(module.name)


def prepare_all(world: World) -> None:
    """Makes the directories that the scenarios start from."""

    def provision(scenario: Scenario, disk: Path) -> None:
        scratch = world.root / "preparing"
        scratch.mkdir(exist_ok=True)
        outcome = _run(scenario, world, disk, scratch, "preparing")
        assert outcome.status == 0, outcome.stdout + outcome.stderr

    prepare(world, provision)


def measure(world: World, name: str) -> Measure:
    """Runs a scenario undisturbed, twice: threads and sockets do not make equally many calls each time."""
    fewer = _measure_once(world, name, "before")
    measured = _measure_once(world, name, "measured")
    counts = {action: min(count, fewer.counts[action]) for action, count in measured.counts.items()}
    return replace(measured, counts=counts, problems=measured.problems + fewer.problems)


def _measure_once(world: World, name: str, tag: str) -> Measure:
    with _case(world, name, tag) as (scenario, disk, scratch):
        before = checker.read(disk / "data")
        outcome = run(partial(scenario.run, Run(world, disk / "data", tag)), disk, scratch)
        after = checker.read(disk / "data")
        counts = {action: outcome.count(action) for action in ACTIONS}
        problems = [*verdicts.new(before, after), *checker.losses(before, after, scenario.goes)]
        if outcome.status not in (0, 1) or "Traceback" in outcome.stderr or after.left:
            problems.append(Problem("undisturbed", f"{outcome.status} {after.left} {outcome.stdout}{outcome.stderr}"))
        return Measure(before, after, outcome.status, counts, tuple(problems))


def strike(world: World, measured: Measure, point: Point) -> Result:
    """Runs a scenario, strikes it, checks what is left, and runs it again."""
    tag = str(point).replace(":", "-").lower()
    with _case(world, point.scenario, tag) as (scenario, disk, scratch):
        outcome = _run(scenario, world, disk, scratch, tag, Injection(point.action, point.n))
        problems = [*verdicts.at_first(outcome, scenario, point.action, measured, checker.read(disk / "data"))]
        last = outcome
        if point.again:
            _age(disk)
            last = _run(scenario, world, disk, scratch, tag, Injection(point.action, point.again))
            problems += verdicts.invariants(scenario, measured, checker.read(disk / "data"))
        problems += _pushed(world, scenario, tag, whole=False)
        if not measured.before.broken and scenario.unheld is None:
            found = _run(RESOLVE, world, disk, scratch, tag)
            problems += [f"what is there does not resolve: {found.stderr}"] if found.status else []
        _age(disk)
        if scenario.unheld is not None and any((disk / "data" / name).exists() for name in _USED):
            # on a copy, as it removes what is not held
            copy_data_dir(disk, copy := disk.with_name("collected"))
            _age(copy)
            collection = _run(COLLECT, world, copy, scratch, tag)
            problems += verdicts.collected(collection, last, scenario, measured, checker.read(copy / "data"))
        final = _run(scenario, world, disk, scratch, tag)
        problems += verdicts.at_last(final, scenario, measured, checker.read(disk / "data"))
        problems += _pushed(world, scenario, tag, whole=True)
        stderr = final.stderr if final.status != measured.status else outcome.stderr
        struck = "; ".join(map(str, outcome.struck[:3]))
        return Result(point, bool(outcome.struck), tuple(dict.fromkeys(problems)), struck, stderr)


def _age(disk: Path) -> None:
    """Lets an hour pass since the run before: what it left is no longer fresh."""
    then = time.time() - 3600
    for path in checker.temporary(disk / "data"):
        os.utime(path, (then, then))


@contextlib.contextmanager
def _case(world: World, name: str, tag: str) -> Iterator[tuple[Scenario, Path, Path]]:
    """A scenario, a disk of its own, and a directory for output."""
    scenario = SCENARIOS[name]
    case = world.root / "cases" / f"{name}-{tag}"
    (case / "output").mkdir(parents=True)
    try:
        copy_data_dir(world.base(scenario.base), case / "disk")
        _age(case / "disk")
        yield scenario, case / "disk", case / "output"
    finally:
        shutil.rmtree(case)


def _run(
    scenario: Scenario, world: World, disk: Path, scratch: Path, tag: str, injection: Injection | None = None
) -> Outcome:
    """Runs a scenario on a disk: struck, or freely."""
    body = partial(scenario.run, Run(world, disk / "data", tag))
    return run(body, disk, scratch, injection) if injection else run_freely(body, scratch)


def _pushed(world: World, scenario: Scenario, tag: str, *, whole: bool) -> Iterator[str]:
    """A manifest in the registry is there with all that it refers to."""
    if scenario.name == "push":
        base = f"http://{world.host}/v2/{PUSHED}/{tag}"
        yield from checker.registry_problems(base, whole=whole)


# --- which points ---


def all_points(name: str, measured: Measure) -> list[Point]:
    """A kill at every call of ours; of calls of programs, of runs killed twice, and of each kind of fault a part."""
    rng = random.Random(f"{_SEED} {name}")
    points = []
    for action in ACTIONS:
        numbers = range(1, measured.counts[action] + 1)
        chosen = numbers if action == "kill" else sorted(rng.sample(numbers, min(len(numbers), _MOST_OF_A_KIND)))
        points += [Point(name, action, n) for n in chosen]
    kills = measured.counts["kill"]
    twice = {(rng.randint(1, kills), rng.randint(1, kills)) for _ in range(kills // 3)}
    return points + [Point(name, "kill", n, again) for n, again in sorted(twice)]


def sampled_points(name: str, measured: Measure, *, kills: int, faults: int) -> list[Point]:
    """So many of them, the same every time."""
    rng = random.Random(f"{_SEED} {name}")
    by_action: dict[str, list[Point]] = {}
    for point in all_points(name, measured):
        by_action.setdefault(f"{point.action}{bool(point.again)}", []).append(point)
    chosen = []
    for action, points in by_action.items():
        wanted = {"killFalse": kills, "killTrue": kills // 4, "kill-programFalse": kills // 8}.get(action, faults)
        chosen += sorted(rng.sample(points, min(len(points), wanted)))
    return chosen


# --- what came of it ---


def table(measures: dict[str, Measure], results: Iterable[Result]) -> str:
    """One row for each scenario, in Markdown."""
    struck: dict[str, Counter[str]] = {name: Counter() for name in measures}
    for result in results:
        row = struck[result.point.scenario]
        kind = "kills" if result.point.action in KILLS else "faults"
        row[kind] += 1
        row[f"{kind} reached"] += result.reached
        row["broken"] += bool(result.problems)
    columns = ("kills", "kills reached", "faults", "faults reached", "broken")
    lines = [f"| scenario | calls | {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) + 1)}"]
    for name, row in struck.items():
        calls = measures[name].counts["kill"] + measures[name].counts["kill-program"]
        lines.append(f"| {name} | {calls} | {' | '.join(str(row[column]) for column in columns)} |")
    total = sum(struck.values(), Counter())
    lines.append(f"| **all** | | {' | '.join(str(total[column]) for column in columns)} |")
    return "\n".join(lines)
