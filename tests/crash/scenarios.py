"""What is stopped: everything that changes a data directory, as an operator or a library caller does it.

Leases, pins and collections are in holding.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from systemfiles import SystemFiles
from systemfiles.content.artifacts import Artifacts
from systemfiles.content.descriptors import Descriptor
from systemfiles.content.layout import Layout
from systemfiles.content.store import Store
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import NotProvisioned, StoreError
from systemfiles.foundation.lockfile import PackagePin, editing_lock
from systemfiles.foundation.paths import Paths
from systemfiles.foundation.progress import silent
from systemfiles.provision.pull import Puller
from systemfiles.provision.rolling import Resolved, Rolling
from systemfiles.provision.site import Site
from systemfiles.sources.oci import Repository
from tests.crash import holding
from tests.crash.checker import Goes
from tests.crash.running import Run, Scenario, calling, command, promised
from tests.crash.world import ARCH, NEW, World, add_foreign_image, copy_data_dir, overwrite

PUSHED = "pushed"
PUBLISHED = "published"


def _provision(profile: str, *words: str) -> Callable[[Run], int]:
    return command("provision", "--profile", profile, "--arch", ARCH, *words)


def _add(run: Run) -> int:
    return command("add", "kernel", str(run.world.kernel), "--version", "local-1", "--arch", ARCH)(run)


def _recover(run: Run) -> int:
    return _provision("pinned")(run) or _provision("packaged")(run)


def _pull(run: Run) -> None:
    target = puller(run).pull(run.world.image, Arch(ARCH))
    Layout(Paths(run.data)).name("pulled", target)


def puller(run: Run) -> Puller:
    """What pulls into the run's directory."""
    system, paths = run.system(), Paths(run.data)
    store = Store(paths, Artifacts(paths), timeout=30)
    return Puller(Site(paths, system.catalog, store, Rolling(paths, system.catalog), silent, 30))


def _fetch(run: Run) -> None:
    os.environ["SYSTEMFILES_REGISTRY"] = f"{run.world.host}/{PUBLISHED}"
    system = SystemFiles(run.data, catalog=run.world.catalog, arch=ARCH, build=False)
    system.ensure("pinned-1", "plain", holder=holding.VM)
    promised("holder", holding.VM)


def _push(run: Run) -> None:
    _push_artifact(run.data, f"kernel-pinned-1-{ARCH}", Repository(run.world.host, f"{PUSHED}/{run.tag}"), "1")


def _push_artifact(data: Path, name: str, repository: Repository, tag: str) -> None:
    layout = Layout(Paths(data))
    target = layout.names()[name]
    for part in [*layout.reachable(target)][1:]:
        try:
            with layout.blob(part.digest).open("rb") as content:
                repository.push_blob(part.digest, part.size, content)
        except OSError as error:
            msg = f"{part.digest} cannot be read ({error.strerror})"
            raise StoreError(msg) from error
    repository.push_manifest(layout.read(target.digest), target.media_type, tag)


def _name(run: Run) -> None:
    layout = Layout(Paths(run.data))
    targets = layout.names()
    kernel, initrd = targets[f"kernel-pinned-1-{ARCH}"], targets[f"initrd-plain-{ARCH}"]
    for name, target in (("one", kernel), ("two", initrd), ("one", initrd)):
        layout.name(name, Descriptor(target.media_type, target.digest, target.size))


def _reassert(run: Run) -> None:
    run.system().provisioner(timeout=30).write_manifest()


def _settle(run: Run) -> None:
    rolling = Rolling(Paths(run.data), run.system().catalog, timeout=30)
    for number in range(3):
        pin = PackagePin(
            package="linux-image-test",
            version=f"7.{number}",
            url=f"http://127.0.0.1/{number}.deb",
            size=1 + number,
            sha256=f"{number:064x}",
        )
        rolling.settle(Resolved({"packaged": (f"packaged-7.{number}", pin)}, {"busybox-static": pin}), Arch(ARCH))
        with editing_lock(Paths(run.data), timeout=30) as lock:
            lock.busybox.setdefault("busybox-of-others", {})[Arch(ARCH)] = pin


def _resolve(run: Run) -> None:
    """What an instance manager does meanwhile: asks for every version that is there, and for those that are not yet."""
    for directory in sorted(run.data.glob("system/*/*/*")):
        kind, version = directory.parts[-3:-1]
        if kind not in ("kernel", "initrd") or version.startswith("."):
            continue
        find = run.system().kernel if kind == "kernel" else run.system().initrd
        if (directory / "artifact.json").exists():
            find(version)
            continue
        try:
            find(version)
        except NotProvisioned:
            continue
        msg = f"{kind} {version} was handed out without a record"
        raise StoreError(msg)


RESOLVE = Scenario("resolve", "", calling(_resolve))


def _scenarios() -> Iterator[Scenario]:
    yield Scenario("provision-pinned", "nothing", _provision("pinned"), sweeps=True)
    yield Scenario("provision-packaged", "foreign", _provision("packaged"), sweeps=True)
    yield Scenario("update", "full", _provision("packaged", "--update"), apt=NEW, sweeps=True)
    yield Scenario("relock", "without-lock", _provision("packaged"))
    yield Scenario("recover", "without-artifacts", _recover, sweeps=True)
    yield Scenario("add", "full", _add, sweeps=True)
    yield Scenario("verify", "damaged", command("verify"))
    yield Scenario("repair", "damaged", command("verify", "--repair"), sweeps=True)
    yield Scenario("pull", "full", calling(_pull))
    yield Scenario("fetch", "nothing", holding.busy(_fetch), lists=False, unheld=Goes(blobs=True))
    yield Scenario("push", "full", calling(_push))
    yield Scenario("name", "full", calling(_name))
    yield Scenario("reassert", "rewritten", calling(_reassert), sweeps=True)
    yield Scenario("settle", "full", calling(_settle))
    yield from holding.scenarios()


SCENARIOS = {scenario.name: scenario for scenario in _scenarios()}


# --- what they start from ---


def prepare(world: World, provision: Callable[[Scenario, Path], None]) -> None:
    """Makes the prepared directories; `provision` runs a scenario on a disk."""
    world.base("nothing").mkdir()
    (world.base("used") / "data" / "system").mkdir(parents=True)
    add_foreign_image(_disk(world, "foreign", None))
    full = _disk(world, "full", None)
    add_foreign_image(full)
    for name in ("provision-pinned", "provision-packaged"):
        provision(SCENARIOS[name], full.parent)
    for kind, version in (("kernel", "pinned-1"), ("initrd", "plain")):
        repository = Repository(world.host, f"{PUBLISHED}/{kind}")
        _push_artifact(full, f"{kind}-{version}-{ARCH}", repository, version)
    lock = _disk(world, "without-lock", "full") / "system" / "versions.lock"
    lock.unlink()
    lost = _disk(world, "without-artifacts", "full")
    for kind in ("kernel", "initrd"):
        shutil.rmtree(lost / "system" / kind)
    overwrite(_disk(world, "damaged", "full") / "system" / "kernel" / "pinned-1" / ARCH / "vmlinux")
    _forget_ours(_disk(world, "rewritten", "full") / "system" / "oci-cache" / "index.json")
    holding.prepare(world, provision)


def _disk(world: World, name: str, source: str | None) -> Path:
    """The data directory of a new base."""
    if source:
        copy_data_dir(world.base(source), world.base(name))
    else:
        (world.base(name) / "data").mkdir(parents=True)
    return world.base(name) / "data"


def _forget_ours(path: Path) -> None:
    """What a tool does that keeps its own entries only."""
    index = json.loads(path.read_text())
    index["manifests"] = [entry for entry in index["manifests"] if "x-unknown" in entry or "platform" in entry]
    path.write_text(json.dumps(index))
