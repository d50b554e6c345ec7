"""What a run of the task graph looks like: a line for each task that did something, then where the files are."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Protocol

from doit.exceptions import BaseFail, TaskFailed
from doit.reporter import ConsoleReporter

from systemfiles.foundation.errors import SystemFilesError


class Shown(Protocol):
    """The graph, as far as it is shown."""

    def close(self) -> None: ...

    def aside(self) -> AbstractContextManager[None]: ...

    def paths(self) -> Iterator[tuple[str, Path]]: ...


class Reporter(ConsoleReporter):  # type: ignore[misc]  # doit has no types
    """Says what was done in a line each, then where the files are; says so when nothing was to do."""

    graph: ClassVar[Shown]

    def __init__(self, outstream: Any, options: Mapping[str, Any]) -> None:
        super().__init__(outstream, options)
        self._kept: list[str] = []
        self._done: list[str] = []

    def write(self, text: str) -> None:
        # whoever read us may have seen enough; the work goes on
        with contextlib.suppress(BrokenPipeError), self.graph.aside():
            self.outstream.write(text)
            self.outstream.flush()

    def execute_task(self, task: Any) -> None:
        """Nothing: a line appears when the task ends."""

    def skip_uptodate(self, task: Any) -> None:
        self._kept.append(task.name)

    def add_success(self, task: Any) -> None:
        if task.actions:
            self._done.append(task.name)
            self.write(f".  {task.name:<36} {task.values.get('note') or ''}".rstrip() + "\n")

    def add_failure(self, task: Any, fail: BaseFail) -> None:
        self.graph.close()
        self.failures.append({"task": task, "exception": fail})
        self.write(f"!  {task.name}\n")
        sys.stderr.write(f"error: {fail.message}\n" if isinstance(fail, TaskFailed) else fail.get_msg())

    def complete_run(self) -> None:
        self.graph.close()
        if self.runtime_errors:
            self.write("\n".join(self.runtime_errors) + "\n")
        if self.failures:
            return
        if self._kept and not self._done:
            self.write(f"-- everything is up to date ({len(self._kept)} targets)\n")
        if {"manifest", "update"} & {*self._kept, *self._done}:
            self.write("\n")
            try:
                for kind, path in self.graph.paths():
                    self.write(f"{kind:<6}  {path}\n")
            except SystemFilesError as error:
                self.failures.append(error)
                sys.stderr.write(f"error: {error}\n")
