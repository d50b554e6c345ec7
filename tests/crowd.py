"""Processes that all work on one data directory until the time is over, some of which are killed meanwhile."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds after which somebody waits for ever
Work = Callable[[Any, Path, int, float, Path], None]


class Crowd:
    """Each process runs `work(here, data, seed, until, log)`, which writes a line of JSON for whatever it was told."""

    def __init__(self, work: Work, here: object, place: Path, *, seed: int, seconds: float) -> None:
        self.data = place / "data"
        self.until = time.monotonic() + seconds
        self._context = multiprocessing.get_context("spawn")
        self._work, self._here, self._seed = work, here, seed
        self._choose = random.Random(seed)
        self._logs = place / "logs"
        self._logs.mkdir()
        self._processes: list[SpawnProcess] = []
        self._started = 0

    def start(self, count: int = 1) -> None:
        """So many more of them."""
        for _ in range(count):
            self._started += 1
            arguments = (self._here, self.data, self._seed + self._started, self.until, self._logs / str(self._started))
            process = self._context.Process(target=self._work, args=arguments)
            process.start()
            self._processes.append(process)

    def replace(self) -> None:
        """Kills one of them, and starts another."""
        process = self._processes.pop(self._choose.randrange(len(self._processes)))
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        self.start()

    def end(self) -> None:
        """Waits for everybody. Fails when somebody waits for ever."""
        hanging = []
        for process in self._processes:
            process.join(max(0.0, self.until - time.monotonic()) + PATIENCE)
            if process.exitcode is None:
                hanging.append(process.name)
                process.kill()
        assert hanging == []
        assert {process.exitcode for process in self._processes} == {0}

    def lines(self) -> Iterator[Any]:
        """All that anybody was told; half a line of somebody who was killed is nothing."""
        for log in sorted(self._logs.iterdir()):
            for line in log.read_text().splitlines():
                with suppress(ValueError):
                    yield json.loads(line)
