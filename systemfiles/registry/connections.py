"""One connection for each thread, and none that goes through a fork.

A forked process has a copy of what its parent knew of the locks on an SQLite file, and not the locks: what it commits
is lost when the parent closes the last connection that really has them (sqlite.org, "How To Corrupt An SQLite Database
File", 2.6). So fork(2) waits for the transactions of all threads and finds every connection closed; each is opened
again by its next use.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

_PATIENCE = 60.0  # seconds that a fork waits: what it then still finds in a transaction is never used by the child


class _Gate:
    """Transactions pass it together, a fork alone."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets other threads, which a forked process does not have, nor the locks that they held."""
        self._changed = threading.Condition()
        self._inside = 0
        self._forks = 0

    def __enter__(self) -> None:
        with self._changed:
            if self._forks:
                self._changed.wait_for(lambda: not self._forks)
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._inside -= 1
            if self._forks:
                self._changed.notify_all()

    def shut(self) -> bool:
        """Lets nobody in any more, and says whether all have left."""
        with self._changed:
            self._forks += 1
            return self._changed.wait_for(lambda: not self._inside, timeout=_PATIENCE)

    def open(self) -> None:
        with self._changed:
            self._forks -= 1
            self._changed.notify_all()


unforked = _Gate()
"""`with unforked:` no other thread forks."""


class _Opened:
    """An open connection: whose it is, and what it leads to."""

    def __init__(self, connection: Any, target: object) -> None:
        self.connection = connection
        self.target = target
        self.process = os.getpid()
        _every[id(self)] = self

    def close(self) -> None:
        """Closes it, unless it is the parent's, with whose locks that would meddle."""
        connection, self.connection = self.connection, None
        if self.process != os.getpid():
            _inherited.append(connection)
        elif connection is not None:
            with contextlib.suppress(Exception):  # whatever a driver has to say of a connection that is given up
                connection.close()

    def __del__(self) -> None:
        self.close()  # as soon as its thread ends: sqlite3 would leave that to the garbage collector


_every: weakref.WeakValueDictionary[int, _Opened] = weakref.WeakValueDictionary()
_inherited: list[object] = []


class Connections:
    """Those of one database, each made when its thread first needs it."""

    def __init__(self, connect: Callable[[], Any], target: Callable[[], object]) -> None:
        """`target` says what a connection that is made now leads to: one to something else is not used any more."""
        self._connect = connect
        self._target = target
        self._local = threading.local()

    def is_new(self) -> bool:
        """Whether this thread's connection is yet to be made."""
        opened: _Opened | None = getattr(self._local, "opened", None)
        return opened is None or opened.connection is None

    def get(self) -> Any:
        """This thread's connection."""
        target = self._target()  # first, so that what takes its place while we connect is noticed at the next use
        opened: _Opened | None = getattr(self._local, "opened", None)
        if opened is None or opened.connection is None or (opened.target, opened.process) != (target, os.getpid()):
            self.drop()
            opened = self._local.opened = _Opened(self._connect(), target)
        return opened.connection

    def drop(self) -> None:
        """Closes this thread's connection, if it has one."""
        if (opened := getattr(self._local, "opened", None)) is not None:
            self._local.opened = None
            opened.close()


def _before_fork() -> None:
    if unforked.shut():
        for reference in _every.valuerefs():
            if (opened := reference()) is not None:
                opened.close()


os.register_at_fork(before=_before_fork, after_in_parent=unforked.open, after_in_child=unforked.reset)
