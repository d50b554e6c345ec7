"""Whatever is done in whatever order, and wherever it is killed: what is held is there, and what is not held goes.

The model is plain: who holds what, in a few dictionaries. What is on the disk and in the registry is read with the
standard library (plain.py), and the clock is set by hand.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from systemfiles import BootFiles, SystemFiles
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import (
    AssetInUse,
    LeaseNotFound,
    LeasesLost,
    NotProvisioned,
    PinNotFound,
    SnapshotMismatch,
)
from tests.retention.crash import killed_at
from tests.retention.plain import BASE, MANAGED, REF_NAME, SOURCE, Plain, Thing, listing
from tests.retention.world import (
    ARM,
    DAY,
    INITRDS,
    KERNELS,
    RELEASES,
    X86,
    World,
    forget_name,
    name_as_others,
    put_foreign_image,
    world,
)

FULL = bool(os.environ.get("SYSTEMFILES_TEST_FULL"))
EXAMPLES, STEPS = (1000, 80) if FULL else (30, 40)
T = TypeVar("T")
_SHARED_MEMORY = Path("/dev/shm")
_AHEAD = 100  # seconds by which the clock is ahead of the disk's, more than an example takes
GRACES = st.sampled_from([0, 0, 1000])  # none of which the steps of the clock come near to
NAMES = st.sampled_from(["one", "two"])
PICK = st.integers(
    0, 59
)  # one of what there is then; drawing from that itself would depend on how far a kill let it come
HOLDERS = st.sampled_from(["vm-1", "vm-2", "vm-3"])


@dataclass
class Lease:
    """What the model knows of one."""

    holder: str
    assets: set[str]
    expires: int | None
    whole: bool = True  # as long as nothing was taken from it by force


class Retention(RuleBasedStateMachine):
    """One data directory, and what must hold there."""

    world: World
    scratch: Path
    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.data = self.scratch / f"data-{next(self.numbers)}"
        self.plain = Plain(self.data)
        self.now = int(time.time()) + _AHEAD
        self.leases: dict[str, Lease] = {}
        self.pins: dict[str, set[str]] = {}
        self.records: dict[str, BootFiles] = {}  # of what was ever provided, by its pair of versions
        self.known: dict[str, dict[str, str]] = {}  # by asset, the digests of its files when it was first seen
        self.foreign: set[str] = set()  # names that another tool gave
        self.lost = False
        self.counts_hold = True
        self.system = self.at(X86)

    def teardown(self) -> None:
        self.system.holdings.registry.close()
        shutil.rmtree(self.data, ignore_errors=True)

    def at(self, arch: Arch) -> SystemFiles:
        return self.world.system(self.data, clock=lambda: self.now, arch=arch)

    @initialize()
    def provide_the_defaults(self) -> None:
        self._remember(self.system.ensure())

    # ── what people do ───────────────────────────────────────────────────────────────────────────────────────────

    @rule()
    def reopen(self) -> None:
        """Another process goes on."""
        self.system.holdings.registry.close()
        self.system = self.at(X86)

    @rule(seconds=st.sampled_from([7, 7, 2 * DAY]))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule(
        kernel=st.sampled_from(KERNELS),
        initrd=st.sampled_from(INITRDS),
        arch=st.sampled_from([X86, X86, ARM]),
        holder=st.none() | HOLDERS,
    )
    def ensure(self, kernel: str, initrd: str, arch: Arch, holder: str | None) -> None:
        system = self.at(arch)
        before = {lease.id for lease in system.leases()}
        files = system.ensure(kernel, initrd, holder=holder)
        self._remember(files)
        if holder:
            held = [
                lease
                for lease in self.leases.values()
                if lease.holder == holder and lease.expires is None and _ids(files) <= lease.assets
            ]
            new = [lease for lease in system.leases() if lease.id not in before]
            assert len(new) == (not held)
            self.leases |= {lease.id: Lease(holder, _ids(files), None) for lease in new}
        system.holdings.registry.close()

    @rule(release=st.sampled_from(RELEASES))
    def update(self, release: str) -> None:
        self._remember(self.world.update(self.system, release))

    @rule(pick=PICK, holder=HOLDERS, ttl=st.sampled_from([None, 5, 20]))
    def acquire(self, pick: int, holder: str, ttl: int | None) -> None:
        files = self._some(pick)
        if _ids(files) <= self.plain.things().keys():
            lease = self.system.acquire(files, holder=holder, ttl=ttl)
            self.leases[lease.id] = Lease(holder, _ids(files), None if ttl is None else self.now + ttl)
            return
        with pytest.raises(NotProvisioned):
            self.system.acquire(files, holder=holder, ttl=ttl)

    @rule(pick=PICK, ttl=st.sampled_from([None, 20]))
    def renew(self, pick: int, ttl: int | None) -> None:
        if not self.leases:
            return
        lease_id = _one(sorted(self.leases), pick)
        lease = self.leases[lease_id]
        if self._is_live(lease) and lease.whole:
            self.system.renew(lease_id, ttl)
            lease.expires = None if ttl is None else self.now + ttl
            return
        with pytest.raises(LeaseNotFound):
            self.system.renew(lease_id, ttl)

    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        if not self.leases:
            return
        lease_id = _one(sorted(self.leases), pick)
        with contextlib.nullcontext() if self._is_live(self.leases[lease_id]) else pytest.raises(LeaseNotFound):
            self.system.release(lease_id)
            self._assert_used_until_now(self.leases[lease_id].assets)
        del self.leases[lease_id]

    @rule(holder=HOLDERS)
    def release_all(self, holder: str) -> None:
        live = [key for key, lease in self.leases.items() if lease.holder == holder and self._is_live(lease)]
        assert self.system.release_all(holder) == len(live)
        for key in live:
            self._assert_used_until_now(self.leases.pop(key).assets)

    @rule(pick=PICK, name=NAMES)
    def pin(self, pick: int, name: str) -> None:
        files = self._some(pick)
        if not _ids(files) <= self.plain.things().keys():
            with pytest.raises(NotProvisioned):
                self.system.pin(name, files)
        elif self.pins.get(name, _ids(files)) != _ids(files):
            with pytest.raises(SnapshotMismatch):
                self.system.pin(name, files)
        else:
            self.system.pin(name, files)
            self.pins[name] = _ids(files)

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        with contextlib.nullcontext() if name in self.pins else pytest.raises(PinNotFound):
            self.system.unpin(name)
            self._assert_used_until_now(self.pins[name] if self.counts_hold else set())
        self.pins.pop(name, None)

    @rule(number=st.integers(0, 4))
    def pull(self, number: int) -> None:
        reference = [*self.world.images, self.world.docker_image][number]
        assert all(layer.exists() for layer in self.system.image(reference).layers)

    @rule(number=st.integers(0, 1))
    def another_tool_brings_an_image(self, number: int) -> None:
        name = f"theirs-{number}"
        if name not in self.foreign:
            put_foreign_image(self.data, name, name.encode())
            self.foreign.add(name)

    @rule(pick=PICK)
    def another_tool_names_what_is_ours(self, pick: int) -> None:
        ours = [entry for entry in self.plain.entries() if MANAGED in entry["annotations"]]
        if ours and "copy" not in self.foreign:
            entry = _one(ours, pick)
            name_as_others(self.data, "copy", entry["digest"].removeprefix("sha256:"), entry["size"])
            self.foreign.add("copy")

    @rule(pick=PICK)
    def another_tool_drops_its_name(self, pick: int) -> None:
        if not self.foreign:
            return
        name = _one(sorted(self.foreign), pick)
        forget_name(self.data, name)
        self.foreign.remove(name)

    @rule(pick=PICK, force=st.booleans())
    def delete(self, pick: int, force: bool) -> None:
        asset = _one(sorted(self.known), pick)
        collector = self.system.keeper.collector
        indexed = self._live_leases_of(asset)
        if indexed and not force:
            with pytest.raises(AssetInUse):
                collector.delete(asset)
            return
        had_row = asset in self.plain.located()
        collector.delete(asset, force=force)
        for lease in self.leases.values():
            lease.whole = lease.whole and asset not in lease.assets
            lease.assets.discard(asset)
        if had_row and not self._pins_of(asset):
            assert asset not in self.plain.things() or asset in self._named_by_others()
        self.counts_hold = self.counts_hold and not self._pins_of(asset)

    @rule(grace=GRACES, keep_last=st.sampled_from([0, 0, 1]), max_cache_bytes=st.sampled_from([None, None, 0]))
    def collect(self, grace: int, keep_last: int, max_cache_bytes: int | None) -> None:
        collect = functools.partial(
            self.system.collect, grace=grace, keep_last=keep_last, max_cache_bytes=max_cache_bytes
        )
        if self.lost:
            for dry_run in (True, False):
                with pytest.raises(LeasesLost):
                    collect(dry_run=dry_run)
            self.system.collect(accept_lost_leases=True, grace=10**9)
            self.lost = False
        self.system.holdings.registry.close()
        before = listing(self.data)
        foretold = collect(dry_run=True)
        assert listing(self.data) == before
        stays = self._stays(self.now - grace, keep_last)
        collected = collect()
        assert collected.problems == ()
        self._assert_collected(stays, self.now - grace, evicted=max_cache_bytes == 0)
        assert Counter(map(str, foretold.gone)) == Counter(map(str, collected.gone))
        assert foretold.bytes_freed == collected.bytes_freed
        self.counts_hold = True

    @rule()
    def the_registry_is_lost(self) -> None:
        self.system.holdings.registry.close()
        self.lost = True
        for path in self.data.glob("registry.sqlite*"):
            path.unlink()
        self.leases.clear()
        self.counts_hold = False
        self.reopen()

    # ── what is killed ───────────────────────────────────────────────────────────────────────────────────────────

    @rule(n=st.integers(1, 150), grace=GRACES)
    def a_collection_is_killed(self, n: int, grace: int) -> None:
        self._killed(n, lambda system: system.collect(grace=grace, keep_last=0, max_cache_bytes=0))

    @rule(n=st.integers(1, 150), kernel=st.sampled_from(KERNELS), initrd=st.sampled_from(INITRDS))
    def ensuring_is_killed(self, n: int, kernel: str, initrd: str) -> None:
        self._killed(n, lambda system: system.ensure(kernel, initrd, holder="killed"))

    @rule(n=st.integers(1, 200), release=st.sampled_from(RELEASES))
    def an_update_is_killed(self, n: int, release: str) -> None:
        self._killed(n, lambda system: self.world.update(system, release))

    @rule(n=st.integers(1, 30), pick=PICK, name=NAMES)
    def pinning_is_killed(self, n: int, pick: int, name: str) -> None:
        files = self._some(pick)
        self._killed(n, lambda system: system.pin(name, files))

    @rule(n=st.integers(1, 20), name=NAMES)
    def unpinning_is_killed(self, n: int, name: str) -> None:
        self._killed(n, lambda system: system.unpin(name))

    @rule(n=st.integers(1, 20), pick=PICK)
    def acquiring_is_killed(self, n: int, pick: int) -> None:
        files = self._some(pick)
        self._killed(n, lambda system: system.acquire(files, holder="killed"))

    @rule(n=st.integers(1, 40), pick=PICK)
    def deleting_is_killed(self, n: int, pick: int) -> None:
        asset = _one(sorted(self.known), pick)
        self._killed(n, lambda system: system.keeper.collector.delete(asset))

    @rule(n=st.integers(1, 150), number=st.integers(0, 3))
    def pulling_is_killed(self, n: int, number: int) -> None:
        self._killed(n, lambda system: system.image(self.world.images[number]))

    # ── what must hold after each step ───────────────────────────────────────────────────────────────────────────

    @invariant()
    def what_is_held_is_there_and_whole(self) -> None:
        things = self.plain.things()
        for asset in self._held():
            assert asset in things, f"{asset} is held, and gone"
            assert [*self.plain.damage(things[asset])] == []

    @invariant()
    def a_version_is_for_ever_the_same(self) -> None:
        for asset, thing in self.plain.things().items():
            assert self.known.setdefault(asset, thing.files) == thing.files

    @invariant()
    def no_row_is_without_its_file(self) -> None:
        for asset, path in self.plain.located().items():
            assert (self.data / path / "artifact.json").exists(), f"{asset} has a row, and no files"

    @invariant()
    def the_registry_counts_right(self) -> None:
        for asset in self.plain.located() if self.counts_hold else ():
            found = self.system.holdings.registry.assets.get(asset, now=self.now, access=False)
            assert found.reference_count == self._live_leases_of(asset)

    @invariant()
    def names_of_others_stay(self) -> None:
        names = {entry["annotations"][REF_NAME] for entry in self.plain.entries() if not _is_ours(entry)}
        assert names == self.foreign
        for entry in self.plain.entries():
            if not _is_ours(entry):
                assert self.plain.reached(entry) <= {path.name for path in self.plain.blobs.iterdir()}

    # ── the model ────────────────────────────────────────────────────────────────────────────────────────────────

    def _assert_used_until_now(self, assets: set[str]) -> None:
        accessed = self.plain.accessed()
        assert all(accessed[asset] >= self.now for asset in assets)

    def _remember(self, files: BootFiles) -> None:
        assert files.kernel.path.read_bytes()
        assert hashlib.sha256(files.initrd.path.read_bytes()).hexdigest() == files.initrd.sha256
        self.records[" ".join(sorted(_ids(files)))] = files

    def _some(self, pick: int) -> BootFiles:
        return self.records[_one(sorted(self.records), pick)]

    def _is_live(self, lease: Lease) -> bool:
        return bool(lease.assets) and (lease.expires is None or lease.expires > self.now)

    def _pins_of(self, asset: str) -> int:
        return sum(asset in assets for assets in self.pins.values())

    def _live_leases_of(self, asset: str) -> int:
        """How many the registry has, those that stand for pins among them."""
        if not self.counts_hold:
            (count,) = (
                self.plain.rows(
                    "SELECT count(*) FROM asset_leases WHERE asset_id = ? AND coalesce(expires_at, ?) > ?",
                    *(asset, self.now + 1, self.now),
                )[0]
                if (self.data / "registry.sqlite").exists() and self.plain.located()
                else (0,)
            )
            return int(count)
        return sum(asset in lease.assets and self._is_live(lease) for lease in self.leases.values()) + self._pins_of(
            asset
        )

    def _held(self) -> set[str]:
        held = [lease.assets for lease in self.leases.values() if self._is_live(lease)]
        return set[str]().union(*held, *self.pins.values())

    def _named_by_others(self) -> set[str]:
        reached = {name for entry in self.plain.entries() if not _is_ours(entry) for name in self.plain.reached(entry)}
        return {asset for asset, thing in self.plain.things().items() if {*thing.files.values()} & reached}

    def _stays(self, young: int, keep_last: int) -> set[str]:
        """What a collection must leave, and no more than that."""
        things, accessed = self.plain.things(), self.plain.accessed()
        stays = (self._held() | self.plain.current() | self._named_by_others()) & things.keys()
        for asset, thing in things.items():
            if max(accessed.get(asset, 0), _seconds(thing.made)) > young:
                stays.add(asset)
        for group in _groups(things):
            stays |= {thing.id for thing in group[len(group) - keep_last :]} if keep_last else set()
        for asset in [*stays]:
            if requires := things[asset].requires:
                stays.add(f"kernel-{requires}-{things[asset].arch}")
        return stays & things.keys()

    def _assert_collected(self, stays: set[str], young: int, *, evicted: bool) -> None:
        assert self.plain.things().keys() == stays
        assert self.plain.located().keys() == stays
        assert self.plain.rows("SELECT * FROM tombstones") == []
        directories = {path for kind in ("kernel", "initrd") for path in (self.data / "system" / kind).glob("*/*")}
        finished = {thing.directory for thing in self.plain.things().values()}
        assert {
            path for path in directories - finished if int(path.stat().st_mtime) <= young
        } - self._unfinished() == set()
        old = {name for name in self.plain.orphans() if int((self.plain.blobs / name).stat().st_mtime) <= young}
        assert old == set()
        written = {entry["annotations"][REF_NAME]: entry["digest"] for entry in self.plain.entries()}
        for name in self.plain.idle_names():
            blob = self.plain.blobs / written[name].removeprefix("sha256:")
            excused = name in self._held() | self.plain.current() | {asset for asset, _ in self._young_rows(young)}
            assert excused or int(blob.stat().st_mtime) > young, f"{name} holds nothing"
        if evicted and young >= self.now - 1:
            images = [e["annotations"] for e in self.plain.entries() if _is_ours(e) and SOURCE in e["annotations"]]
            assert [told for told in images if BASE not in told] == []

    def _young_rows(self, young: int) -> Iterator[tuple[str, int]]:
        return ((asset, used) for asset, used in self.plain.accessed().items() if used > young)

    def _unfinished(self) -> set[Path]:
        """Directories of what is kept although nothing is there: the current versions."""
        return {
            path
            for kind in ("kernel", "initrd")
            for path in (self.data / "system" / kind).glob("*/*")
            if f"{kind}-{path.parent.name}-{path.name}" in self.plain.current() | self._held()
        }

    def _killed(self, n: int, body: Callable[[SystemFiles], object]) -> None:
        """Another process does that, is killed, and the model finds out how far it came."""
        self.system.holdings.registry.close()
        killed_at(n, functools.partial(body, self.at(X86)))
        self._age()
        self.reopen()
        self.pins = self.plain.pins()
        for lease in self.system.leases("killed"):
            self.leases.setdefault(lease.id, Lease("killed", {*lease.asset_ids}, lease.expires_at))
        self.counts_hold = False

    def _age(self) -> None:
        """Lets time pass: what the dead left is no longer fresh."""
        for path in [*(self.data / "tmp").glob("*"), *self.data.rglob(".systemfiles-new-*")]:
            os.utime(path, (0, 0))


def _one(those: Sequence[T], pick: int) -> T:
    return those[pick % len(those)]


def _ids(files: BootFiles) -> set[str]:
    return {f"kernel-{files.kernel.version}-{files.kernel.arch}", f"initrd-{files.initrd.version}-{files.initrd.arch}"}


def _is_ours(entry: dict[str, dict[str, str]]) -> bool:
    return MANAGED in entry["annotations"]


def _seconds(told: str) -> int:
    return int(time.mktime(time.strptime(told, "%Y-%m-%dT%H:%M:%SZ"))) - time.timezone


def _groups(things: dict[str, Thing]) -> Iterator[list[Thing]]:
    """By kind and architecture, oldest first."""
    for key in {(thing.kind, thing.arch) for thing in things.values()}:
        group = [thing for thing in things.values() if (thing.kind, thing.arch) == key]
        yield sorted(group, key=lambda thing: (thing.made, thing.version))


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    # memory is as good as a disk to a process that dies, and faster
    place = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="systemfiles-retention-", dir=place))
    yield root
    shutil.rmtree(root)


def test_what_is_held_stays_and_nothing_else_whatever_happens(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with world(scratch / "world") as here:
        Retention.world, Retention.scratch = here, scratch
        run_state_machine_as_test(
            Retention,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                derandomize=not FULL,
                database=None,
                deadline=None,
                phases=(Phase.generate,),  # shrinking what has many steps takes longer than reading them
                report_multiple_bugs=False,
                print_blob=True,
                suppress_health_check=tuple(HealthCheck),
            ),
        )
