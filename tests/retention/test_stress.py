"""Eight processes do whatever comes to their mind on one data directory, and are killed at random.

Whoever holds something reads it again and again as long as it does: it is there, with the right bytes. Whoever is
refused is told so by an error of ours that fits. When all is released, a collection leaves nothing behind.
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import os
import random
import time
import traceback
from collections.abc import Callable
from io import TextIOBase
from pathlib import Path

from systemfiles import BootFiles, SystemFiles
from systemfiles.foundation.errors import (
    AssetInUse,
    LeaseNotFound,
    NotProvisioned,
    PinNotFound,
    SnapshotMismatch,
    SystemFilesError,
)
from systemfiles.foundation.paths import Paths
from tests.crowd import Crowd
from tests.retention.plain import Plain
from tests.retention.world import INITRDS, KERNELS, RELEASES, World

FULL = bool(os.environ.get("SYSTEMFILES_TEST_FULL"))
SECONDS = float(os.environ.get("SYSTEMFILES_STRESS_SECONDS", 600 if FULL else 60))
PROCESSES = 8
SEED = random.SystemRandom().getrandbits(32) if FULL else 20261121
PINS = ("one", "two", "three")


class Broken(Exception):
    """What must never be seen."""


class Worker:
    """One process: takes, holds, reads, gives back, and collects."""

    def __init__(self, here: World, data: Path, seed: int, out: TextIOBase) -> None:
        self.choose = random.Random(seed)
        self.name = f"worker-{seed}"
        self._here = here
        self._out = out
        self._system = here.system(data)
        self._known: list[BootFiles] = []
        self._held: dict[str, BootFiles] = {}  # by lease
        self._pinned: dict[str, BootFiles] = {}  # by pin, of this worker's own

    def work(self, until: float) -> None:
        while time.monotonic() < until:
            deed = self.choose.choices([*DEEDS], [weight for weight, _ in DEEDS.values()])[0]
            try:
                DEEDS[deed][1](self)
                line = "ok"
            except REFUSALS.get(deed, ()) as error:
                line = f"refused {type(error).__name__}"
            except SystemFilesError as error:
                line = f"broken {deed}: {type(error).__name__} {error}\n{traceback.format_exc()}"
            except Exception:
                line = f"broken {deed}: {traceback.format_exc()}"
            self._out.write(json.dumps([deed, line]) + "\n")
            self._look_at_what_is_held()

    def _look_at_what_is_held(self) -> None:
        for files in [*self._held.values(), *self._pinned.values()]:
            if self.choose.random() < 0.5:
                self._require_whole(files)

    def _require_whole(self, files: BootFiles) -> None:
        for file in (files.kernel, files.initrd):
            try:
                got = hashlib.sha256(file.path.read_bytes()).hexdigest()
            except OSError as error:
                got = str(error)
            if got != file.sha256:
                self._out.write(json.dumps(["look", f"broken {file.path} is held and not what it was: {got}"]) + "\n")

    # ── deeds ────────────────────────────────────────────────────────────────────────────────────────────────────

    def ensure(self) -> None:
        """With a holder of its own for each, so that it is known which lease was made."""
        holder = f"{self.name}-{self.choose.getrandbits(64)}"
        files = self._system.ensure(self.choose.choice(KERNELS), self.choose.choice(INITRDS), holder=holder)
        (lease,) = self._system.leases(holder)
        self._take(lease.id, files)

    def ensure_without_holder(self) -> None:
        self._known.append(self._system.ensure(self.choose.choice(KERNELS), self.choose.choice(INITRDS)))

    def update(self) -> None:
        self._known.append(self._here.update(self._system, self.choose.choice(RELEASES)))

    def acquire(self) -> None:
        if self._known:
            files = self.choose.choice(self._known)
            ttl = self.choose.choice([None, 600])
            self._take(self._system.acquire(files, holder=self.name, ttl=ttl).id, files)

    def renew(self) -> None:
        if self._held:
            self._system.renew(self.choose.choice([*self._held]), self.choose.choice([None, 600]))

    def release(self) -> None:
        while self._held:
            lease = self.choose.choice([*self._held])
            self._require_whole(self._held.pop(lease))
            self._system.release(lease)
            if self.choose.random() < 0.3:
                return

    def pin(self) -> None:
        """Under a name of this worker's own, or one for which all compete."""
        if not self._known:
            return
        files = self.choose.choice(self._known)
        if self.choose.random() < 0.5:
            self._system.pin(self.choose.choice(PINS), files)
            return
        name = f"{self.name}-{len(self._pinned)}"
        if name not in self._pinned:
            self._system.pin(name, files)
            self._pinned[name] = files
            self._require_whole(files)

    def unpin(self) -> None:
        if self._pinned and self.choose.random() < 0.5:
            name, files = self._pinned.popitem()
            self._require_whole(files)
            self._system.unpin(name)
            return
        self._system.unpin(self.choose.choice(PINS))

    def restore(self) -> None:
        for pin in self._system.pins():
            files = self._system.restore(pin.name, full=self.choose.random() < 0.3)
            restored = (files.kernel.sha256, files.initrd.content_sha256)
            # in the meantime somebody may have pinned something else under that name
            if pin in self._system.pins() and restored != (pin.kernel.sha256, pin.initrd.content_sha256):
                msg = f"{pin.name} was restored as something else"
                raise Broken(msg)

    def pull(self) -> None:
        self._system.image(self.choose.choice([*self._here.images, self._here.docker_image]))

    def delete(self) -> None:
        asset = f"kernel-{self.choose.choice(KERNELS)}-x86_64"
        self._system.keeper.collector.delete(asset)

    def resolve(self) -> None:
        self._system.resolve(self.choose.choice(KERNELS), self.choose.choice(INITRDS))

    def collect(self) -> None:
        most = self.choose.choice([None, 0, 100_000])
        collected = self._system.collect(grace=0, keep_last=0, max_cache_bytes=most)
        for problem in collected.problems:
            raise problem

    def tell(self) -> None:
        self._system.collect(dry_run=True, grace=0)
        self._system.usage()

    def _take(self, lease: str, files: BootFiles) -> None:
        self._held[lease] = files
        self._known.append(files)
        del self._known[:-20]
        self._require_whole(files)


DEEDS: dict[str, tuple[int, Callable[[Worker], None]]] = {
    "ensure": (20, Worker.ensure),
    "ensure without holder": (10, Worker.ensure_without_holder),
    "update": (4, Worker.update),
    "acquire": (20, Worker.acquire),
    "renew": (5, Worker.renew),
    "release": (20, Worker.release),
    "pin": (10, Worker.pin),
    "unpin": (10, Worker.unpin),
    "restore": (4, Worker.restore),
    "pull": (6, Worker.pull),
    "delete": (6, Worker.delete),
    "resolve": (6, Worker.resolve),
    "collect": (10, Worker.collect),
    "tell": (3, Worker.tell),
}
REFUSALS: dict[str, tuple[type[SystemFilesError], ...]] = {
    # what is known of may have been collected since, and a pin that all compete for may hold something else
    "acquire": (NotProvisioned,),
    "pin": (NotProvisioned, SnapshotMismatch),
    "unpin": (PinNotFound,),
    "restore": (PinNotFound,),
    "delete": (AssetInUse,),
    "resolve": (NotProvisioned,),
    "renew": (LeaseNotFound,) if SECONDS > 500 else (),  # of those that end after 600 s
    "release": (LeaseNotFound,) if SECONDS > 500 else (),
}


def work(here: World, data: Path, seed: int, until: float, log: Path) -> None:
    logging.disable(logging.WARNING)
    os.environ["no_proxy"] = "127.0.0.1"
    with log.open("a", buffering=1) as out:
        Worker(here, data, seed, out).work(until)


def test_what_anybody_holds_is_there_as_long_as_he_holds_it(here: World, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    choose = random.Random(SEED)
    crowd = Crowd(work, here, tmp_path, seed=SEED, seconds=SECONDS)
    Paths(crowd.data).system.mkdir(parents=True)  # whoever comes first may want to collect
    crowd.start(PROCESSES)
    while time.monotonic() < crowd.until - 2:
        time.sleep(min(choose.uniform(0.2, 3), max(0.0, crowd.until - 2 - time.monotonic())))
        crowd.replace()
    crowd.end()

    told = collections.defaultdict[str, collections.Counter[str]](collections.Counter)
    for deed, result in crowd.lines():
        told[deed][result] += 1
    for deed, results in sorted(told.items()):
        print(f"{deed}: {', '.join(f'{count} {result[:60]}' for result, count in results.most_common())}")
    assert [line for results in told.values() for line in results if line.startswith("broken")] == []
    assert {deed for deed, results in told.items() if results["ok"]} >= DEEDS.keys()
    _assert_nothing_is_left(here, crowd.data)


def _assert_nothing_is_left(here: World, data: Path) -> None:
    """Once all is released, only what the profiles name."""
    system, plain = here.system(data, clock=lambda: time.time() + 60), Plain(data)
    for name, assets in plain.pins().items():
        assert assets <= plain.things().keys(), f"{name} holds what is not there"
        system.unpin(name)
    for holder in {lease.holder for lease in system.leases()}:
        system.release_all(holder)
    for path in [*(data / "tmp").iterdir(), *data.rglob(".systemfiles-new-*")]:
        os.utime(path, (0, 0))  # the dead left it, and it is old by now
    _collect(system)
    things = plain.things()
    assert things.keys() <= plain.current()
    assert [problem for thing in things.values() for problem in plain.damage(thing)] == []
    assert plain.located().keys() == things.keys()
    assert plain.orphans() == set()
    assert [*plain.idle_names()] == []
    assert plain.rows("SELECT id FROM tombstones") == []
    assert plain.rows("SELECT id FROM asset_leases") == []
    assert [*(data / "tmp").iterdir()] == []
    assert system.verify().problems == ()


def _collect(system: SystemFiles) -> None:
    collected = system.collect(grace=0, keep_last=0, max_cache_bytes=0)
    assert collected.problems == ()
