"""A fleet of hosts: each a process with its own data directory and its own link to one registry.

A link is a TCP proxy on loopback, of which each process has another one. So a slow link is one that lets few bytes a
second through, and the Host that a request was sent to, in the registry's log, tells which process asked.

The processes are forked from one that has imported everything: what they do then is their own, the start of fifty
interpreters would only be waited for. The bench starts whole ones.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

from systemfiles import SystemFiles
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.paths import Paths
from tests.registries import Registry

PATIENCE = 300.0  # seconds after which somebody waits for ever
AT_ONCE = 50
_IMPORTED = (
    "__main__",
    __name__,
    "cryptography.hazmat.primitives.serialization",
    "systemfiles.provision.provisioner",
    "systemfiles.provision.pull",
    "systemfiles.registry.registry",
    "systemfiles.retention.recovery",
    "systemfiles.sources.signatures",
)
"""In the process that all others are forked from."""
_OUTSIDE = ("open", "os.", "socket.", "fcntl.", "shutil.")


class Order(NamedTuple):
    """What one process is to do: provide a pair, or restore `record`; and at which moment of that it dies, if at all.

    It writes what came of it to `told`.
    """

    data: Path
    catalog: Path
    kernel: str
    initrd: str
    record: Mapping[str, Any] | None
    fatal: int | None
    told: Path


def work(order: Order) -> None:
    """The process of a host, as the service that starts its VMs would do it."""
    moments = _Moments(order.fatal)
    system = SystemFiles(order.data, catalog=order.catalog, arch=Arch.X86_64, build=False)
    if order.record is None:
        files = system.ensure(order.kernel, order.initrd, timeout=PATIENCE, progress=moments.progress)
    else:
        files = system.restore(order.record)
    order.told.write_text(json.dumps({"files": files.to_dict(), "moments": moments.passed}))


class _Moments:
    """Counts what this process does to the world outside, and kills it before the one that is `fatal`."""

    def __init__(self, fatal: int | None) -> None:
        self.passed = 0
        self._fatal = fatal
        sys.addaudithook(self._hook)

    def progress(self, subject: str, done: int, total: int | None) -> None:
        self._pass()

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(_OUTSIDE):
            self._pass()

    def _pass(self) -> None:
        self.passed += 1
        if self.passed == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)


class Links:
    """Proxies to one registry, served by a thread."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream.split(":")
        self._loop = asyncio.new_event_loop()
        self._tasks = set[asyncio.Task[None]]()
        self._servers: dict[str, asyncio.Server] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def open(self, rate: int | None) -> str:
        """The place, as `host:port`, of a new link, on each of whose connections `rate` bytes a second pass."""
        return asyncio.run_coroutine_threadsafe(self._open(rate), self._loop).result()

    def shut(self, place: str) -> None:
        """Takes no more connections there."""
        self._loop.call_soon_threadsafe(self._servers[place].close)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _open(self, rate: int | None) -> str:
        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection(*self._upstream)
            for way in (_pass_on(reader, back, rate), _pass_on(there, writer, rate)):
                self._keep(way)

        while True:
            server = await asyncio.start_server(connect, "127.0.0.1", 0, backlog=128)
            place = "{}:{}".format(*server.sockets[0].getsockname())
            if place not in self._servers:
                self._servers[place] = server
                return place
            server.close()  # another process had it, and is told from this one by it

    def _keep(self, way: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(way)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rate: int | None) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16 if rate is None else rate // 10):
            if rate is not None:
                await asyncio.sleep(len(data) / rate)
            writer.write(data)
            await writer.drain()
    writer.close()


@dataclass
class Life:
    """One process of a host: the place that it has its link at, which blobs were there when it began, and when it was
    killed."""

    place: str
    had: frozenset[str]
    killed: bool = False


@dataclass
class Host:
    """One host. `rate` is what its link lets through, in bytes a second."""

    data: Path
    rate: int | None
    lives: list[Life] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, Any]:
        """What it was told last of what its VMs are to be started with."""
        return dict(self.told["files"])

    @property
    def paths(self) -> Paths:
        return Paths(self.data)

    @property
    def tmp(self) -> list[Path]:
        return sorted(self.paths.tmp.iterdir())

    @property
    def blobs(self) -> frozenset[str]:
        """The blobs in its content store."""
        with suppress(FileNotFoundError):
            return frozenset(f"sha256:{path.name}" for path in (self.paths.oci_cache / "blobs" / "sha256").iterdir())
        return frozenset()

    def let_time_pass(self) -> None:
        """Makes what lies in tmp/ as old as if it had been left an hour ago."""
        then = time.time() - 3600
        for path in self.tmp:
            os.utime(path, (then, then))


class Fleet:
    """The hosts, which take what they boot from below `registry`/`place`."""

    def __init__(self, root: Path, registry: Registry, place: str, keys: Iterable[str]) -> None:
        self.hosts: list[Host] = []
        self._root = root
        self._registry = registry
        self._place = place
        self._keys = [*keys]
        self._links = Links(registry.host)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*_IMPORTED])

    @contextmanager
    def running(self) -> Iterator[Fleet]:
        try:
            yield self
        finally:
            self._links.close()

    def add(self, rate: int | None = None) -> Host:
        host = Host(self._root / f"host-{len(self.hosts)}", rate)
        self.hosts.append(host)
        return host

    def provide(self, hosts: Iterable[Host], pair: tuple[str, str], deaths: Mapping[int, Iterable[int]]) -> None:
        """Lets `hosts` provide a pair, at once; by their numbers, some of them die at these moments of their work, and
        are started again."""
        coming = [(host, iter(deaths.get(self.hosts.index(host), ()))) for host in hosts][::-1]
        running: dict[int, tuple[ForkServerProcess, Host, Iterator[int]]] = {}
        until = time.monotonic() + PATIENCE
        while coming or running:
            while coming and len(running) < AT_ONCE:
                host, fatal = coming.pop()
                process = self._start(host, pair, fatal=next(fatal, None))
                running[process.sentinel] = process, host, fatal
            for ended in wait([*running], until - time.monotonic()):
                assert isinstance(ended, int)
                process, host, fatal = running.pop(ended)
                if self._has_died(process, host):
                    coming.append((host, fatal))
            assert time.monotonic() < until, f"still at it: {[host.data.name for _, host, _ in running.values()]}"

    def restore(self, host: Host) -> None:
        """Lets a host start a VM again of which it only has the record."""
        process = self._start(host, ("", ""), record=host.files)
        assert not self._has_died(process, host)

    def bodies(self) -> dict[str, Counter[str]]:
        """How often the registry sent each blob, whole or not, to each place that processes have their links at."""
        sent = defaultdict[str, Counter[str]](Counter)
        for each in self._registry.answers():
            if each.method == "GET" and each.status == 200 and "/blobs/" in each.path and each.written:
                sent[each.host][each.path.rpartition("/")[2]] += 1
        return sent

    def _start(
        self,
        host: Host,
        pair: tuple[str, str],
        *,
        fatal: int | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> ForkServerProcess:
        life = Life(self._links.open(host.rate), host.blobs)
        host.lives.append(life)
        catalog, told = host.data.with_suffix(".toml"), host.data.with_suffix(".json")
        settings = [
            "schema = 1",
            "build = false",
            f"registries = {json.dumps([f'{life.place}/{self._place}'])}",
            f"[trust]\nkeys = {json.dumps(self._keys)}",
        ]
        catalog.write_text("\n".join(settings))
        told.unlink(missing_ok=True)
        process = self._context.Process(
            target=work, args=(Order(host.data, catalog, *pair, record, fatal, told),), daemon=True
        )
        process.start()
        return process

    def _has_died(self, process: ForkServerProcess, host: Host) -> bool:
        """Waits for a process. Fails unless it did its work, or was killed."""
        process.join(PATIENCE)
        self._links.shut(host.lives[-1].place)
        assert process.exitcode in (0, -signal.SIGKILL), f"{host.data.name} failed: {process.exitcode}"
        if process.exitcode == 0:
            host.told = json.loads(host.data.with_suffix(".json").read_text())
            return False
        host.lives[-1].killed = True
        return True
