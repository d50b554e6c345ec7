"""One world for all points, workers that strike them, and the table at the end."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from tests.crash import campaign
from tests.crash.campaign import Point, Result
from tests.crash.scenarios import SCENARIOS
from tests.crash.verdicts import Measure
from tests.crash.world import World, world

_SHARED_MEMORY = Path("/dev/shm")
_tables: list[str] = []
T = TypeVar("T")


@dataclass
class Campaign:
    """Strikes points on all processors; each runs alone on a data directory of its own."""

    world: World
    measures: Mapping[str, Measure]
    complete: bool
    _pool: ProcessPoolExecutor
    results: list[Result] = field(default_factory=list)

    def points(self, name: str) -> list[Point]:
        """What there is to strike of a scenario: what the environment names, else all, else a sample."""
        if named := os.environ.get("SYSTEMFILES_CRASH_POINTS"):
            return [point for point in map(Point.parse, named.split(",")) if point.scenario == name]
        if self.complete:
            return campaign.all_points(name, self.measures[name])
        return campaign.sampled_points(name, self.measures[name], kills=8, faults=1)

    def call(self, function: Callable[..., T], *arguments: object) -> T:
        """What `function` gives in a worker, where nothing but it runs."""
        return self._pool.submit(function, *arguments).result()

    def strike(self, points: list[Point]) -> list[Result]:
        waiting = [self._pool.submit(campaign.strike, self.world, self.measures[p.scenario], p) for p in points]
        results = [future.result() for future in waiting]
        self.results += results
        return results


@pytest.fixture(scope="session")
def here() -> Iterator[World]:
    """The world that every run is in."""
    # memory is as good as a disk to a process that dies, and faster
    place = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="systemfiles-crash-", dir=place))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("no_proxy", "127.0.0.1")
            with world(root) as made:
                yield made
    finally:
        shutil.rmtree(root)


@pytest.fixture(scope="session")
def campaigning(here: World) -> Iterator[Campaign]:
    """The campaign: complete with SYSTEMFILES_TEST_FULL=1. SYSTEMFILES_CRASH_TABLE names a file for its table."""
    context = multiprocessing.get_context("spawn")  # workers fork, and so must have no threads of ours
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=campaign.warm_up) as pool:
        pool.submit(campaign.prepare_all, here).result()
        waiting = {name: pool.submit(campaign.measure, here, name) for name in SCENARIOS}
        measures = {name: future.result() for name, future in waiting.items()}
        complete = os.environ.get("SYSTEMFILES_TEST_FULL") == "1"
        yield (made := Campaign(here, measures, complete, pool))
    if made.results:
        _tables.append(campaign.table(measures, made.results))
        if path := os.environ.get("SYSTEMFILES_CRASH_TABLE"):
            Path(path).write_text(f"{_tables[-1]}\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for table in _tables:
        terminalreporter.section("crash campaign")
        terminalreporter.write_line(table)
