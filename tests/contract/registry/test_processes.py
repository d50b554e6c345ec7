"""Many processes, threads and forks on one database: nothing is lost, and nobody hears of a lock."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT
from tests.contract.registry.support import PATIENCE, STORE, Base, Running, World, asset, python

ROUNDS = 200 if os.environ.get("SYSTEMFILES_TEST_FULL") else 20
_SPAWN = multiprocessing.get_context("spawn")


def _write(base: Base, name: str) -> None:
    world = World(base)
    for number in range(ROUNDS):
        id = f"{name}-{number}"
        world.assets.register(asset(id), store_id=STORE, path=id)
        kept = world.leases.acquire(["shared", id], f"vm-{name}", now=1000, ttl=60, store_id=STORE)
        world.leases.release(world.leases.acquire([id], "short", now=1000).id, now=1000)
        world.leases.renew(kept.id, now=1001, ttl=60)
        world.assets.get("shared", now=1000 + number)
        world.assets.update("shared", now=1000, build_id=id)  # which reads before it writes


@pytest.mark.parametrize("processes", [4, 8])
def test_processes_that_write_at_once_lose_nothing(world: World, processes: int) -> None:
    world.add("shared")
    workers = [_SPAWN.Process(target=_write, args=(world.base, f"p{number}")) for number in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE * 4)
    assert [worker.exitcode for worker in workers] == [0] * processes
    assert world.assets.get("shared", now=1, access=False).reference_count == processes * ROUNDS
    assert len(world.ids()) == processes * ROUNDS + 1
    assert {lease.expires_at for lease in world.leases.list(now=1000)} == {1061}
    assert world.lease_rows() == 2 * processes * ROUNDS


def test_threads_that_write_at_once_lose_nothing(world: World) -> None:
    world.add("shared")

    def work() -> None:
        for turn in range(ROUNDS):
            world.leases.acquire(["shared"], f"vm-{turn}", now=1000)

    for running in [Running(work) for _ in range(8)]:
        running.result()
    assert world.assets.get("shared", now=1, access=False).reference_count == 8 * ROUNDS


def test_a_thread_that_ends_leaves_no_connection(world: World) -> None:
    def connections() -> int:
        if world.base.kind == "sqlite":
            return sum(fd.resolve() == world.base.file for fd in Path("/proc/self/fd").iterdir())
        found = world.base.sql("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
        return int(found[0][0])

    world.leases.list(now=1)
    before = connections()
    for _ in range(10):
        Running(lambda: world.leases.list(now=1)).result()
    kept = world.base.kind == "sqlite"  # one file descriptor, which SQLite gives to the next one
    deadline = time.monotonic() + PATIENCE
    while connections() > before + kept and time.monotonic() < deadline:
        time.sleep(0.05)
    assert connections() <= before + kept


_ACQUIRE_AND_WAIT = """
import sys
from systemfiles.registry.leases import Leases
from tests.contract.registry.support import Base
leases = Leases(Base(*sys.argv[1:3]).open())
while True:
    print(leases.acquire(["a"], "vm-1", now=1000).id, flush=True)
"""


def test_what_was_acquired_is_there_though_its_process_was_killed_at_once(world: World) -> None:
    world.add("a")
    words = [sys.executable, "-c", _ACQUIRE_AND_WAIT, world.base.kind, world.base.url]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as process:
        assert process.stdout is not None
        told = [process.stdout.readline().strip() for _ in range(5)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read().splitlines()  # a line that was cut off is not told
    listed = {lease.id for lease in world.leases.list(now=1000)}
    assert {line for line in told if len(line) == 26} <= listed
    world.leases.acquire(["a"], "vm-2", now=1000)


def test_a_process_that_is_killed_in_a_transaction_leaves_nothing_of_it(world: World) -> None:
    world.add("a")
    script = """
import os, sys, time
from systemfiles.registry.leases import Leases
from tests.contract.registry.support import Base, Standing
standing = Standing(Base(*sys.argv[1:3]).open())
class Printing:
    def set(self): print("reached", flush=True)
standing.reached = Printing()
Leases(standing.database).acquire(["a"], "vm-1", now=1000)
"""
    words = [sys.executable, "-c", script, world.base.kind, world.base.url]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reached\n"
        process.send_signal(signal.SIGKILL)
    assert world.leases.list(now=1000) == ()
    assert len(world.tombstones.delete("a", now=1000)) == 1


# ── fork ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

_FORK = """
import os, sys
from systemfiles.registry.leases import Leases
from tests.contract.registry.support import Base
database = Base(*sys.argv[1:3]).open()
leases = Leases(database)
leases.acquire(["a"], "parent", now=1000)
to_child, to_parent = os.pipe(), os.pipe()
child = os.fork()
if not child:
    leases.acquire(["a"], "child-1", now=1000)
    os.write(to_parent[1], b"x")
    os.read(to_child[0], 1)
    leases.acquire(["a"], "child-2", now=1000)
    os._exit(0)
os.read(to_parent[0], 1)
leases.acquire(["a"], "parent-2", now=1000)
database.close()  # as at the end of the parent
os.write(to_child[1], b"x")
assert os.waitpid(child, 0)[1] == 0
leases.acquire(["a"], "parent-3", now=1000)
"""


def test_what_a_forked_child_commits_is_not_lost_when_its_parent_ends(world: World) -> None:
    world.add("a")
    world.database.close()
    done = python(_FORK, world.base.kind, world.base.url)
    assert done.returncode == 0, done.stderr
    holders = {lease.holder for lease in world.leases.list(now=1000)}
    assert holders == {"parent", "parent-2", "parent-3", "child-1", "child-2"}


_FORK_AMONG_THREADS = """
import os, sys, threading
from systemfiles.registry.leases import Leases
from tests.contract.registry.support import Base
leases = Leases(Base(*sys.argv[1:3]).open())
ended = threading.Event()
def work(name):
    number = 0
    while not ended.is_set():
        leases.acquire(["a"], f"{name}-{number}", now=1000)
        number += 1
    counts.append(number)
counts = []
threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(4)]
for thread in threads:
    thread.start()
children = []
for number in range(12):
    child = os.fork()
    if not child:
        leases.acquire(["a"], f"child-{number}", now=1000)
        os._exit(0)
    children.append(child)
failed = [child for child in children if os.waitpid(child, 0)[1]]
ended.set()
for thread in threads:
    thread.join()
assert not failed
print(sum(counts) + len(children))
"""


def test_forks_among_threads_that_write_lose_nothing(world: World) -> None:
    world.add("a")
    world.database.close()
    done = python(_FORK_AMONG_THREADS, world.base.kind, world.base.url)
    assert done.returncode == 0, done.stderr
    assert world.assets.get("a", now=1, access=False).reference_count == int(done.stdout)


_POOL = """
import multiprocessing, sys
from systemfiles.registry.leases import Leases
from tests.contract.registry.support import Base
leases = Leases(Base(*sys.argv[1:3]).open())
def acquire(number):
    return leases.acquire(["a"], f"vm-{number}", now=1000).id
first = acquire(0)
with multiprocessing.get_context("fork").Pool(4) as pool:
    ids = [first, *pool.map(acquire, range(1, 40))]
print(*ids)
"""


def test_a_pool_of_forked_workers_may_use_what_its_parent_has_open(world: World) -> None:
    world.add("a")
    world.database.close()
    done = python(_POOL, world.base.kind, world.base.url)
    assert done.returncode == 0, done.stderr
    assert {lease.id for lease in world.leases.list(now=1000)} == {*done.stdout.split()}


def test_programs_that_are_started_inherit_nothing(world: World) -> None:
    world.add("a")
    world.database.close()
    before = _open_files()
    world.leases.acquire(["a"], "vm", now=1)
    assert _open_files() == before


def _open_files() -> int:
    """How many files a program has that was started with whatever can be inherited."""
    words = [sys.executable, "-c", "import os; print(len(os.listdir('/proc/self/fd')))"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, close_fds=False)
    return int(done.stdout)
