"""What a pin or a stored record of boot files names comes back with exactly its bytes, whatever has happened to it.

Or there is an error that says what differs, or what it would take.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from systemfiles import (
    BootFiles,
    CatalogError,
    PinNotFound,
    SnapshotMismatch,
    SourceUnavailable,
    StoreError,
    SystemFiles,
)
from systemfiles.content.artifacts import Artifacts
from systemfiles.content.descriptors import Descriptor
from systemfiles.content.layout import Layout
from systemfiles.content.packaging import without_host_facts
from systemfiles.content.store import Store
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.manifests import IMAGE_INDEX
from systemfiles.foundation.paths import INITRD as AN_INITRD
from systemfiles.foundation.paths import Paths
from systemfiles.sources.oci import Repository
from tests.conftest import ARCHES, CHECKOUT, Provisioned, doit
from tests.integration.support import (
    CLOSED,
    Mirror,
    apt_archive,
    as_nobody,
    completed,
    copy_data_dir,
    nobody,
    stage,
    systemfiles,
    tree,
    without_network,
    writable_again,
)
from tests.integration.test_exact_work import Place, delete, initrd_overlay, overwrite, replace, truncate
from tests.registries import Registry, registry

pytestmark = pytest.mark.network

NAME = "snapshot-42"
HYPERVISOR = "v49.0"
KERNEL_AGAIN = ("kernel x86_64",)
BUSYBOX_AGAIN = ("busybox x86_64",)
WAYS = ("pin", "record")


@dataclass(frozen=True)
class Snapshot:
    """A data directory in which the pair for x86_64 is pinned, and the record that a VM's owner would have stored."""

    place: Place
    record: dict[str, Any]

    @classmethod
    def take(cls, data_dir: Path) -> Snapshot:
        system = SystemFiles(data_dir, profile="debian", arch="x86_64")
        files = system.resolve()
        system.pin(NAME, files, hypervisor=HYPERVISOR)
        return cls(Place(data_dir), json.loads(json.dumps(files.to_dict())))

    @property
    def data_dir(self) -> Path:
        return self.place.data_dir

    @property
    def files(self) -> BootFiles:
        return BootFiles.from_dict(self.record)

    def system(self, catalog: Path | None = None) -> SystemFiles:
        return SystemFiles(self.data_dir, catalog=catalog, profile="debian", arch="x86_64")

    def restore(self, by: str = "pin", *, full: bool = False, catalog: Path | None = None) -> BootFiles:
        """By the pin's name, or by the record."""
        return self.system(catalog).restore(NAME if by == "pin" else self.record, full=full)

    def assert_exact(self, restored: BootFiles) -> None:
        assert restored == self.files
        for part in restored:
            assert hashlib.sha256(part.path.read_bytes()).hexdigest() == part.sha256
        assert self.system().resolve(*(part.version for part in restored)) == restored

    def lose(self, *names: str) -> None:
        """Takes the directories of these kinds away, and their blobs with them."""
        for name, file in (("kernel", self.place.vmlinux), ("initrd", self.place.initrd_file)):
            if name in names:
                delete(self.place.blob_of(file), file.parent)

    def unname(self, *kinds: str) -> None:
        """Drops the entries of these kinds from index.json."""
        index = json.loads(self.place.index.read_text())
        called = "org.opencontainers.image.ref.name"
        index["manifests"] = [
            entry for entry in index["manifests"] if not entry["annotations"][called].startswith(kinds)
        ]
        self.place.index.chmod(0o644)
        self.place.index.write_text(json.dumps(index))


@pytest.fixture
def snapshot(copied: Path) -> Snapshot:
    return Snapshot.take(copied)


@pytest.fixture(autouse=True)
def no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SYSTEMFILES_REGISTRY", raising=False)


# ── what may become of a data directory ──────────────────────────────────────────────────────────────────────────────


def add_others(place: Place) -> Place:
    """Another kernel and its initrd beside those of the snapshot."""
    system = SystemFiles(place.data_dir, profile="debian", arch="x86_64")
    other = place.data_dir / "vmlinux"
    other.write_bytes(place.vmlinux.read_bytes() + b"other")
    system.add_kernel(other, "other-1")
    other.unlink()
    files = system.ensure("other-1", "v1.0.0-debian")
    found = Place(place.data_dir)
    found.vmlinux, found.initrd_file = files.kernel.path, files.initrd.path
    found.kernel, found.initrd = files.kernel.path.parent, files.initrd.path.parent
    return found


def replace_directories(place: Place) -> None:
    other = add_others(place)
    for mine, theirs in ((place.kernel, other.kernel), (place.initrd, other.initrd)):
        delete(mine)
        shutil.copytree(theirs, mine)


def link_directories(place: Place) -> None:
    other = add_others(place)
    delete(place.kernel, place.initrd.parent)
    place.kernel.symlink_to(other.kernel)
    place.initrd.parent.symlink_to(other.initrd.parent)


def forge(path: Path, other: bytes) -> None:
    """Other bytes in the same inode, of the same size and with the same time: nothing but reading them tells."""
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(other.ljust(before.st_size, b"\0")[: before.st_size])
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def forge_both(place: Place) -> None:
    files = SystemFiles(place.data_dir, profile="debian", arch="aarch64").resolve()
    forge(place.vmlinux, files.kernel.path.read_bytes())
    forge(place.initrd_file, files.initrd.path.read_bytes())


def delete_initrd_and_cut_modules(place: Place) -> None:
    delete(place.blob_of(place.initrd_file), place.initrd)
    truncate(place.modules)


def delete_initrd_and_base(place: Place) -> None:
    delete(place.layer_of("busybox"), place.blob_of(place.initrd_file), place.initrd)


def truncate_records(place: Place) -> None:
    truncate(place.kernel / "artifact.json")
    truncate(place.initrd / "artifact.json")


def without_artifacts(place: Place) -> None:
    delete(place.system / "kernel", place.system / "initrd")


@dataclass(frozen=True)
class Change:
    """What happened, and which packages must then be fetched; no others."""

    what: str
    make: Callable[[Place], object]
    fetched: tuple[str, ...] = ()
    full: bool = False


CHANGES = (
    Change("nothing", lambda p: None),
    Change("other versions were added", add_others),
    Change("kernel truncated", lambda p: truncate(p.vmlinux), KERNEL_AGAIN),
    Change("kernel overwritten", lambda p: overwrite(p.vmlinux), KERNEL_AGAIN),
    Change("kernel replaced and its blob intact", lambda p: replace(p.vmlinux)),
    Change("both replaced by another version's bytes", forge_both, KERNEL_AGAIN, full=True),
    Change("initrd truncated", lambda p: truncate(p.initrd_file)),
    Change("initrd overwritten", lambda p: overwrite(p.initrd_file)),
    Change("initrd truncated and its base gone", delete_initrd_and_base, BUSYBOX_AGAIN),
    Change("initrd gone and the kernel's modules truncated", delete_initrd_and_cut_modules, KERNEL_AGAIN),
    Change("modules truncated", lambda p: truncate(p.modules)),
    Change("directories replaced by another version's", replace_directories),
    Change("directories replaced by links to another version's", link_directories),
    Change("directories removed", lambda p: delete(p.kernel, p.initrd)),
    Change("all artifacts removed", without_artifacts),
    Change("records truncated", truncate_records),
    Change("kernel and its blob removed", lambda p: delete(p.blob_of(p.vmlinux), p.kernel), KERNEL_AGAIN),
    Change("initrd and its blob removed", lambda p: delete(p.blob_of(p.initrd_file), p.initrd)),
    Change("content store removed", lambda p: delete(p.layout)),
    Change("index.json removed", lambda p: delete(p.index)),
    Change("versions.lock removed", lambda p: delete(p.lock)),
    Change("versions.lock and the directories removed", lambda p: delete(p.lock, p.kernel, p.initrd)),
    Change("registry removed", lambda p: delete(p.data_dir / "registry.sqlite")),
)


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("row", CHANGES, ids=lambda row: row.what)
def test_exactly_the_recorded_bytes_come_back(row: Change, by: str, snapshot: Snapshot, mirror: Mirror) -> None:
    row.make(snapshot.place)
    before = {path: path.read_bytes() for path in (snapshot.place.system / "kernel").glob("other-1/*/vmlinux")}
    snapshot.assert_exact(snapshot.restore(by, full=row.full))
    assert mirror.requests == [*row.fetched]
    assert all(path.read_bytes() == data for path, data in before.items())
    mirror.forget()
    snapshot.assert_exact(snapshot.restore(by, full=True))
    assert mirror.requests == []


def test_what_was_brought_back_is_whole_for_everybody(snapshot: Snapshot, mirror: Mirror) -> None:
    forge_both(snapshot.place)
    snapshot.unname("kernel", "initrd")
    snapshot.restore(full=True)
    assert snapshot.system().verify().problems == ()
    again = doit("profile=debian", "arch=x86_64", f"data_dir={snapshot.data_dir}")
    assert "everything is up to date" in again.stdout, again.stdout + again.stderr


def test_a_pin_knows_what_index_json_has_forgotten(snapshot: Snapshot, mirror: Mirror) -> None:
    delete(snapshot.place.kernel, snapshot.place.initrd)
    snapshot.unname("kernel", "initrd")
    snapshot.assert_exact(snapshot.restore("pin"))
    assert mirror.requests == []


def test_a_record_does_not_know_that_so_the_origin_is_asked(snapshot: Snapshot, mirror: Mirror) -> None:
    delete(snapshot.place.kernel, snapshot.place.initrd)
    snapshot.unname("kernel", "initrd")
    snapshot.assert_exact(snapshot.restore("record"))
    assert mirror.requests == [*KERNEL_AGAIN]


def test_a_pin_knows_the_origin_that_versions_lock_has_forgotten(snapshot: Snapshot, mirror: Mirror) -> None:
    snapshot.lose("kernel", "initrd")
    delete(snapshot.place.lock)
    snapshot.assert_exact(snapshot.restore("pin"))
    assert mirror.requests == [*KERNEL_AGAIN]


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_pin_needs_no_versions_lock_that_can_be_read(content: str, snapshot: Snapshot, mirror: Mirror) -> None:
    snapshot.lose("kernel", "initrd")
    snapshot.place.lock.write_text(content)
    snapshot.assert_exact(snapshot.restore("pin"))


def test_an_index_that_cannot_be_read_is_for_people_to_mend(snapshot: Snapshot) -> None:
    snapshot.place.index.write_text("{")
    snapshot.assert_exact(snapshot.restore())
    delete(snapshot.place.kernel)
    with pytest.raises(StoreError, match=str(snapshot.place.index)) as caught:
        snapshot.restore()
    assert caught.value.hint
    assert snapshot.place.index.read_text() == "{"


def test_everything_but_the_pin_may_go(snapshot: Snapshot, mirror: Mirror) -> None:
    pins = snapshot.place.system / "pins"
    pins.rename(snapshot.data_dir.parent / "pins")
    delete(*snapshot.data_dir.iterdir())
    snapshot.place.system.mkdir()
    (snapshot.data_dir.parent / "pins").rename(pins)
    snapshot.assert_exact(snapshot.restore("pin"))
    assert mirror.requests == ["busybox x86_64", "kernel x86_64"]


def test_a_pair_of_the_other_architecture_is_restored_as_well(copied: Path, mirror: Mirror) -> None:
    files = SystemFiles(copied, profile="debian", arch="aarch64").resolve()
    SystemFiles(copied).pin("arm", files)
    delete(files.kernel.path.parent, files.initrd.path.parent)
    assert SystemFiles(copied, arch="x86_64").restore("arm", full=True) == files
    assert SystemFiles(copied, arch="x86_64").restore(files.to_dict()) == files
    assert mirror.requests == []


# ── defaults that moved, and collections ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("by", WAYS)
def test_the_defaults_may_move(by: str, snapshot: Snapshot, mirror: Mirror, tmp_path: Path) -> None:
    catalog = initrd_overlay(tmp_path, carry=["erofs"])
    moved = snapshot.system(catalog).ensure()
    assert moved.initrd.version != snapshot.files.initrd.version
    snapshot.assert_exact(snapshot.restore(by, catalog=catalog))
    delete(snapshot.place.kernel, snapshot.place.initrd)
    snapshot.assert_exact(snapshot.restore(by, catalog=catalog))
    assert snapshot.system(catalog).resolve() == moved
    assert mirror.requests == []


def test_an_entry_of_the_catalog_that_means_other_bytes_now_does_not_matter(
    copied: Path, mirror: Mirror, tmp_path: Path
) -> None:
    """Not even when there is nothing else than the origin: the pin has its own."""
    place = Place(copied)
    source, other = tmp_path / "vmlinux", tmp_path / "other"
    source.write_bytes(place.vmlinux.read_bytes())
    other.write_bytes(source.read_bytes() + b"other")
    catalog = pinned_kernel(tmp_path / "catalog.toml", source)
    system = SystemFiles(copied, catalog=catalog, profile="debian", arch="x86_64")
    files = system.ensure("pinned-1")
    system.pin("pinned", files)
    pinned_kernel(catalog, other)
    system = SystemFiles(copied, catalog=catalog, profile="debian", arch="x86_64")
    assert system.restore("pinned") == files
    assert system.restore(files.to_dict()) == files

    lose_all_of(copied, files)
    with pytest.raises(SourceUnavailable) as caught:
        system.restore(files.to_dict())
    assert f"expected {files.kernel.sha256}, got {hashlib.sha256(other.read_bytes()).hexdigest()}" in str(caught.value)
    assert not files.kernel.path.parent.exists()
    assert system.restore("pinned") == files


def test_an_update_and_a_collection_leave_what_is_pinned(
    snapshot: Snapshot, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APT_CONFIG", str(apt_archive(mirror, tmp_path, kernel="6.1.999-1", busybox="1:1.99-1")))
    ran = doit("profile=debian", "arch=x86_64", f"data_dir={snapshot.data_dir}", "update")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    moved = snapshot.system().resolve()
    assert moved.kernel.version == "debian-cloud-6.1.999-1"
    mirror.forget()
    snapshot.system().collect(grace=0, keep_last=1)
    assert all(each.why.startswith(f"pinned by {NAME}") for each in snapshot.system().explain(NAME))
    for by in WAYS:
        snapshot.assert_exact(snapshot.restore(by, full=True))
    assert mirror.requests == []
    assert snapshot.system().resolve() == moved


def test_what_was_collected_comes_back_by_a_record_and_not_by_a_pin_that_ended(copied: Path, tmp_path: Path) -> None:
    source = tmp_path / "vmlinux"
    source.write_bytes(Place(copied).vmlinux.read_bytes() + b"other")
    catalog = pinned_kernel(tmp_path / "catalog.toml", source)
    system = SystemFiles(copied, catalog=catalog, profile="debian", arch="x86_64")
    files = system.ensure("pinned-1")
    system.pin("pinned", files)
    system.collect(grace=0, keep_last=0)
    assert system.restore("pinned", full=True) == files
    system.unpin("pinned")
    system.collect(grace=0, keep_last=0)
    assert not any(part.path.exists() for part in files)
    with pytest.raises(PinNotFound):
        system.restore("pinned")
    assert system.restore(files.to_dict(), full=True) == files


def test_a_pin_comes_back_after_a_collection_though_all_that_it_holds_was_lost_before(
    snapshot: Snapshot, mirror: Mirror
) -> None:
    snapshot.lose("kernel", "initrd")
    snapshot.unname("kernel", "initrd")
    snapshot.system().collect(grace=0, keep_last=1)
    snapshot.assert_exact(snapshot.restore("pin"))


def pinned_kernel(catalog: Path, source: Path) -> Path:
    """A catalog with the kernel at `source`, as it is now."""
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    entry = f'[kernel.pinned-1.files.x86_64]\nurl = "{source.as_uri()}"\nsha256 = "{sha256}"\n'
    catalog.write_text(f"schema = 1\n{entry}")
    return catalog


def lose_all_of(data_dir: Path, files: BootFiles) -> None:
    """Takes a pair away as if it had never been here, but for what pins it."""
    for part in files:
        delete(part.path.parent)
        (data_dir / "system" / "oci-cache" / "blobs" / "sha256" / part.sha256).unlink(missing_ok=True)
    layout = Layout(Paths(data_dir))
    with layout.exclusively():
        layout.unname(f"kernel-{files.kernel.version}-{files.kernel.arch}")
        layout.unname(f"initrd-{files.initrd.version}-{files.initrd.arch}")


# ── registries ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Published:
    """A registry on loopback that has the kernel for both architectures under one tag, and each initrd."""

    registry: Registry

    def repository(self, kind: str, where: str = "artifacts") -> Repository:
        return Repository(self.registry.host, f"{where}/{kind}")

    def name(self, where: str = "artifacts") -> str:
        """What is configured."""
        return f"{self.registry.host}/{where}"

    def push(self, layout: Path, name: str, kind: str, tag: str, *, where: str = "artifacts") -> None:
        """Lets skopeo copy what the layout calls `name`."""
        target = f"docker://{self.registry.host}/{where}/{kind}:{tag}"
        command = ["skopeo", "--insecure-policy", "copy", "--preserve-digests", "--dest-tls-verify=false"]
        ran = completed([*command, f"oci:{layout}:{name}", target])
        assert ran.returncode == 0, ran.stderr

    def push_kernels(self, layout: Path, version: str, *, where: str = "artifacts") -> None:
        """Both architectures, under one index (image-spec, image-index.md)."""
        entries = []
        for arch in Arch:
            self.push(layout, f"kernel-{version}-{arch}", "kernel", f"{version}-{arch}", where=where)
            found = self.repository("kernel", where).manifest(f"{version}-{arch}")
            described = Descriptor(found.media_type, found.digest, len(found.raw)).to_json()
            entries.append({**described, "platform": {"os": "linux", "architecture": arch.debian}})
        raw = json.dumps({"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": entries}).encode()
        self.repository("kernel", where).push_manifest(raw, IMAGE_INDEX, version)

    def pulls(self) -> int:
        return len(self.registry.requests("GET", "/blobs/"))


@pytest.fixture(scope="module")
def published(provisioned: Provisioned, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    layout = provisioned.data_dir / "system" / "oci-cache"
    base = tmp_path_factory.mktemp("published")
    with registry(base / "registry") as running:
        found = Published(running)
        for arch in ARCHES:
            files = provisioned.boot_files(arch)
            found.push(layout, f"initrd-{files.initrd.version}-{arch}", "initrd", files.initrd.version)
        found.push_kernels(layout, files.kernel.version)
        yield found
    shutil.rmtree(base)


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("configured", ["environment", "catalog"])
def test_a_registry_has_what_the_content_store_has_no_more(
    configured: str,
    arch: str,
    by: str,
    copied: Path,
    published: Published,
    mirror: Mirror,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one that is asked has nothing. The origin is not asked at all."""
    registries = [f"{published.name()}/nothing", published.name()]
    catalog = tmp_path / "catalog.toml"
    catalog.write_text("schema = 1\n" + (f"registries = {registries}\n" if configured == "catalog" else ""))
    if configured == "environment":
        monkeypatch.setenv("SYSTEMFILES_REGISTRY", " ".join(registries))
    system = SystemFiles(copied, catalog=catalog, profile="debian", arch=arch)
    files = system.resolve()
    system.pin(NAME, files)
    lose_all_of(copied, files)
    before = published.pulls()
    assert system.restore(NAME if by == "pin" else files.to_dict(), full=True) == files
    assert published.pulls() > before
    assert mirror.requests == []
    assert system.verify().problems == ()


def test_a_kernel_that_was_cut_off_with_its_blob_comes_from_the_registry(
    snapshot: Snapshot, published: Published, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYSTEMFILES_REGISTRY", published.name())
    truncate(snapshot.place.vmlinux)
    snapshot.assert_exact(snapshot.restore())
    assert mirror.requests == []


@pytest.mark.parametrize("by", WAYS)
def test_a_registry_that_has_something_else_under_the_version_is_not_believed(
    by: str, snapshot: Snapshot, published: Published, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It says itself what else it has, and then says that it has what is wanted."""
    version = snapshot.files.kernel.version
    other = SystemFiles(tmp_path / "other", arch="x86_64")
    changed = tmp_path / "vmlinux"
    changed.write_bytes(snapshot.place.vmlinux.read_bytes() + b"other")
    other.add_kernel(changed, version)
    places = ["another-content", "another-version"]
    published.push(other.paths.oci_cache, f"kernel-{version}-x86_64", "kernel", version, where=places[0])
    other.add_kernel(changed, "other-1")
    published.push(other.paths.oci_cache, "kernel-other-1-x86_64", "kernel", version, where=places[1])
    monkeypatch.setenv("SYSTEMFILES_REGISTRY", " ".join(map(published.name, places)))

    lose_all_of(snapshot.data_dir, snapshot.files)
    snapshot.assert_exact(snapshot.restore(by))
    assert mirror.requests == [*KERNEL_AGAIN]

    lose_all_of(snapshot.data_dir, snapshot.files)
    delete(snapshot.place.lock)
    forget_origin(snapshot)
    with pytest.raises(SourceUnavailable) as caught:
        snapshot.restore(by)
    if by == "pin":  # whose record tells of the modules, too, so that nothing of it is fetched
        assert str(caught.value).count(f"expected the files of kernel {version} (x86_64)") == 2
    else:
        assert str(Digest.of(changed.read_bytes()).hex) in str(caught.value)
        assert "kernel other-1 (x86_64)" in str(caught.value)
    assert not snapshot.place.kernel.exists()


@pytest.mark.parametrize("by", WAYS)
def test_a_registry_may_have_an_initrd_that_was_compressed_otherwise(
    by: str, snapshot: Snapshot, published: Published, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repacked = gzip.compress(gzip.decompress(snapshot.place.initrd_file.read_bytes()), 1, mtime=0)
    other = put_initrd(tmp_path / "other", snapshot, repacked)
    published.push(
        other, f"initrd-{snapshot.files.initrd.version}-x86_64", "initrd", snapshot.files.initrd.version, where="fast"
    )
    monkeypatch.setenv("SYSTEMFILES_REGISTRY", published.name("fast"))
    lose_all_of(snapshot.data_dir, snapshot.files)
    restored = snapshot.restore(by)
    assert restored.kernel == snapshot.files.kernel
    assert restored.initrd == snapshot.files.initrd._replace(sha256=Digest.of(repacked).hex, size=len(repacked))
    assert restored.initrd.path.read_bytes() == repacked
    assert snapshot.restore(by, full=True) == restored


@pytest.mark.parametrize("trick", ["another content", "something behind it", "cut off", "no gzip", "a bomb"])
def test_an_initrd_that_is_not_what_its_record_says_is_refused(
    trick: str, snapshot: Snapshot, published: Published, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packed = snapshot.place.initrd_file.read_bytes()
    tricks = {
        "another content": lambda: gzip.compress(gzip.decompress(packed) + b"\0" * 512),
        "something behind it": lambda: packed + gzip.compress(b"another archive, which the kernel would unpack"),
        "cut off": lambda: packed[:-9],
        "no gzip": lambda: gzip.decompress(packed),
        "a bomb": lambda: gzip.compress(bytes(257 << 20), 1),
    }
    other = put_initrd(tmp_path / "other", snapshot, tricks[trick]())
    where = trick.replace(" ", "-")
    version = snapshot.files.initrd.version
    published.push(other, f"initrd-{version}-x86_64", "initrd", version, where=where)
    monkeypatch.setenv("SYSTEMFILES_REGISTRY", published.name(where))
    lose_all_of(snapshot.data_dir, snapshot.files)
    snapshot.assert_exact(snapshot.restore())

    snapshot.lose("initrd")
    snapshot.unname("initrd")
    delete(snapshot.place.lock)
    with pytest.raises(SourceUnavailable, match=r"expected the content sha256:") as caught:
        snapshot.restore("record")
    assert "neither a record, nor catalog, nor versions.lock knows it" in str(caught.value)
    assert not snapshot.place.initrd.exists()


def put_initrd(data_dir: Path, snapshot: Snapshot, data: bytes) -> Path:
    """The content store of another data directory, which has this for the snapshot's initrd."""
    system = SystemFiles(data_dir, arch="x86_64")
    artifact = next(each for each in snapshot.system().artifacts() if each.path == snapshot.files.initrd.path)
    record = without_host_facts(artifact.record)
    record["files"] = {"initrd": {"sha256": Digest.of(data).hex, "size": len(data)}}
    store = Store(system.paths, Artifacts(system.paths))
    store.put(record, {"initrd": store.layout.add_bytes(data, "application/octet-stream")})
    return store.layout.root


def forget_origin(snapshot: Snapshot) -> None:
    """As if the kernel had been a local file."""
    path = snapshot.place.system / "pins" / f"{NAME}.json"
    pin = json.loads(path.read_text())
    pin["kernel"]["record"]["source"] = {"added_from": "vmlinux"}
    path.write_text(json.dumps(pin))


# ── what cannot be brought back ──────────────────────────────────────────────────────────────────────────────────────


def test_what_is_gone_everywhere_is_an_error_that_says_what_it_takes(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYSTEMFILES_REGISTRY", f"{CLOSED.removeprefix('http://')}nothing")
    source = tmp_path / "vmlinux"
    source.write_bytes(snapshot.place.vmlinux.read_bytes())
    catalog = pinned_kernel(tmp_path / "catalog.toml", source)
    system = snapshot.system(catalog)
    files = system.ensure("pinned-1")
    system.pin("pinned", files)
    lose_all_of(snapshot.data_dir, files)
    lose_all_of(snapshot.data_dir, snapshot.files)
    bytes_of_it = source.read_bytes()
    source.unlink()
    for pinned in ("pinned", files.to_dict()):
        with pytest.raises(SourceUnavailable) as caught:
            system.restore(pinned)
        told = str(caught.value)
        assert "kernel pinned-1 (x86_64), which " in told
        assert "could not be brought back" in told
        assert f"sha256 {files.kernel.sha256} ({files.kernel.size} bytes)" in told
        places = " ".join(where for where, _ in caught.value.tried)
        for place in ("the files here", "the content store", "registry 127.0.0.1:9/nothing", source.as_uri()):
            assert place in places
        assert not files.kernel.path.parent.exists()
        assert "add kernel" not in told, "a name of the catalog cannot be added"
    source.write_bytes(bytes_of_it)
    assert system.restore("pinned") == files


def test_a_local_build_comes_back_when_it_is_added_again_as_the_error_says(copied: Path, tmp_path: Path) -> None:
    build = tmp_path / "vmlinux"
    build.write_bytes(Place(copied).vmlinux.read_bytes() + b"other")
    system = SystemFiles(copied, profile="debian", arch="x86_64")
    system.add_kernel(build, "mine-1")
    files = system.ensure("mine-1")
    system.pin("mine", files)
    lose_all_of(copied, files)
    with pytest.raises(SourceUnavailable) as caught:
        system.restore("mine")
    hint = "systemfiles add kernel FILE --version mine-1 --arch x86_64"
    assert hint in str(caught.value)
    added = systemfiles(*hint.replace("FILE", str(build)).split()[1:], "--data-dir", copied)
    assert added.returncode == 0, added.stderr
    assert system.restore("mine") == files


def test_an_initrd_that_another_release_would_build_otherwise_is_not_built(snapshot: Snapshot, tmp_path: Path) -> None:
    release = stage(tmp_path)
    with (release / "systemfiles" / "recipes" / "guest" / "init-v1.0.0.sh").open("a") as script:
        script.write("# one line more\n")
    snapshot.lose("initrd")
    ran = systemfiles("restore", NAME, "--data-dir", snapshot.data_dir, cwd=release)
    assert ran.returncode != 0
    assert "init.sha256: " in ran.stderr
    assert snapshot.files.initrd.content_sha256 in ran.stderr
    assert not snapshot.place.initrd.exists()
    snapshot.assert_exact(snapshot.restore())


def test_another_hypervisor_is_a_mismatch_and_so_is_one_that_is_not_on_record(snapshot: Snapshot) -> None:
    system = snapshot.system()
    snapshot.assert_exact(system.restore(NAME, hypervisor=HYPERVISOR))
    snapshot.assert_exact(system.restore({**snapshot.record, "hypervisor": HYPERVISOR}, hypervisor=HYPERVISOR))
    system.pin("without", snapshot.files)
    for pinned, recorded in ((NAME, HYPERVISOR), ("without", "none"), (snapshot.record, "none")):
        with pytest.raises(SnapshotMismatch) as caught:
            system.restore(pinned, hypervisor="v50.0")
        assert caught.value.differences == {"hypervisor": (recorded, "v50.0")}


@pytest.mark.parametrize("left", ["directory and content store", "directory", "content store"])
@pytest.mark.parametrize("by", WAYS)
def test_another_content_under_the_same_version_is_a_mismatch_that_says_which(
    by: str, left: str, copied: Path, tmp_path: Path
) -> None:
    """And nothing is changed by that."""
    place = Place(copied)
    build = tmp_path / "vmlinux"
    build.write_bytes(place.vmlinux.read_bytes() + b"other")
    there, here = (SystemFiles(base, profile="debian", arch="x86_64") for base in (tmp_path / "there", copied))
    there.add_kernel(build, "mine-1")
    mine = there.kernel("mine-1")
    here.add_kernel(place.vmlinux, "mine-1")
    files = here.ensure("mine-1")
    here.pin("mine", files, hypervisor=HYPERVISOR)
    record = json.loads((copied / "system" / "pins" / "mine.json").read_text())
    record["kernel"] |= {"sha256": mine.sha256, "size": mine.size}
    record["kernel"]["record"]["files"] = {"vmlinux": {"sha256": mine.sha256, "size": mine.size}}
    (copied / "system" / "pins" / "mine.json").write_text(json.dumps(record))
    if left == "directory":
        delete(place.layout)
    if left == "content store":
        delete(files.kernel.path.parent)
    before = tree(copied / "system")
    pinned = "mine" if by == "pin" else files._replace(kernel=mine).to_dict()
    with pytest.raises(SnapshotMismatch) as caught:
        here.restore(pinned)
    assert caught.value.differences == {"kernel mine-1 (x86_64)": (mine.sha256, files.kernel.sha256)}
    assert tree(copied / "system") == before


def test_all_that_differs_is_named_at_once(snapshot: Snapshot) -> None:
    kernel, initrd = snapshot.record["kernel"], snapshot.record["initrd"]
    other = {"kernel": {**kernel, "sha256": "0" * 64}, "initrd": {**initrd, "content_sha256": "1" * 64}}
    with pytest.raises(SnapshotMismatch) as caught:
        snapshot.system().restore(other, hypervisor="v50.0")
    assert caught.value.differences == {
        "hypervisor": ("none", "v50.0"),
        f"kernel {kernel['version']} (x86_64)": ("0" * 64, kernel["sha256"]),
        f"initrd {initrd['version']} (x86_64)": ("1" * 64, initrd["content_sha256"]),
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"{}",
        lambda data: b"[" * 100_000,
        lambda data: b" " * (2 << 20) + data,
        lambda data: data.replace(b'"snapshot-42"', b'"snapshot-43"'),
        lambda data: data.replace(b'"x86_64"', b'"aarch64"', 1),
        lambda data: data.replace(b'"sha256"', b'"sha512"'),
    ],
    ids=["cut off", "empty", "no pin", "nested", "huge", "another's", "two architectures", "without digests"],
)
def test_a_damaged_pin_is_an_error_that_names_its_file(damage: Callable[[bytes], bytes], snapshot: Snapshot) -> None:
    path = snapshot.place.system / "pins" / f"{NAME}.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StoreError, match=str(path)):
        snapshot.restore()
    snapshot.assert_exact(snapshot.restore("record"))


def test_a_directory_in_the_place_of_a_pin_is_such_an_error(snapshot: Snapshot) -> None:
    path = snapshot.place.system / "pins" / f"{NAME}.json"
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match=str(path)):
        snapshot.restore()


# ── hosts, users, and others at work ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("option", ["-a", "-r"])
@pytest.mark.parametrize("by", WAYS)
def test_a_copy_of_the_data_directory_restores_by_itself(
    by: str, option: str, snapshot: Snapshot, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    subprocess.run(["cp", option, "--reflink=auto", str(snapshot.data_dir), str(elsewhere)], check=True)
    away = snapshot.data_dir.rename(tmp_path / "away")
    system = SystemFiles(elsewhere, profile="debian", arch="x86_64")
    restored = system.restore(NAME if by == "pin" else snapshot.record)
    for kind, part in restored._asdict().items():
        recorded = getattr(snapshot.files, kind)
        assert part == recorded._replace(path=elsewhere / recorded.path.relative_to(snapshot.data_dir))
        assert hashlib.sha256(part.path.read_bytes()).hexdigest() == recorded.sha256
    delete(restored.kernel.path.parent, restored.initrd.path.parent)
    assert system.restore(NAME if by == "pin" else snapshot.record, full=True) == restored
    away.rename(snapshot.data_dir)
    shutil.rmtree(elsewhere)


_RESTORE = """
from pathlib import Path
from systemfiles import SystemFiles, SystemFilesError
import json
try:
    print(json.dumps(SystemFiles(Path(sys.argv[1]), arch="x86_64").restore(sys.argv[2]).to_dict()))
except SystemFilesError as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_who_may_only_read_is_given_what_is_intact_and_told_of_the_rest(
    snapshot: Snapshot, staged: Path, public: Path
) -> None:
    data_dir = public / "data"
    copy_data_dir(snapshot.data_dir, data_dir)
    subprocess.run(["chown", "-R", f"{nobody().pw_uid}:{nobody().pw_gid}", str(data_dir)], check=True)
    before = tree(data_dir)
    with writable_again(data_dir):
        ran = as_nobody(_RESTORE, data_dir, NAME, package=staged)
        assert ran.returncode == 0, ran.stderr
        found = json.loads(ran.stdout)
        assert [found[kind]["sha256"] for kind in found] == [part.sha256 for part in snapshot.files]
        assert tree(data_dir) == before
    kernel = Path(found["kernel"]["path"])
    replace(kernel)
    damaged = kernel.read_bytes()
    with writable_again(data_dir):
        ran = as_nobody(_RESTORE, data_dir, NAME, package=staged)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.startswith("SourceUnavailable: "), ran.stdout
        assert "cannot be written" in ran.stdout
        assert snapshot.files.kernel.sha256 in ran.stdout
        assert kernel.read_bytes() == damaged


def test_what_is_intact_needs_no_catalog_and_no_network(snapshot: Snapshot, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.toml"
    catalog.write_text("this is no catalog")
    for by in WAYS:
        snapshot.assert_exact(snapshot.restore(by, catalog=catalog))
    words = ["-m", "systemfiles.cli", "restore", NAME, "--full", "--data-dir", str(snapshot.data_dir)]
    ran = completed([*without_network(), sys.executable, *words])
    assert ran.returncode == 0, ran.stderr
    delete(snapshot.place.kernel)
    with pytest.raises(CatalogError):
        snapshot.restore(catalog=catalog)
    ran = completed([*without_network(), sys.executable, *words])
    assert (ran.returncode, str(snapshot.files.kernel.path) in ran.stdout) == (0, True), ran.stderr


def test_several_processes_and_threads_restore_the_same_at_once_and_the_origin_is_asked_once(
    snapshot: Snapshot, mirror: Mirror
) -> None:
    snapshot.lose("kernel", "initrd")
    command = [sys.executable, "-m", "systemfiles.cli", "restore", NAME, "--json", "--data-dir", str(snapshot.data_dir)]
    processes = [subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    restored: list[BootFiles] = []
    threads = [threading.Thread(target=lambda: restored.append(snapshot.restore())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in processes:
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        restored.append(BootFiles.from_dict(json.loads(printed)))
    assert len(restored) == 5
    for files in restored:
        snapshot.assert_exact(files)
    assert mirror.requests == [*KERNEL_AGAIN]


def test_collections_meanwhile_take_nothing_of_it(snapshot: Snapshot, mirror: Mirror) -> None:
    command = ["gc", "--grace", "0", "--keep-last", "0", "--data-dir", str(snapshot.data_dir)]
    stop = threading.Event()
    collected: list[tuple[int, str]] = []

    def collect() -> None:
        while not stop.is_set():
            ran = systemfiles(*command)
            collected.append((ran.returncode, ran.stderr))

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        for damage in (without_artifacts, lambda place: snapshot.lose("initrd"), without_artifacts):
            damage(snapshot.place)
            snapshot.assert_exact(snapshot.restore())
    finally:
        stop.set()
        thread.join()
    assert {status for status, _ in collected} == {0}, collected
    snapshot.assert_exact(snapshot.restore(full=True))


# ── an initrd that was compressed again ──────────────────────────────────────────────────────────────────────────────


def test_an_initrd_is_the_same_whatever_compressed_it(snapshot: Snapshot, tmp_path: Path) -> None:
    repacked = gzip.compress(gzip.decompress(snapshot.place.initrd_file.read_bytes()), 1, mtime=0)
    snapshot.lose("initrd")
    put_again(snapshot, repacked)
    for by in WAYS:
        restored = snapshot.restore(by)
        assert restored.initrd.content_sha256 == snapshot.files.initrd.content_sha256
        assert restored.initrd.path.read_bytes() == repacked
    delete(snapshot.place.initrd)
    assert snapshot.restore() == restored


def test_one_whose_record_claims_the_content_is_not_believed_for_that(snapshot: Snapshot, mirror: Mirror) -> None:
    packed = snapshot.place.initrd_file.read_bytes()
    delete(snapshot.place.initrd)
    put_again(snapshot, gzip.compress(gzip.decompress(packed) + b"\0" * 512))
    snapshot.assert_exact(snapshot.restore())
    assert mirror.requests == []


def put_again(snapshot: Snapshot, data: bytes) -> None:
    """Lets this be the initrd of the snapshot's version, with the content that it had."""
    pin = json.loads((snapshot.place.system / "pins" / f"{NAME}.json").read_text())
    record = pin["initrd"]["record"]
    record["files"] = {AN_INITRD: {"sha256": Digest.of(data).hex, "size": len(data)}}
    store = Store(snapshot.system().paths, Artifacts(snapshot.system().paths))
    store.put(record, {AN_INITRD: store.layout.add_bytes(data, "application/octet-stream")})
