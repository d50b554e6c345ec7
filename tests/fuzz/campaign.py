"""Runs one target in a process of its own, which may take only so much: the oracle of every target.

Time is that of the processor, so that a busy machine makes no difference. Memory is the address space: what a bomb
asks for is refused then, and a MemoryError is as much a fault as any other error that is not ours.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from hypothesis import HealthCheck, Phase, configuration, given, seed, settings

from systemfiles.foundation.errors import SystemFilesError
from tests.fuzz.known import KNOWN
from tests.fuzz.targets import SOUND, TARGETS

SECONDS = 4.0
"""of processor time for one input: four times what the worst of them takes, and thousands of times the usual"""
MEMORY = 512 << 20
"""bytes of address space beyond what the process has when it begins"""
_PATIENCE = 1800.0

_processes = multiprocessing.get_context("forkserver")  # a clean process, although pytest's may have threads
_processes.set_forkserver_preload([__name__])


class _Said(logging.Handler):
    """Puts every message together, as a handler would, and tells nobody."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage()


class _TooLong(BaseException):
    """No Exception: nothing that catches those may swallow it."""


def faults(name: str, *, examples: int, random_seed: int | None = None) -> str:
    """What `examples` inputs, and those known to be hostile, showed to be wrong with a target; "" for nothing.

    Without a seed they are the same at each call.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        ours, theirs = _processes.Pipe(duplex=False)
        child = _processes.Process(target=_run, args=(name, examples, random_seed, Path(scratch), theirs))
        child.start()
        theirs.close()
        try:
            return str(ours.recv()) if ours.poll(_PATIENCE) else f"no answer after {_PATIENCE:g} s"
        except EOFError:
            child.join()
            return f"the process died with status {child.exitcode}"
        finally:
            child.kill()
            child.join()


def _run(name: str, examples: int, random_seed: int | None, scratch: Path, answer: Connection) -> None:
    configuration.set_hypothesis_home_dir(scratch)
    tempfile.tempdir = str(scratch)
    os.environ["PATH"] = str(scratch)  # a docker config may name any program
    logging.basicConfig(handlers=[_Said()], level=logging.INFO, force=True)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    try:
        _check(name, examples, random_seed, scratch)
        answer.send("")
    except BaseException as error:
        answer.send("".join(traceback.format_exception(error)))


def _check(name: str, examples: int, random_seed: int | None, scratch: Path) -> None:
    target = TARGETS[name]
    for sound in SOUND.get(name, ()):
        with _directory(scratch) as work:
            target.call(sound, work)
    for title, make in KNOWN.get(name, {}).items():
        try:
            examine(target.call, make(), scratch)
        except BaseException as error:
            error.add_note(f"for what is known as {title!r}")
            raise

    @settings(
        max_examples=max(1, int(examples * target.share)),
        derandomize=random_seed is None,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=tuple(HealthCheck),
    )
    @given(target.inputs)
    def any_input(data: bytes) -> None:
        examine(target.call, data, scratch)

    (any_input if random_seed is None else seed(random_seed)(any_input))()


def examine(call: Callable[[bytes, Path], object], data: bytes, scratch: Path) -> None:
    """Requires that `call` takes `data` or refuses it as it should, within its bounds."""
    signal.signal(signal.SIGPROF, _interrupt)
    with _directory(scratch) as work:
        signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS)  # again, should a finalizer swallow it
        try:
            call(data, work)
        except SystemFilesError as error:
            str(error)  # what it says can be said
        except _TooLong as error:
            msg = f"it takes more than {SECONDS:g} s"
            raise AssertionError(msg) from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


@contextmanager
def _directory(scratch: Path) -> Iterator[Path]:
    work = scratch / "work"
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work)


def _interrupt(*_: object) -> None:
    raise _TooLong
