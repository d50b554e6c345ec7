"""A run does exactly the work that is needed: nothing when nothing changed, and no more than what a change asks for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from systemfiles import SystemFiles
from systemfiles.content.descriptors import Descriptor
from systemfiles.content.layout import Layout
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.paths import Paths
from tests.conftest import ARCHES, CHECKOUT, Provisioned, doit
from tests.integration.support import (
    Completed,
    Mirror,
    completed,
    done_tasks,
    stage,
    systemfiles,
    tree,
    without_network,
)

pytestmark = pytest.mark.network

KERNEL = "kernel:debian-cloud:x86_64"
KERNELS = {KERNEL, "kernel:debian-cloud:aarch64"}
INITRD = "initrd:v1.0.0-debian:x86_64"
INITRDS = {INITRD, "initrd:v1.0.0-debian:aarch64"}
BUSYBOX = "busybox:v1.0.0-debian:x86_64"
BUSYBOXES = {BUSYBOX, "busybox:v1.0.0-debian:aarch64"}
MANIFEST = "manifest"
FETCH_KERNEL = ("kernel x86_64",)
FETCH_BUSYBOX = ("busybox x86_64",)
FETCH_BUSYBOXES = ("busybox aarch64", "busybox x86_64")


class Place:
    """The paths of a provisioned data directory that changes are made to, those of x86_64."""

    def __init__(self, data_dir: Path) -> None:
        files = SystemFiles(data_dir, profile="debian", arch="x86_64").resolve()
        self.data_dir = data_dir
        self.system = data_dir / "system"
        self.vmlinux = files.kernel.path
        self.modules = self.vmlinux.with_name("modules.tar")
        self.kernel = self.vmlinux.parent
        self.initrd_file = files.initrd.path
        self.initrd = self.initrd_file.parent
        self.layout = self.system / "oci-cache"
        self.index = self.layout / "index.json"
        self.sums = self.system / "SHA256SUMS"
        self.lock = self.system / "versions.lock"

    def blob_of(self, file: Path) -> Path:
        """The blob that an artifact's file is a link to."""
        facts = json.loads((file.parent / "artifact.json").read_text())["files"][file.name]
        return self.layout / "blobs" / "sha256" / str(facts["sha256"])

    def manifest_of(self, prefix: str) -> Path:
        """The blob with the manifest of the x86_64 image whose name starts so."""
        return self._blob(self._named(prefix).digest)

    def layer_of(self, prefix: str) -> Path:
        """The blob with the first layer of that image."""
        (layer, *_) = Layout(Paths(self.data_dir)).read_json(self._named(prefix).digest)["layers"]
        return self._blob(Digest.parse(layer["digest"]))

    def _named(self, prefix: str) -> Descriptor:
        names = Layout(Paths(self.data_dir)).names()
        (name,) = (name for name in names if name.startswith(prefix) and name.endswith("x86_64"))
        return names[name]

    def _blob(self, digest: Digest) -> Path:
        return self.layout / "blobs" / "sha256" / digest.hex


def touch(path: Path) -> None:
    os.utime(path)


def truncate(path: Path, size: int = 100) -> None:
    path.chmod(0o644)
    os.truncate(path, size)


def overwrite(path: Path) -> None:
    """Other bytes of the same size in the same inode, so in every link of it."""
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        stream.write(b"\xa5other bytes")


def replace(path: Path) -> None:
    """Another file of the same size under this name; what was linked to it stays as it was."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.unlink()
    path.write_bytes(data)


def to_symlink(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def delete(*paths: Path) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def touch_records(place: Place) -> None:
    for path in (place.kernel / "artifact.json", place.initrd / "artifact.json", place.lock, place.index, place.sums):
        touch(path)


def swap_records(place: Place) -> None:
    delete(place.initrd / "artifact.json")
    shutil.copy(place.kernel / "artifact.json", place.initrd / "artifact.json")


def delete_initrd_and_base(place: Place) -> None:
    delete(place.layer_of("busybox"), place.blob_of(place.initrd_file), place.initrd_file)


def delete_all_but_the_lock(place: Place) -> None:
    lock = place.lock.read_bytes()
    delete(*place.data_dir.iterdir())
    place.system.mkdir()
    place.lock.write_bytes(lock)


@dataclass(frozen=True)
class Change:
    """A change, the tasks that must then do something, and the packages that must be fetched for it; no others."""

    what: str
    make: Callable[[Place], None]
    tasks: frozenset[str] = frozenset()
    fetched: tuple[str, ...] = ()


def change(what: str, make: Callable[[Place], None], *tasks: str, fetched: tuple[str, ...] = ()) -> Change:
    return Change(what, make, frozenset(tasks), fetched)


CHANGES = (
    change("nothing", lambda p: None),
    # touched
    change("kernel touched", lambda p: touch(p.vmlinux)),
    change("modules touched", lambda p: touch(p.modules)),
    change("initrd touched", lambda p: touch(p.initrd_file)),
    change("records touched", touch_records),
    # cut off: the only other copy of a kernel is the same inode, so it has to be fetched; an initrd is built
    change("kernel truncated", lambda p: truncate(p.vmlinux), KERNEL, fetched=FETCH_KERNEL),
    change("initrd truncated", lambda p: truncate(p.initrd_file), INITRD),
    change("record of the kernel truncated", lambda p: truncate(p.kernel / "artifact.json"), KERNEL),
    change("record of the initrd truncated", lambda p: truncate(p.initrd / "artifact.json"), INITRD),
    change("stamps truncated", lambda p: truncate(p.kernel / "stamp.json", 7)),
    change("SHA256SUMS truncated", lambda p: truncate(p.sums), MANIFEST),
    change("manifest blob of the kernel truncated", lambda p: truncate(p.manifest_of("kernel")), MANIFEST),
    change(
        "manifest blob of busybox truncated",
        lambda p: truncate(p.manifest_of("busybox")),
        BUSYBOX,
        fetched=FETCH_BUSYBOX,
    ),
    change("layer of busybox truncated", lambda p: truncate(p.layer_of("busybox")), BUSYBOX, fetched=FETCH_BUSYBOX),
    # other content
    change("kernel overwritten", lambda p: overwrite(p.vmlinux), KERNEL, fetched=FETCH_KERNEL),
    change("kernel replaced and its blob intact", lambda p: replace(p.vmlinux), KERNEL),
    change("initrd overwritten", lambda p: overwrite(p.initrd_file), INITRD),
    change("initrd replaced and its blob intact", lambda p: replace(p.initrd_file), INITRD),
    change("kernel made a link to its blob", lambda p: to_symlink(p.vmlinux, p.blob_of(p.vmlinux)), KERNEL),
    change("record of the initrd replaced by another", swap_records, INITRD),
    change("layer of busybox overwritten", lambda p: overwrite(p.layer_of("busybox")), BUSYBOX, fetched=FETCH_BUSYBOX),
    change("SHA256SUMS overwritten", lambda p: overwrite(p.sums), MANIFEST),
    # deleted
    change("kernel deleted", lambda p: delete(p.vmlinux), KERNEL),
    change("modules deleted", lambda p: delete(p.modules), KERNEL),
    change("initrd deleted", lambda p: delete(p.initrd_file), INITRD),
    change("record of the kernel deleted", lambda p: delete(p.kernel / "artifact.json"), KERNEL),
    change("record of the initrd deleted", lambda p: delete(p.initrd / "artifact.json"), INITRD),
    change("stamps deleted", lambda p: delete(p.kernel / "stamp.json", p.initrd / "stamp.json")),
    change("directory of the kernel deleted", lambda p: delete(p.kernel), KERNEL),
    change("directory of the initrd deleted", lambda p: delete(p.initrd), INITRD),
    change("all artifacts deleted", lambda p: delete(p.system / "kernel", p.system / "initrd"), *KERNELS, *INITRDS),
    change(
        "kernel and its blob deleted", lambda p: delete(p.blob_of(p.vmlinux), p.vmlinux), KERNEL, fetched=FETCH_KERNEL
    ),
    change("initrd and its blob deleted", lambda p: delete(p.blob_of(p.initrd_file), p.initrd_file), INITRD),
    change("initrd, its blob and its base deleted", delete_initrd_and_base, BUSYBOX, INITRD, fetched=FETCH_BUSYBOX),
    change("blob of the kernel deleted", lambda p: delete(p.blob_of(p.vmlinux)), MANIFEST),
    change("manifest blob of the kernel deleted", lambda p: delete(p.manifest_of("kernel")), MANIFEST),
    change("record blob of the initrd deleted", lambda p: delete(p.layer_of("initrd")), MANIFEST),
    change("layer of busybox deleted", lambda p: delete(p.layer_of("busybox")), BUSYBOX, fetched=FETCH_BUSYBOX),
    change("SHA256SUMS deleted", lambda p: delete(p.sums), MANIFEST),
    change("oci-layout deleted", lambda p: delete(p.layout / "oci-layout"), MANIFEST),
    change("index.json deleted", lambda p: delete(p.index), *BUSYBOXES, MANIFEST, fetched=FETCH_BUSYBOXES),
    change("content store deleted", lambda p: delete(p.layout), *BUSYBOXES, MANIFEST, fetched=FETCH_BUSYBOXES),
    change("tmp and locks deleted", lambda p: delete(p.data_dir / "tmp", p.data_dir / "locks")),
    change(
        "everything but versions.lock deleted",
        delete_all_but_the_lock,
        *KERNELS,
        *BUSYBOXES,
        *INITRDS,
        MANIFEST,
        fetched=(*FETCH_BUSYBOXES, "kernel aarch64", "kernel x86_64"),
    ),
)


@pytest.mark.parametrize("row", CHANGES, ids=lambda row: row.what)
def test_a_change_leads_to_exactly_the_work_it_needs(
    row: Change, copied: Path, provisioned: Provisioned, mirror: Mirror
) -> None:
    row.make(Place(copied))
    ran = run(copied)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert done_tasks(ran.stdout) == row.tasks, ran.stdout
    assert mirror.requests == [*row.fetched]
    assert_as_provisioned(copied, provisioned)
    assert_up_to_date(run(copied))


def test_a_lost_lock_is_written_again_and_nothing_else_is_done(copied: Path, mirror: Mirror) -> None:
    place = Place(copied)
    lock, made = place.lock, place.initrd_file.stat().st_ctime_ns
    before = json.loads(lock.read_text())
    delete(lock)
    ran = doit("profile=debian", "arch=x86_64", f"data_dir={copied}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # the lock's part about initrds is the initrd task's to write; the initrd itself stays as it is
    assert done_tasks(ran.stdout) == {"resolve:x86_64", INITRD}, ran.stdout
    assert place.initrd_file.stat().st_ctime_ns == made
    assert mirror.requests == []
    after = json.loads(lock.read_text())
    assert after["profile"] == {"debian": {"x86_64": {"kernel": "debian-cloud", "initrd": "v1.0.0-debian"}}}
    assert after["busybox"]["busybox-static"]["x86_64"] == before["busybox"]["busybox-static"]["x86_64"]
    for table in ("rolling", "kernel", "initrd"):
        expected = {name: entry["x86_64"] for name, entry in before[table].items() if "x86_64" in entry}
        assert {name: entry["x86_64"] for name, entry in after[table].items()} == expected, table


def test_what_is_provisioned_needs_neither_network_nor_apt(copied: Path) -> None:
    ran = completed([*without_network(), sys.executable, "-m", "doit", *words(copied)])
    assert_up_to_date(ran)
    assert ran.stdout.count("\nkernel  ") == ran.stdout.count("\ninitrd  ") == len(ARCHES)


def test_doit_leaves_no_state_of_its_own_anywhere(copied: Path) -> None:
    place = Place(copied)
    before = set(CHECKOUT.iterdir()), tree(place.system)
    delete(place.vmlinux)
    run(copied)
    assert (set(CHECKOUT.iterdir()), tree(place.system)) == before


def test_systemfiles_provision_does_the_same_work(copied: Path, provisioned: Provisioned, mirror: Mirror) -> None:
    delete(Place(copied).initrd_file)
    command = ("provision", "--profile", "debian", "--arch", ",".join(ARCHES), "--data-dir", copied)
    ran = systemfiles(*command)
    assert (ran.returncode, done_tasks(ran.stdout), mirror.requests) == (0, {INITRD}, []), ran.stdout + ran.stderr
    assert_as_provisioned(copied, provisioned)
    assert_up_to_date(systemfiles(*command))


def test_ensure_does_the_same_work(copied: Path, provisioned: Provisioned, mirror: Mirror) -> None:
    place = Place(copied)
    before = tree(place.system)
    truncate(place.vmlinux)
    delete(place.initrd_file)
    files = SystemFiles(copied, profile="debian", arch="x86_64").ensure()
    assert (files.kernel.path, files.initrd.path) == (place.vmlinux, place.initrd_file)
    assert mirror.requests == [*FETCH_KERNEL]
    assert tree(place.system) == before
    assert_as_provisioned(copied, provisioned)
    assert_up_to_date(run(copied))


@pytest.mark.parametrize(
    ("key", "now"), [("carry", ["erofs"]), ("load", ["virtio_pci", "virtio_blk", "overlay"])], ids=["carry", "load"]
)
def test_another_list_of_modules_makes_another_initrd_and_says_why(
    key: str, now: list[str], copied: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = SystemFiles(copied, profile="debian", arch="x86_64").resolve()
    monkeypatch.setenv("SYSTEMFILES_CATALOG", str(initrd_overlay(tmp_path, **{key: now})))
    ran = run(copied)
    assert (ran.returncode, mirror.requests) == (0, []), ran.stdout + ran.stderr
    assert done_tasks(ran.stdout) == {*INITRDS, MANIFEST}, ran.stdout
    assert f"{key}: [" in ran.stdout
    assert f"→ {now}" in ran.stdout
    assert_up_to_date(run(copied))

    new = SystemFiles(copied, profile="debian", arch="x86_64").resolve()
    assert new.kernel == old.kernel
    assert new.initrd.version != old.initrd.version
    assert SystemFiles(copied, arch="x86_64").resolve(old.kernel.version, old.initrd.version) == old

    monkeypatch.delenv("SYSTEMFILES_CATALOG")
    assert_up_to_date(run(copied))
    assert SystemFiles(copied, profile="debian", arch="x86_64").resolve() == old


def test_another_init_script_makes_another_initrd_and_says_why(copied: Path, mirror: Mirror, tmp_path: Path) -> None:
    old = SystemFiles(copied, profile="debian", arch="x86_64").resolve()
    (tmp_path / "release").mkdir()
    release = stage(tmp_path / "release")
    with (release / "systemfiles" / "recipes" / "guest" / "init-v1.0.0.sh").open("a") as script:
        script.write("# one line more\n")
    ran = doit(*words(copied), cwd=release)
    assert (ran.returncode, mirror.requests) == (0, []), ran.stdout + ran.stderr
    assert done_tasks(ran.stdout) == {*INITRDS, MANIFEST}, ran.stdout
    assert "init.sha256: " in ran.stdout
    assert_up_to_date(doit(*words(copied), cwd=release))
    assert SystemFiles(copied, arch="x86_64").resolve(old.kernel.version, old.initrd.version) == old


def test_another_digest_for_a_pinned_kernel_is_a_conflict_and_the_kernel_is_kept(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(copied)
    monkeypatch.setenv("SYSTEMFILES_CATALOG", str(tmp_path / "catalog.toml"))
    source = tmp_path / "vmlinux"
    source.write_bytes(place.vmlinux.read_bytes())
    first = kernel_overlay(tmp_path / "catalog.toml", source)
    command = ("profile=debian", "arch=x86_64", f"data_dir={copied}", "kernel=pinned-1")
    ran = doit(*command)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert done_tasks(ran.stdout) == {"kernel:pinned-1:x86_64", INITRD, MANIFEST}, ran.stdout
    assert_up_to_date(doit(*command))

    source.write_bytes(place.vmlinux.read_bytes() + b"more")
    second = kernel_overlay(tmp_path / "catalog.toml", source)
    before = tree(place.system)
    refused = doit(*command)
    assert refused.returncode != 0
    assert f"{first} -> {second}" in refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr
    assert tree(place.system) == before
    assert hashlib.sha256(SystemFiles(copied, arch="x86_64").kernel_path("pinned-1").read_bytes()).hexdigest() == first


def test_a_directory_in_the_place_of_a_file_is_for_people_to_remove(copied: Path, provisioned: Provisioned) -> None:
    vmlinux = Place(copied).vmlinux
    delete(vmlinux)
    (vmlinux / "precious").mkdir(parents=True)
    ran = run(copied)
    assert ran.returncode != 0
    assert str(vmlinux) in ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    assert (vmlinux / "precious").is_dir()
    delete(vmlinux)
    assert done_tasks(run(copied).stdout) == {KERNEL}
    assert_as_provisioned(copied, provisioned)


@pytest.mark.parametrize("name", ["versions.lock", "oci-cache/index.json"])
def test_a_file_that_only_people_can_mend_is_left_alone_and_the_error_says_what_to_do(name: str, copied: Path) -> None:
    path = copied / "system" / name
    path.write_text("{")
    ran = run(copied)
    assert ran.returncode != 0
    assert str(path) in ran.stderr
    assert "hint" in ran.stderr
    assert path.read_text() == "{"


def words(data_dir: Path) -> tuple[str, ...]:
    return "profile=debian", f"arch={','.join(ARCHES)}", f"data_dir={data_dir}"


def run(data_dir: Path) -> Completed:
    return doit(*words(data_dir))


def assert_up_to_date(ran: Completed) -> None:
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert done_tasks(ran.stdout) == set(), ran.stdout
    assert "everything is up to date" in ran.stdout


def assert_as_provisioned(data_dir: Path, provisioned: Provisioned) -> None:
    """Every byte is what it was at first; only when and where a file was made or hashed may differ."""
    here, there = data_dir / "system", provisioned.data_dir / "system"
    host_facts = ("artifact.json", "stamp.json", "index.json", "store.json")
    compared = completed(["diff", "-rq", *(f"--exclude={name}" for name in host_facts), str(there), str(here)])
    assert (compared.returncode, compared.stdout) == (0, "")
    assert tree(here) == tree(there)
    assert Layout(Paths(data_dir)).names() == Layout(Paths(provisioned.data_dir)).names()
    for record in there.glob("*/*/*/artifact.json"):
        assert timeless(here / record.relative_to(there)) == timeless(record)


def timeless(record: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(record.read_text())
    del facts["created_at"]
    return facts


def initrd_overlay(directory: Path, **other: list[str]) -> Path:
    """A catalog in which the Debian initrd has other lists of modules."""
    lists = {
        "load": ["virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "overlay"],
        "carry": ["erofs", "squashfs"],
    }
    path = directory / "catalog.toml"
    lines = [f"{name} = {json.dumps(modules)}" for name, modules in (lists | other).items()]
    head = 'schema = 1\n[initrd."v1.0.0-debian"]\ninit = "v1.0.0"\nbusybox = { apt = "busybox-static" }\n'
    path.write_text(head + "\n".join(lines) + "\n")
    return path


def kernel_overlay(catalog: Path, source: Path) -> str:
    """Writes a catalog that pins the kernel at `source` as it is now; returns its sha256."""
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    catalog.write_text(f'schema = 1\n[kernel.pinned-1.files.x86_64]\nurl = "{source.as_uri()}"\nsha256 = "{sha256}"\n')
    return sha256
