"""The doit tasks over a catalog: resolve → kernel, busybox → initrd → manifest, and what operators do beside.

doit only schedules. Whether something is to do is decided by the provisioner from records and digests on disk; doit
keeps no state of its own (its database lives in memory), so two runs, `ensure()` and another host agree.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from doit import doit_cmd
from doit.exceptions import InvalidCommand, TaskFailed

from systemfiles.content.artifacts import Artifact
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import NotProvisioned, SourceError, SystemFilesError, UsageError, unexpected
from systemfiles.foundation.interruption import Interruption
from systemfiles.foundation.lock import Patience
from systemfiles.foundation.paths import INITRD, KERNEL
from systemfiles.foundation.progress import ProgressBars
from systemfiles.hostpackages import PROVISIONING, TESTS, install, missing_packages
from systemfiles.provision.rolling import Move
from systemfiles.provision.site import Made
from systemfiles.reporter import Reporter
from systemfiles.selection import Target, check_variables, select, select_all, unique
from systemfiles.system import SystemFiles

_REPAIR = "`systemfiles verify --repair` makes it again; doit does so for what its profile uses"
FULL = "SYSTEMFILES_TEST_FULL"
"""Set in the environment of tests that are to run their campaigns whole."""
_PIPELINE = ("resolve", "kernel", "busybox", "initrd", "manifest")

Tasks = Iterator[dict[str, Any]]
Note = str | None


def bind(*, catalog: Path | None = None, checkout: Path | None = None) -> dict[str, Any]:
    """What doit looks for in a dodo.py, for the variables on doit's command line.

    `checkout` is where the tests are; without it there are no tasks for developers.
    """
    # doit ignores variables that nobody asks for and has no public list of those it was given
    variables = dict(doit_cmd._CMDLINE_VARS or {})
    try:
        graph = Graph(variables, catalog=catalog, checkout=checkout)
        graph.interruption.expect()
        return graph.tasks()
    except SystemFilesError as error:
        raise InvalidCommand(str(error)) from None


def run(tasks: Iterable[str], variables: Mapping[str, str], *, catalog: Path | None = None) -> int:
    """Runs the pipeline, after `tasks`, without a dodo.py; returns doit's exit status. Raises SystemFilesError."""
    from doit.cmd_base import ModuleTaskLoader
    from doit.doit_cmd import DoitMain

    graph = Graph(variables, catalog=catalog)
    graph.interruption.expect()
    status: int = DoitMain(ModuleTaskLoader(graph.tasks())).run(["run", *tasks, *_PIPELINE])
    return graph.interruption.status or status


class Graph:
    """The tasks for one selection of targets."""

    def __init__(
        self, variables: Mapping[str, str], *, catalog: Path | None = None, checkout: Path | None = None
    ) -> None:
        check_variables(variables)
        self._variables = variables
        self._catalog = catalog
        self._checkout = checkout
        self._bars = ProgressBars()
        self.interruption = Interruption()
        self._progress = self.interruption.watched(self._bars)
        self._system = SystemFiles(variables.get("data_dir"), catalog=catalog, profile=variables.get("profile"))
        self._provisioner = self._system.provisioner(
            progress=self._progress, timeout=Patience(check=self.interruption.check)
        )
        self.targets = select(variables, self._system.catalog, self._provisioner)

    def tasks(self) -> dict[str, Any]:
        """doit's configuration and the task creators, in the order of the pipeline."""
        creators: dict[str, Callable[[], Any]] = {
            "resolve": self._task_resolve,
            "kernel": self._task_kernel,
            "busybox": self._task_busybox,
            "initrd": self._task_initrd,
            "manifest": self._task_manifest,
            "update": self._task_update,
            "verify": self._task_verify,
            "boot": self._task_boot,
            "gc": self._task_gc,
            "release": self._task_release,
            "setup": self._task_setup,
        }
        if self._checkout is not None:
            creators |= {"test": self._task_test, "bench": self._task_bench}
        config = {
            "default_tasks": [*_PIPELINE],
            "reporter": type("BoundReporter", (Reporter,), {"graph": self}),  # doit makes the instance
            "verbosity": 2,
            "backend": "sqlite3",
            "dep_file": ":memory:",
            "par_type": "thread",
            "sort": "definition",
        }
        return {"DOIT_CONFIG": config} | {f"task_{name}": creator for name, creator in creators.items()}

    def aside(self) -> AbstractContextManager[None]:
        """Without progress bars, so that something can be written."""
        return self._bars.aside()

    def close(self) -> None:
        """Removes what is left of progress bars."""
        self._bars.close()

    def paths(self) -> Iterator[tuple[str, Path]]:
        """What is provided now, as (kind, path), each once."""
        for target in self.targets:
            kernel = self._kernel_of(target)
            yield KERNEL, kernel.path
            if target.initrd and (initrd := self._provisioner.initrds.kept(target.initrd, kernel, target.arch)):
                yield INITRD, initrd.path

    # ── the pipeline ─────────────────────────────────────────────────────────────────────────────────────────────

    def _task_resolve(self) -> Tasks:
        yield _about("resolve", "ask this host's apt what rolling versions are now, unless versions.lock says it")
        for arch in self._arches():
            yield self._task(arch, partial(self._resolve, arch), done=partial(self._is_resolved, arch))

    def _task_kernel(self) -> Tasks:
        yield _about("kernel", "fetch or recover the kernel, verify it, and take out the modules")
        for name, arch in unique((target.kernel, target.arch) for target in self.targets):
            done = partial(self._provisioner.kernels.kept, name, arch)
            yield self._task(f"{name}:{arch}", partial(self._kernel, name, arch), done=done, after=[f"resolve:{arch}"])

    def _task_busybox(self) -> Tasks:
        yield _about("busybox", "fetch the busybox that the initrd is built on into the content store")
        for name, arch in unique((target.initrd, target.arch) for target in self.targets if target.initrd):
            done = partial(self._provisioner.initrds.kept_busybox, name, arch)
            yield self._task(f"{name}:{arch}", partial(self._busybox, name, arch), done=done, after=[f"resolve:{arch}"])

    def _task_initrd(self) -> Tasks:
        yield _about("initrd", "build the initrd: busybox, /init, and the kernel's modules")
        for target in (target for target in self.targets if target.initrd):
            after = [f"kernel:{target.kernel}:{target.arch}", f"busybox:{target.initrd}:{target.arch}"]
            make = partial(self._initrd, str(target.initrd), target)
            yield self._task(self._name_of(target), make, done=partial(self._has_initrd, target), after=after)

    def _task_manifest(self) -> dict[str, Any]:
        """write SHA256SUMS, and our names in the content store's index"""
        done = self._is_manifest_current
        after = ["kernel", "initrd"]
        return self._task(None, self._write_manifest, done=done, after=after, doc=self._task_manifest.__doc__)

    # ── beside it ────────────────────────────────────────────────────────────────────────────────────────────────

    def _task_update(self) -> dict[str, Any]:
        """move rolling versions to what apt has now, and provide those"""
        return self._task(None, self._update, doc=self._task_update.__doc__)

    def _task_verify(self) -> dict[str, Any]:
        """read every byte of everything provided and compare it with its record"""
        return self._task(None, self._verify, doc=self._task_verify.__doc__)

    def _task_boot(self) -> Tasks:
        yield _about("boot", "boot what is provided in QEMU and check what it promises a guest (image=NAME, accel=kvm)")
        for target in self.targets:
            if target.initrd:
                name = self._name_of(target)
                yield self._task(name, partial(self._boot, target), after=[f"initrd:{name}"])
            else:
                yield self._task(f"{target.kernel}:{target.arch}", _needs_initrd)

    def _task_gc(self) -> dict[str, Any]:
        """remove what nothing holds; `systemfiles gc --dry-run` says what that would be"""
        return self._task(None, self._collect, doc=self._task_gc.__doc__)

    def _task_release(self) -> dict[str, Any]:
        """build every version twice, compare, and leave what is to be published in dist/"""
        return self._task(None, self._release, doc=self._task_release.__doc__)

    def _task_setup(self) -> dict[str, Any]:
        """install what provisioning needs from this host's apt (tests=yes: and what the tests need)"""
        return self._task(None, self._setup, done=self._is_set_up, doc=self._task_setup.__doc__)

    def _task_test(self) -> dict[str, Any]:
        """run all tests: linters, unit, contract, integration, boot, and samples of the campaigns (full=yes: all)"""
        return self._task(
            None,
            partial(self._python, "-m", "pytest", "-n", "auto", "--dist", "loadfile", "tests"),
            doc=self._task_test.__doc__,
        )

    def _task_bench(self) -> dict[str, Any]:
        """print what the hot paths cost, as ratios to well-known programs in the same run"""
        return self._task(None, partial(self._python, "tests/bench/run.py"), doc=self._task_bench.__doc__)

    def _task(
        self,
        name: object,
        action: Callable[[], object],
        *,
        done: Callable[[], object] | None = None,
        after: Iterable[str] = (),
        doc: str | None = None,
    ) -> dict[str, Any]:
        """One task: `action` gives the note of its line, `done` says whether nothing is to do."""
        task: dict[str, Any] = {
            "actions": [partial(self._act, action)],
            "uptodate": [partial(_is_done, done)] if done else [False],
            "task_dep": [*after],
            "doc": doc,
        }
        return task if name is None else {"name": str(name), **task}

    def _act(self, action: Callable[[], object]) -> dict[str, str] | TaskFailed:
        try:
            with self.interruption.stopping():
                note = action()
        except (SystemFilesError, _Failed, OSError, KeyboardInterrupt) as error:
            # a program of the host that was interrupted with us has failed because of that
            if self.interruption.happened or isinstance(error, KeyboardInterrupt):
                return TaskFailed("interrupted; nothing half-done is left, run it again to go on")
            return TaskFailed(str(unexpected(error) if isinstance(error, OSError) else error))
        return {"note": str(note) if note else ""}

    # ── what the tasks do ────────────────────────────────────────────────────────────────────────────────────────

    def _arches(self) -> tuple[Arch, ...]:
        return unique(target.arch for target in self.targets)

    def _names(self, arch: Arch) -> tuple[list[str], list[str]]:
        here = [target for target in self.targets if target.arch is arch]
        initrds = unique(target.initrd for target in here if target.initrd)
        return [*unique(target.kernel for target in here)], [*initrds]

    def _is_resolved(self, arch: Arch) -> bool:
        return not any(self._provisioner.rolling.missing(*self._names(arch), arch))

    def _resolve(self, arch: Arch) -> Note:
        moves = self._provisioner.rolling.resolve(*self._names(arch), arch)
        return ", ".join(f"{move.name} → {move.after} (locked)" for move in moves)

    def _kernel(self, name: str, arch: Arch) -> Note:
        return _note(self._provisioner.kernels.provide(name, arch))

    def _busybox(self, name: str, arch: Arch) -> Note:
        if self._system.catalog.registries or not self._provisioner.builds:
            return "fetched when the initrd must be built here"
        try:
            return self._provisioner.initrds.busybox(name, arch)
        except SourceError as error:
            # its archive may have forgotten it, which is no harm to what was built on it
            built_on_it = [target for target in self.targets if (target.initrd, target.arch) == (name, arch)]
            if all(_is_done(partial(self._needs_no_base, target)) for target in built_on_it):
                return f"not here and not needed: {error.summary}"
            raise

    def _name_of(self, target: Target) -> str:
        """What tasks for the target's initrd are called; with all=yes several kernels may have the same."""
        kernel = f"{target.kernel}:" if self._variables.get("all") == "yes" else ""
        return f"{target.initrd}:{kernel}{target.arch}"

    def _has_initrd(self, target: Target) -> bool:
        kernel, initrds, name = self._kernel_of(target), self._provisioner.initrds, target.initrd
        if name is None:
            return True
        kept = initrds.kept(name, kernel, target.arch)
        if kept is None or not initrds.is_locked(name, kept, kernel, target.arch):
            return False
        return self._provisioner.rolling.is_noted(target.kernel, name, target.arch)

    def _needs_no_base(self, target: Target) -> bool:
        without_base = self._provisioner.initrds.without_base
        return without_base(str(target.initrd), self._kernel_of(target), target.arch) is not None

    def _initrd(self, name: str, target: Target) -> Note:
        made = self._provisioner.provide(target.kernel, [name], target.arch)[1]
        self._provisioner.rolling.note(target.kernel, name, target.arch)
        return _note(made)

    def _kernel_of(self, target: Target) -> Artifact:
        kernel = self._provisioner.kernels.kept(target.kernel, target.arch)
        if kernel is None:
            looked_in = self._system.paths.kind(KERNEL)
            raise NotProvisioned(KERNEL, target.kernel, target.arch.value, looked_in=looked_in)
        return kernel

    def _is_manifest_current(self) -> bool:
        self._provisioner.sweep()  # a run that finds nothing to do cleans up all the same
        return self._provisioner.manifest_is_current()

    def _write_manifest(self) -> Note:
        self._system.holdings.learn()
        return f"{self._provisioner.write_manifest()} files listed"

    def _update(self) -> Note:
        moves: list[Move] = []
        for target in self.targets:
            moves += self._provisioner.update(target.kernel, target.initrd, target.arch)
        self._provisioner.write_manifest()
        return "\n   ".join(f"{move.name}: {move.before} → {move.after}" for move in moves) or "nothing moved"

    def _verify(self) -> Note:
        found = self._system.verify()
        if found.problems:
            raise _Failed("\n".join([*map(str, found.problems), _REPAIR]))
        return f"{found.artifacts} artifacts and the content store are intact"

    def _boot(self, target: Target) -> Note:
        from systemfiles.recipes.bootcheck import check_and_keep_log

        kernel = self._kernel_of(target)
        initrd = self._provisioner.initrds.kept(str(target.initrd), kernel, target.arch)
        system = SystemFiles(self._variables.get("data_dir"), catalog=self._catalog, arch=target.arch)
        files = system.resolve(kernel.version, initrd.version if initrd else target.initrd)
        name = self._variables.get("image")
        image = system.image(name, progress=self._progress) if name else None
        accel = self._variables.get("accel", "tcg")
        report = check_and_keep_log(files, system.paths, image=image, accel=accel, progress=self._progress)
        if not report.holds:
            raise _Failed(report.text())
        return "\n   ".join(report.lines())

    def _collect(self) -> Note:
        found = self._system.collect()
        if found.problems:
            raise _Failed("\n".join([found.told(), *map(str, found.problems)]))
        return found.told().replace("\n", "\n   ")

    def _release(self) -> Note:
        from systemfiles.release.building import origin_of, release, told

        dist = Path("dist").absolute()
        targets = select_all(self._variables, self._system.catalog, self._provisioner)
        lock = self._system.paths.versions_lock
        return told(dist, release(targets, self._system.catalog, lock, dist, origin_of(self._checkout)))

    def _wanted_packages(self) -> dict[str, str]:
        return PROVISIONING | (TESTS if self._variables.get("tests") == "yes" else {})

    def _is_set_up(self) -> bool:
        return not missing_packages(self._wanted_packages())

    def _setup(self) -> Note:
        wanted = self._wanted_packages()
        missing = missing_packages(wanted)
        sys.stderr.write("".join(f"   apt-get install {name:<18} {wanted[name]}\n" for name in missing))
        return f"{len(install(missing))} packages installed"

    def _python(self, *words: str) -> Note:
        environ = os.environ | ({FULL: "1"} if self._variables.get("full") == "yes" else {})
        done = subprocess.run([sys.executable, *words], cwd=self._checkout, env=environ, check=False)
        if done.returncode:
            msg = f"{' '.join(words)} ended with status {done.returncode}"
            raise _Failed(msg)
        return None


def _about(name: str, doc: str) -> dict[str, Any]:
    return {"basename": name, "name": None, "doc": doc}


class _Failed(Exception):
    """A task's work ran and its outcome is bad."""


def _needs_initrd() -> Note:
    msg = "a kernel alone does not boot a guest"
    raise UsageError(msg, hint="name an initrd too: initrd=V, or a profile with profile=")


def _is_done(done: Callable[[], object]) -> bool:
    try:
        return bool(done())
    except SystemFilesError:
        return False  # the action meets the same fault and reports it


def _note(made: Made) -> Note:
    return f"{made.note}" if made.note else "kept"
