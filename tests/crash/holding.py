"""What is stopped of leases, pins, collections and the registry, and the directories that these start from.

In `held` one pair is current, another is leased, a third pinned, and a kernel named by another tool; nothing holds
k-gone, k-doomed, i-gone and an asset's file. `messy` has, besides, what killed runs leave: tombstones, blobs that
nothing reaches, half an artifact, something temporary.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from systemfiles import SystemFiles
from systemfiles.foundation.errors import PinNotFound
from systemfiles.foundation.paths import Paths
from systemfiles.registry.assets import Asset, AssetType
from systemfiles.registry.registry import open_database
from systemfiles.registry.schema import upgrade
from tests.crash.checker import Goes
from tests.crash.ledger import DATABASE, LATER
from tests.crash.running import Run, Scenario, calling, promised
from tests.crash.world import ARCH, REF_NAME, World, add_foreign_image, copy_data_dir

TENANT, VM = "vm-1", "vm-9"
"""Who holds something from the beginning, and who comes."""
SNAPSHOT, LATER_SNAPSHOT = "snapshot-1", "snapshot-2"
_HYPERVISOR = "v49.0"
_BUSY_SECONDS = 0.5
_DISKS = {name: f"disks/{name}.img" for name in ("disk-held", "disk-gone", "disk-doomed")}


def _artifacts(*versions: str) -> frozenset[str]:
    """The directories and names of kernels and initrds, and the names of initrds' base images."""
    patterns = ("system/*/{}/*", "name *-{}-x86_64", "name *busybox-{}:*")
    return frozenset(pattern.format(version) for version in versions for pattern in patterns)


_PINNED = _artifacts("k-pinned", "i-pinned")
_LEASED = _artifacts("k-leased", "i-leased") | {f"lease {TENANT}"}
_UNHELD = Goes(_artifacts("k-gone", "k-doomed", "i-gone") | {_DISKS["disk-gone"], _DISKS["disk-doomed"]}, blobs=True)
"""What any collection in `held` removes."""


def busy(body: Callable[[Run], None]) -> Callable[[Run], int]:
    """Does not wait as long for SQLite's locks as others do: a file system that has lost them will never have them."""

    def run(run: Run) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("systemfiles.registry.sqlite.BUSY_SECONDS", _BUSY_SECONDS)
            body(run)

    return calling(run)


def _open(run: Run) -> None:
    assert run.system().leases() == ()
    promised("store")


def _migrate(run: Run) -> None:
    upgrade(open_database(Paths(run.data)), migrations=run.world.root / "migrations")
    promised("version", LATER)


def _lease(run: Run) -> None:
    """What the owner of a VM does that begins anew."""
    system = run.system("pinned")
    system.release_all(VM)
    files = system.resolve("pinned-1", "plain")
    lease = system.lease(files, holder=VM)
    promised("lease", lease.id)
    with system.acquire(files, holder=VM, ttl=3600) as other:
        other.renew(7200)
    promised("ended", other.id)


def _ensure(run: Run) -> None:
    run.system("pinned").ensure("k-new", "i-leased", holder=VM)
    promised("holder", VM)


def _pin(run: Run) -> None:
    system = run.system("pinned")
    system.pin(LATER_SNAPSHOT, system.resolve("k-leased", "i-leased"), labels={"vm": TENANT})
    promised("pin", LATER_SNAPSHOT)


def _pin_again(run: Run) -> None:
    system = run.system("pinned")
    system.pin(SNAPSHOT, system.resolve("k-pinned", "i-pinned"), hypervisor=_HYPERVISOR)
    promised("pin", SNAPSHOT)


def _unpin(run: Run) -> None:
    with contextlib.suppress(PinNotFound):  # of a run that was killed when it had done it
        run.system().unpin(SNAPSHOT)
    promised("unpinned", SNAPSHOT)


def _restore(run: Run) -> None:
    run.system("pinned").restore(SNAPSHOT, hypervisor=_HYPERVISOR, full=True)


def _collect(run: Run, *, max_cache_bytes: int | None = None, accept_lost_leases: bool = False) -> None:
    found = run.system("pinned").collect(
        grace=0, keep_last=0, max_cache_bytes=max_cache_bytes, accept_lost_leases=accept_lost_leases
    )
    for problem in found.problems:
        raise problem
    promised("collected")


def _evict(run: Run) -> None:
    _collect(run, max_cache_bytes=1)


def _collect_lost(run: Run) -> None:
    _collect(run, accept_lost_leases=True)


COLLECT = Scenario("collection", "", busy(_collect))
"""What runs after others: whatever became of them, it ends well."""


def scenarios() -> Iterator[Scenario]:
    yield Scenario("registry", "used", busy(_open), unheld=Goes())
    yield Scenario("migrate", "held", busy(_migrate))
    yield Scenario("lease-anew", "unregistered", busy(_lease), unheld=Goes(blobs=True))
    yield Scenario("lease", "held", busy(_lease), unheld=_UNHELD)
    yield Scenario("ensure-held", "held", busy(_ensure), unheld=_UNHELD)
    yield Scenario("pin", "unpinned", busy(_pin), unheld=_UNHELD | Goes(_PINNED))
    yield Scenario("pin-again", "held", busy(_pin_again), unheld=_UNHELD)
    unpinned = Goes(_PINNED | {f"pin {SNAPSHOT}", f"lease pin:{SNAPSHOT}"})
    yield Scenario("unpin", "held", busy(_unpin), goes=unpinned, unheld=_UNHELD)
    yield Scenario("restore", "without-pinned", busy(_restore), lists=False, unheld=_UNHELD)
    yield Scenario("restore-nameless", "nameless", busy(_restore), lists=False, unheld=_UNHELD)
    evicted = _UNHELD | Goes(frozenset({"name *image:1*"}))
    yield Scenario("collect", "messy", busy(_evict), sweeps=True, goes=evicted)
    lost = _UNHELD | Goes(_LEASED)
    yield Scenario("collect-lost", "without-registry", busy(_collect_lost), sweeps=True, goes=lost)


# --- what they start from ---


def prepare(world: World, run: Callable[[Scenario, Path], None]) -> None:
    """Makes the prepared directories; `run` runs a scenario on a disk."""
    _write_migrations(world.root / "migrations")
    held = world.base("held") / "data"
    held.mkdir(parents=True)
    add_foreign_image(held)
    run(Scenario("hold", "", calling(_hold)), held.parent)
    _name_as_others(held)
    for name in ("messy", "unpinned", "without-pinned", "without-registry"):
        copy_data_dir(world.base("held"), world.base(name))
    run(Scenario("condemn", "", calling(_condemn)), world.base("messy"))
    _litter(world.base("messy") / "data")
    run(Scenario("unpin", "", calling(_unpin)), world.base("unpinned"))
    (world.base("unpinned") / "data" / "system" / "pins").rmdir()
    system = world.base("without-pinned") / "data" / "system"
    for directory in (system / "kernel" / "k-pinned", system / "initrd" / "i-pinned"):
        shutil.rmtree(directory)
    copy_data_dir(world.base("without-pinned"), world.base("nameless"))
    _forget(world.base("nameless") / "data", f"kernel-k-pinned-{ARCH}", f"initrd-i-pinned-{ARCH}")
    copy_data_dir(world.base("full"), world.base("unregistered"))
    (world.base("unregistered") / "data" / "system" / "store.json").unlink(missing_ok=True)
    for name in ("without-registry", "unregistered"):
        for path in (world.base(name) / "data").glob(f"{DATABASE}*"):
            path.unlink()


def _hold(run: Run) -> None:
    system = run.system("pinned")
    system.ensure()
    system.ensure("k-leased", "i-leased", holder=TENANT)
    system.pin(SNAPSHOT, system.ensure("k-pinned", "i-pinned"), hypervisor=_HYPERVISOR)
    for kernel, initrd in (("k-named", "plain"), ("k-gone", "i-gone"), ("k-doomed", "plain")):
        system.ensure(kernel, initrd)
    system.image(run.world.image)
    _register(system, run.data)
    system.provisioner().write_manifest()
    system.holdings.registry.close()


def _register(system: SystemFiles, data: Path) -> None:
    """Assets that are files of somebody else's, one of them held."""
    registry, now = system.holdings.registry, int(time.time())
    (data / "disks").mkdir()
    for name, path in _DISKS.items():
        (data / path).write_text(f"a disk: {name}")
        size, checksum = (data / path).stat().st_size, hashlib.sha256((data / path).read_bytes()).hexdigest()
        asset = Asset(name, name, AssetType.DISK_IMAGE, path, size, checksum, now, now)
        registry.assets.register(asset, store_id=registry.store_id, path=path)
    registry.leases.acquire(["disk-held"], TENANT, now=now, store_id=registry.store_id)


def _condemn(run: Run) -> None:
    registry = run.system().holdings.registry
    doomed = [f"kernel-k-doomed-{ARCH}", "disk-doomed"]
    assert len(registry.tombstones.condemn(doomed, reason="held by nothing", now=time.time())) == len(doomed)


def _litter(data: Path) -> None:
    """What killed runs, and other tools, leave."""
    blobs = data / "system" / "oci-cache" / "blobs" / "sha256"
    for content in (b"nobody's", b"nobody's either"):
        (blobs / hashlib.sha256(content).hexdigest()).write_bytes(content)
    begun = data / "system" / "kernel" / "k-begun" / ARCH
    begun.mkdir(parents=True)
    (begun / "vmlinux").write_bytes(b"half a kern")
    (data / "system" / "initrd" / "nothing").mkdir()
    work = data / "tmp" / f"work-{0:016x}"
    work.mkdir(parents=True)
    (work / "artifact").mkdir()
    (work / "artifact" / "vmlinux").write_bytes(b"a kernel that was to go")


def _name_as_others(data: Path) -> None:
    """Lets another tool refer to k-named, too."""
    path = data / "system" / "oci-cache" / "index.json"
    index = json.loads(path.read_text())
    (ours,) = (each for each in index["manifests"] if _name_of(each) == f"kernel-k-named-{ARCH}")
    index["manifests"].append({**ours, "annotations": {REF_NAME: "theirs:1"}})
    path.write_text(json.dumps(index))


def _forget(data: Path, *names: str) -> None:
    path = data / "system" / "oci-cache" / "index.json"
    index = json.loads(path.read_text())
    index["manifests"] = [each for each in index["manifests"] if _name_of(each) not in names]
    path.write_text(json.dumps(index))


def _name_of(entry: dict[str, dict[str, str]]) -> str | None:
    return (entry.get("annotations") or {}).get(REF_NAME)


_MIGRATION = f'''\
from alembic import op

revision = "{LATER}"
down_revision = "%s"


def upgrade():
    op.execute("CREATE TABLE later (asset_id TEXT PRIMARY KEY, note TEXT NOT NULL)")
    op.execute("INSERT INTO later SELECT id, 'migrated' FROM assets")
    op.execute("ALTER TABLE assets ADD COLUMN note TEXT NOT NULL DEFAULT ''")
'''


def _write_migrations(directory: Path) -> None:
    """Those of this release, and one that is yet to come."""
    from systemfiles.registry import schema

    shutil.copytree(Path(schema.__file__).parent / "migrations", directory)
    (directory / "versions" / f"{LATER}_later.py").write_text(_MIGRATION % schema.HEAD)
