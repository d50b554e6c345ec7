"""What a scenario is: a function that runs in a child process on a copy of a prepared directory.

It returns an exit status, and says what went wrong on stderr, as the command line does. What it was promised it says on
stdout the moment it knows, so that a kill right behind it can be held against what is on the disk.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from systemfiles import SystemFiles, cli
from systemfiles.foundation.errors import SystemFilesError
from systemfiles.sources.transport import Answered, Interrupted, Unreachable
from tests.crash.checker import NOTHING, Goes
from tests.crash.world import ARCH, OLD, World

INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Run:
    """One run: in `world`, on the data directory `data`; `tag` is its own among all runs."""

    world: World
    data: Path
    tag: str

    def system(self, profile: str = "packaged") -> SystemFiles:
        return SystemFiles(self.data, catalog=self.world.catalog, profile=profile, arch=ARCH)


@dataclass(frozen=True)
class Scenario:
    """What runs, on which prepared directory, and while apt knows which packages.

    One that makes artifacts also `sweeps`: it removes what killed runs left. `goes` is what it may remove. One that
    `lists` brings SHA256SUMS and index.json up to date even when it makes nothing. One with `unheld` is followed by a
    collection, whatever became of it, which removes these as well.
    """

    name: str
    base: str
    body: Callable[[Run], int]
    apt: str = OLD
    sweeps: bool = False
    goes: Goes = NOTHING
    lists: bool = True
    unheld: Goes | None = None

    def run(self, run: Run) -> int:
        """Exit status. In a child of its own, as it changes the environment."""
        os.environ["APT_CONFIG"] = str(run.world.apt(self.apt))
        return self.body(run)


def command(*words: str) -> Callable[[Run], int]:
    """A command line, without where."""

    def body(run: Run) -> int:
        place = ["--data-dir", str(run.data), "--catalog-file", str(run.world.catalog)]
        return cli.main([*words, *place])

    return body


def calling(body: Callable[[Run], None]) -> Callable[[Run], int]:
    """A library caller that tells of errors as the command line does."""

    def called(run: Run) -> int:
        try:
            body(run)
        except (SystemFilesError, Answered, Interrupted, Unreachable) as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            return INTERRUPTED
        return 0

    return called


def promised(*words: str) -> None:
    """Tells what a call that has just returned has promised; not through a buffer, which a kill would take along."""
    os.write(1, f"promised {' '.join(words)}\n".encode())
