"""What versions promise when something is odd: shared names, losses, damage, crowds, full disks, foreign entries."""

from __future__ import annotations

import functools
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from systemfiles import BootFiles, DigestMismatch, IncompatiblePair, NoSpace, SystemFiles, VersionConflict
from systemfiles.content.descriptors import Descriptor
from systemfiles.content.layout import Layout
from systemfiles.foundation import files
from systemfiles.foundation.digest import Digest, hash_file
from systemfiles.foundation.paths import Paths
from tests.conftest import ARCHES, CHECKOUT, Provisioned, doit
from tests.integration.support import (
    CLOSED,
    Completed,
    Mirror,
    apt_archive,
    apt_conf,
    completed,
    done_tasks,
    systemfiles,
    tree,
    without_network,
)
from tests.registries import registry

pytestmark = pytest.mark.network

REF_NAME = "org.opencontainers.image.ref.name"
DEBIAN = ("profile=debian", "arch=x86_64")
LOAD = ["virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "overlay"]


def system(data_dir: Path, catalog: Path | None = None, *, profile: str = "debian") -> SystemFiles:
    return SystemFiles(data_dir, catalog=catalog, profile=profile, arch="x86_64")


def overlay(directory: Path, text: str) -> Path:
    path = directory / "catalog.toml"
    path.write_text(f"schema = 1\n{text}")
    return path


def initrd_entry(name: str, *, load: list[str] = LOAD, carry: list[str]) -> str:
    lists = f"load = {json.dumps(load)}\ncarry = {json.dumps(carry)}\n"
    return f'[initrd."{name}"]\ninit = "v1.0.0"\nbusybox = {{ apt = "busybox-static" }}\n{lists}'


def pinned_kernel(name: str, source: Path, arch: str = "x86_64") -> str:
    return f'[kernel."{name}".files.{arch}]\nurl = "{source.as_uri()}"\nsha256 = "{hash_file(source)[0].hex}"\n'


def profile_entry(name: str, kernel: str, initrd: str) -> str:
    return f'[profile.{name}]\nkernel = "{kernel}"\ninitrd = "{initrd}"\n'


def other_kernel(source: Path, target: Path) -> Path:
    """A kernel that boots as well as `source`, of other bytes."""
    target.write_bytes(source.read_bytes() + bytes(4096))
    return target


def index_of(data_dir: Path) -> Path:
    return data_dir / "system" / "oci-cache" / "index.json"


def versions_lock(data_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((data_dir / "system" / "versions.lock").read_text())
    return found


def with_lock_only(provisioned: Provisioned, data_dir: Path) -> Path:
    """A data directory that knows which versions it wants and has none of them."""
    (data_dir / "system").mkdir(parents=True)
    shutil.copy(provisioned.data_dir / "system" / "versions.lock", data_dir / "system")
    return data_dir


def ok(ran: Completed) -> Completed:
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    return ran


def refused(ran: Completed) -> Completed:
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "error: " in ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    return ran


def assert_up_to_date(ran: Completed) -> None:
    assert done_tasks(ok(ran).stdout) == set(), ran.stdout


# ── one content is one version ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def same_content(tmp_path: Path) -> Path:
    """A catalog whose Debian initrd names a module twice: other inputs, the same cpio."""
    return overlay(tmp_path, initrd_entry("v1.0.0-debian", carry=["erofs", "squashfs", "virtio_net"]))


def test_two_sets_of_inputs_that_give_one_content_are_one_version(
    same_content: Path, copied: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = system(copied).resolve()
    record = first.initrd.path.with_name("artifact.json")
    before = record.stat()
    for _ in range(2):
        assert system(copied, same_content).ensure() == first
        assert system(copied, same_content).resolve() == first
        assert system(copied).ensure() == first
        assert system(copied).resolve() == first
    assert (record.stat().st_ino, record.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    for catalog in (same_content, None, same_content):
        monkeypatch.setenv("SYSTEMFILES_CATALOG", str(catalog or ""))
        assert_up_to_date(doit(*DEBIAN, f"data_dir={copied}"))
        assert system(copied).ensure(first.kernel.version, first.initrd.version) == first
    assert system(copied).verify().problems == ()
    assert mirror.requests == []


def test_a_version_of_two_sets_of_inputs_is_made_again_from_either(
    same_content: Path, copied: Path, mirror: Mirror
) -> None:
    first = system(copied, same_content).ensure()
    index, versions = index_of(copied), copied / "system" / "versions.lock"
    for catalog, lost in ((same_content, None), (None, None), (same_content, versions)):
        shutil.rmtree(first.initrd.path.parent)
        found = json.loads(index.read_text())
        found["manifests"] = [entry for entry in found["manifests"] if first.initrd.version not in json.dumps(entry)]
        index.write_text(json.dumps(found))
        if lost is None:
            assert system(copied, catalog).ensure(first.kernel.version, first.initrd.version) == first
        else:
            lost.unlink()
        assert system(copied, catalog).ensure() == first
        assert system(copied, same_content).ensure() == first
        assert system(copied).ensure() == first
    assert mirror.requests == []


# ── a concrete version never changes, whatever was lost of it ────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("by", "lost"),
    [("ensure", "my-1"), ("provision", "my-1"), ("ensure", "my-1/x86_64/artifact.json")],
    ids=["directory, ensure", "directory, provision", "record, ensure"],
)
def test_a_lost_kernel_is_not_replaced_under_its_name_but_recovered(
    by: str, lost: str, copied: Path, tmp_path: Path
) -> None:
    here = system(copied)
    original = here.resolve().kernel.path
    added = here.add_kernel(original, "my-1")
    gone = copied / "system" / "kernel" / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(VersionConflict):
        system(copied).add_kernel(other_kernel(original, tmp_path / "vmlinux"), "my-1")
    if by == "ensure":
        assert system(copied).ensure(kernel="my-1").kernel == added
    else:
        ran = ok(systemfiles("provision", "--kernel", "my-1", "--arch", "x86_64", "--data-dir", copied))
        assert str(added.path) in ran.stdout
    assert system(copied).kernel("my-1") == added
    assert hash_file(added.path)[0].hex == added.sha256
    with pytest.raises(VersionConflict):
        system(copied).add_kernel(tmp_path / "vmlinux", "my-1")


def test_a_pinned_kernel_whose_files_are_damaged_is_not_replaced_by_what_its_entry_says_now(
    copied: Path, tmp_path: Path
) -> None:
    original = system(copied).resolve().kernel.path
    catalog = overlay(tmp_path, pinned_kernel("pinned-1", original))
    first = system(copied, catalog).ensure(kernel="pinned-1").kernel
    catalog = overlay(tmp_path, pinned_kernel("pinned-1", other_kernel(original, tmp_path / "vmlinux")))
    first.path.unlink()
    first.path.with_name("artifact.json").unlink()
    with pytest.raises(VersionConflict):
        system(copied, catalog).ensure(kernel="pinned-1")
    assert not first.path.exists()


def test_a_recovered_initrd_is_not_handed_out_with_a_kernel_it_does_not_fit(copied: Path, mirror: Mirror) -> None:
    files = system(copied).resolve()
    system(copied).add_kernel(files.kernel.path, "my-1")
    shutil.rmtree(files.initrd.path.parent)
    for _ in range(2):
        with pytest.raises(IncompatiblePair):
            system(copied).ensure("my-1", files.initrd.version)
    assert system(copied).ensure(files.kernel.version, files.initrd.version) == files
    with pytest.raises(IncompatiblePair):
        system(copied).ensure("my-1", files.initrd.version)
    assert mirror.requests == []


# ── an update moves one profile and breaks no other ──────────────────────────────────────────────────────────────────


@pytest.fixture
def tomorrow(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt knows one archive only, which is on loopback and is newer than everything."""
    directory = tmp_path / "apt"
    directory.mkdir()
    monkeypatch.setenv("APT_CONFIG", str(apt_archive(mirror, directory, kernel="99.1-1", busybox="1:99-1")))


def test_after_an_update_of_one_profile_others_resolve_by_their_defaults(
    copied: Path, tomorrow: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = system(copied).resolve()
    # what each shares with the profile that is updated: both, the kernel, the busybox
    profiles = {
        "alike": ("debian-cloud", "v1.0.0-debian"),
        "small": ("debian-cloud", "small"),
        "pinned": ("pinned-1", "v1.0.0-debian"),
    }
    entries = (
        pinned_kernel("pinned-1", original.kernel.path),
        initrd_entry("small", load=["virtio_blk"], carry=[]),
        *(profile_entry(name, *pair) for name, pair in profiles.items()),
    )
    monkeypatch.setenv("SYSTEMFILES_CATALOG", str(overlay(tmp_path, "".join(entries))))
    before = {name: system(copied, profile=name).ensure() for name in profiles}

    moved = ok(doit("update", *DEBIAN, f"data_dir={copied}"))
    assert "→ debian-cloud-99.1-1" in moved.stdout
    for name, old in before.items():
        now = system(copied, profile=name).resolve()
        printed = ok(systemfiles("path", "--profile", name, "--arch", "x86_64", "--data-dir", copied)).stdout
        assert printed == f"kernel  {now.kernel.path}\ninitrd  {now.initrd.path}\n"
        assert now.kernel.version == ("pinned-1" if name == "pinned" else "debian-cloud-99.1-1")
        assert system(copied).resolve(old.kernel.version, old.initrd.version) == old
        assert system(copied, profile=name).ensure() == now
    assert system(copied, profile="pinned").resolve() == before["pinned"]
    assert system(copied).resolve(original.kernel.version, original.initrd.version) == original


def test_an_update_of_nothing_rolling_does_not_ask_apt(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = copied / "system" / "oci-cache"
    names = Layout(Paths(copied)).names()
    (image,) = (name for name in names if name.startswith("busybox") and name.endswith("x86_64"))
    with registry(tmp_path / "registry") as hub:
        reference = f"{hub.host}/library/busybox:1"
        copy = ("skopeo", "--insecure-policy", "copy", "--preserve-digests", "--dest-tls-verify=false")
        ok(completed([*copy, f"oci:{layout}:{image}", f"docker://{reference}"]))
        entries = (
            pinned_kernel("pinned-1", system(copied).resolve().kernel.path),
            f'[initrd.plain]\ninit = "v1.0.0"\nbusybox = "{reference}@{names[image].digest}"\n',
            profile_entry("fixed", "pinned-1", "plain"),
        )
        monkeypatch.setenv("SYSTEMFILES_CATALOG", str(overlay(tmp_path, "".join(entries))))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        without_apt(tmp_path, monkeypatch)
        ran = ok(doit("update", "profile=fixed", "arch=x86_64", f"data_dir={copied}"))
    assert "nothing moved" in ran.stdout
    files = system(copied, profile="fixed").resolve()
    assert (files.kernel.version, files.initrd.version) == ("pinned-1", "plain")
    assert str(files.initrd.path) in ran.stdout
    assert "nothing moved" in ok(doit("update", "profile=fixed", "arch=x86_64", f"data_dir={copied}")).stdout


def test_an_update_of_concrete_versions_does_not_ask_apt(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = system(copied).resolve()
    without_apt(tmp_path, monkeypatch)
    ran = ok(
        doit(
            "update",
            f"kernel={files.kernel.version}",
            f"initrd={files.initrd.version}",
            "arch=x86_64",
            f"data_dir={copied}",
        )
    )
    assert "nothing moved" in ran.stdout


def without_apt(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are looked for in an empty directory."""
    (directory / "bin").mkdir()
    monkeypatch.setenv("PATH", str(directory / "bin"))


# ── a crowd ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_ENSURE = """
import json, sys
from systemfiles import SystemFiles
system = SystemFiles(sys.argv[1], profile="debian", arch=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps(system.ensure(timeout=120).to_dict()))
"""


def test_eight_processes_in_an_empty_directory_ask_apt_once_and_get_one_answer(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive has another answer as soon as it has been asked, and again after the second time."""
    log, data_dir = moving_archive(mirror, tmp_path, monkeypatch), tmp_path / "data"
    answers = at_once([[sys.executable, "-c", _ENSURE, str(data_dir), arch] for arch in ARCHES * 4])
    assert sorted(log.read_text().split()) == ["amd64", "arm64"]
    for arch in ARCHES:
        (answer,) = {json.dumps(found) for found in answers if found["kernel"]["arch"] == arch}
        first = BootFiles.from_dict(json.loads(answer))
        assert first.kernel.version in ("debian-cloud-6.1.1-1", "debian-cloud-99.1-1")
        assert versions_lock(data_dir)["rolling"]["debian-cloud"][arch] == first.kernel.version
        assert SystemFiles(data_dir, profile="debian", arch=arch).ensure() == first
        ok(doit("profile=debian", f"arch={arch}", f"data_dir={data_dir}"))
        assert SystemFiles(data_dir, profile="debian", arch=arch).resolve() == first
    assert sorted(log.read_text().split()) == ["amd64", "arm64"]
    assert mirror.requests.count("kernel x86_64") == mirror.requests.count("kernel aarch64") == 1
    assert not any((data_dir / "tmp").iterdir())
    assert SystemFiles(data_dir).verify().problems == ()
    shutil.rmtree(data_dir)


def at_once(commands: list[list[str]]) -> list[dict[str, Any]]:
    """What processes print that all get ready first and then start together."""
    processes = [
        subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for command in commands
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return [json.loads(text) for text in printed]


def moving_archive(mirror: Mirror, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both architectures' packages behind an apt that logs each update, after which the archive has newer ones."""
    now, later = directory / "now", directory / "later"
    for place, kernel in ((later, "99.1-1"), (now, "6.1.1-1")):  # the one that is made last is served
        place.mkdir()
        conf = apt_archive(mirror, place, kernel=kernel, busybox="1:1.35.0-1")
        add_arm64(mirror, place)
    log, programs, real = directory / "log", directory / "bin", shutil.which("apt-get")
    programs.mkdir()
    (programs / "apt-get").write_text(
        f'#!/bin/sh\n{real} "$@" || exit\n'
        'case "$*" in\n'
        f"*' update '*) echo \"$*\" | sed 's/.*APT::Architecture=\\([a-z0-9]*\\).*/\\1/' >>{log}\n"
        f"    cp {later}/Packages {later}/Release {now} ;;\n"
        "esac\n"
    )
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("APT_CONFIG", str(conf))
    return log


def add_arm64(mirror: Mirror, archive: Path) -> None:
    """Lets the archive that `apt_archive` made have the same packages for arm64."""
    packages = (archive / "Packages").read_text()
    arm64 = packages.replace("amd64", "arm64").replace(".deb", "_arm64.deb")
    for label, name in (("kernel", "linux-image-test"), ("busybox", "busybox-static")):
        theirs, ours = mirror.package(f"{label} x86_64"), mirror.package(f"{label} aarch64")
        arm64 = arm64.replace(theirs.name, ours.name).replace(
            f": {theirs.stat().st_size}\n", f": {ours.stat().st_size}\n"
        )
        mirror.serve(f"/apt/{name}_arm64.deb", ours)
    data = f"{packages}\n{arm64}".encode()
    (archive / "Packages").write_bytes(data)
    listed = f"Date: {formatdate(usegmt=True)}\nSHA256:\n {Digest.of(data).hex} {len(data)} Packages\n"
    (archive / "Release").write_text(listed)


# ── verify tells the truth, and what it told of is mended ────────────────────────────────────────────────────────────


def test_verify_of_a_directory_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in refused(systemfiles("verify", "--data-dir", nowhere)).stderr
    assert str(nowhere) in refused(doit("verify", *DEBIAN, f"data_dir={nowhere}")).stderr
    assert str(nowhere) in refused(systemfiles("verify", "--json", "--data-dir", nowhere)).stderr
    assert not nowhere.exists()


def parts_of(data_dir: Path, prefix: str) -> dict[str, Path]:
    """The blobs of the x86_64 image whose name starts so: its manifest, its config and its first layer."""
    layout = Layout(Paths(data_dir))
    (target,) = (found for name, found in layout.names().items() if name.startswith(prefix) and name.endswith("x86_64"))
    manifest = layout.read_json(target.digest)
    config, layer = (Descriptor.from_json(part).digest for part in (manifest["config"], manifest["layers"][0]))
    return {"manifest": layout.blob(target.digest), "config": layout.blob(config), "layer": layout.blob(layer)}


def blob_of_the_initrd(data_dir: Path) -> Path:
    return Layout(Paths(data_dir)).blob(Digest.from_hex(system(data_dir).resolve().initrd.sha256))


def lose(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def damage(path: Path) -> None:
    """Other bytes of the same size in a file of its own, so what was linked to it stays as it was."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.unlink()
    path.write_bytes(data)


WOUNDS: dict[str, Callable[[Path], None]] = {
    "kernels lost": lambda d: lose(d / "system" / "kernel"),
    "initrds lost": lambda d: lose(d / "system" / "initrd"),
    "record lost": lambda d: lose(system(d).resolve().kernel.path.with_name("artifact.json")),
    "content store lost": lambda d: lose(d / "system" / "oci-cache"),
    "index lost": lambda d: lose(index_of(d)),
    "oci-layout lost": lambda d: lose(index_of(d).with_name("oci-layout")),
    "config of busybox lost": lambda d: lose(parts_of(d, "busybox")["config"]),
    "config of busybox damaged": lambda d: damage(parts_of(d, "busybox")["config"]),
    "layer of busybox damaged": lambda d: damage(parts_of(d, "busybox")["layer"]),
    "config of the kernel damaged": lambda d: damage(parts_of(d, "kernel")["config"]),
    "manifest of the initrd damaged": lambda d: damage(parts_of(d, "initrd")["manifest"]),
    "record of the initrd damaged": lambda d: damage(parts_of(d, "initrd")["layer"]),
    "blob of the initrd damaged": lambda d: damage(blob_of_the_initrd(d)),
}


@pytest.mark.parametrize("wound", WOUNDS)
def test_verify_reports_a_loss_or_damage_and_is_clean_after_the_next_run(
    wound: str, copied: Path, mirror: Mirror
) -> None:
    before = system(copied).resolve()
    WOUNDS[wound](copied)
    refused(systemfiles("verify", "--data-dir", copied))
    ok(doit("profile=debian", f"arch={','.join(ARCHES)}", f"data_dir={copied}"))
    assert system(copied).verify().problems == ()
    assert system(copied).resolve() == before


@pytest.mark.parametrize("wound", [*WOUNDS, "kernel lost, disk and blob"])
def test_a_repair_makes_whole_what_was_lost_or_damaged(wound: str, copied: Path, mirror: Mirror) -> None:
    before = system(copied).resolve()
    if wound in WOUNDS:
        WOUNDS[wound](copied)
    else:
        lose(before.kernel.path)
        lose(Layout(Paths(copied)).blob(Digest.from_hex(before.kernel.sha256)))
    repaired = ok(systemfiles("verify", "--repair", "--data-dir", copied)).stdout
    assert "repaired: " in repaired
    assert repaired.endswith("are intact\n")
    assert mirror.requests == (["kernel x86_64"] if wound not in WOUNDS else ["busybox x86_64"] * ("busybox" in wound))
    assert system(copied).verify() == (4, (), ())
    assert system(copied).resolve() == before
    ok(systemfiles("verify", "--repair", "--data-dir", copied))


def test_what_cannot_be_repaired_is_told_with_the_reason_and_the_rest_is_repaired(copied: Path, mirror: Mirror) -> None:
    before = system(copied).resolve()
    source = copied / "vmlinux"
    source.write_bytes(before.kernel.path.read_bytes() + b"one more byte")
    added = system(copied).add_kernel(source, "my-1")
    source.unlink()
    for lost in (added, before.kernel):
        lose(lost.path)
        lose(Layout(Paths(copied)).blob(Digest.from_hex(lost.sha256)))
    ran = refused(systemfiles("verify", "--repair", "--data-dir", copied))
    assert "repaired: " in ran.stdout
    assert "systemfiles add kernel FILE --version my-1" in ran.stderr
    assert str(added.path) in ran.stderr
    assert f"kernel {before.kernel.version}" not in ran.stderr
    assert system(copied).resolve() == before


def test_a_repair_does_not_mind_what_the_catalog_says_now(copied: Path, mirror: Mirror, tmp_path: Path) -> None:
    files = system(copied).resolve()
    added = system(copied).add_kernel(files.kernel.path, "my-1")
    lose(added.path)
    overlay = tmp_path / "versions.toml"
    overlay.write_text(f'schema = 1\n[kernel.my-1.files.x86_64]\nurl = "{CLOSED}x"\nsha256 = "{"0" * 64}"\n')
    ok(systemfiles("verify", "--repair", "--data-dir", copied, "--catalog-file", overlay))
    assert added.path.read_bytes() == files.kernel.path.read_bytes()


def test_verify_reads_the_lists_too_and_a_repair_says_which_it_cannot_write(copied: Path, mirror: Mirror) -> None:
    sums, lock = copied / "system" / "SHA256SUMS", copied / "system" / "versions.lock"
    sums.write_text("junk\n")
    assert "SHA256SUMS" in refused(systemfiles("verify", "--data-dir", copied)).stderr
    ok(systemfiles("verify", "--repair", "--data-dir", copied))
    lose(system(copied).resolve().kernel.path)
    whole = lock.read_text()
    lock.write_text(whole[:100])
    ran = refused(systemfiles("verify", "--repair", "--data-dir", copied))
    assert str(lock) in ran.stderr
    assert "repaired: " in ran.stdout
    lock.write_text(whole)
    ok(systemfiles("verify", "--data-dir", copied))


def test_no_initrd_is_built_of_rotten_modules(copied: Path, mirror: Mirror) -> None:
    before = system(copied).resolve()
    modules = before.kernel.path.with_name("modules.tar")
    rot(modules)
    shutil.rmtree(before.initrd.path.parent)
    lose(index_of(copied))  # or else it would be recovered
    lock = copied / "system" / "versions.lock"
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "initrd": {}, "current": {}}))
    with pytest.raises(DigestMismatch, match=r"modules\.tar"):
        system(copied).ensure()
    assert system(copied).ensure() == before


def rot(path: Path) -> None:
    """One other byte in the middle of a file, under all its names; same size, same time: a disk forgets."""
    found = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as out:
        out.seek(found.st_size // 2)
        byte = out.read(1)
        out.seek(found.st_size // 2)
        out.write(bytes([byte[0] ^ 0xFF]))
    path.chmod(found.st_mode)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("record", ["{", None], ids=["cut off", "a directory"])
def test_one_damaged_record_stops_nothing_else(record: str | None, copied: Path, mirror: Mirror) -> None:
    files = system(copied).resolve()
    path = system(copied).add_kernel(files.kernel.path, "my-1").path.with_name("artifact.json")
    path.unlink()
    path.mkdir() if record is None else path.write_text(record)
    ok(doit(*DEBIAN, f"data_dir={copied}"))
    assert_up_to_date(doit(*DEBIAN, f"data_dir={copied}"))
    listed = ok(systemfiles("ls", "--data-dir", copied)).stdout
    assert (files.kernel.version in listed, "my-1" in listed) == (True, False)
    shutil.rmtree(files.initrd.path.parent)
    ok(systemfiles("provision", "--profile", "debian", "--arch", "x86_64", "--data-dir", copied))
    assert system(copied).ensure() == files
    assert system(copied).add_kernel(files.kernel.path, "my-2").version == "my-2"
    assert "my-1" in refused(systemfiles("verify", "--data-dir", copied)).stderr


def test_a_lost_content_store_is_no_obstacle_without_a_network(copied: Path) -> None:
    files = system(copied).resolve()
    shutil.rmtree(copied / "system" / "oci-cache")
    command = [*without_network(), sys.executable, "-m", "doit", *DEBIAN, f"data_dir={copied}"]
    ran = ok(completed(command))
    assert "not here and not needed" in ran.stdout
    assert str(files.kernel.path) in ran.stdout
    assert str(files.initrd.path) in ran.stdout
    assert system(copied).verify().problems == ()
    shutil.rmtree(files.kernel.path.parent)
    shutil.rmtree(files.initrd.path.parent)
    ok(completed(command))  # what the first run put into the new content store is enough
    assert system(copied).resolve() == files


# ── other people's entries and names ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_a_foreign_entry_with_a_name_of_ours_is_not_lost(first: bool, copied: Path, mirror: Mirror) -> None:
    files = system(copied).resolve()
    layout = Layout(Paths(copied))
    empty = layout.add_bytes(b"{}", "application/vnd.oci.empty.v1+json").to_json()
    manifest = {"schemaVersion": 2, "config": empty, "layers": [empty]}
    target = layout.add_bytes(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json").to_json()
    names = ("kernel-my-1-x86_64", f"kernel-{files.kernel.version}-x86_64", f"initrd-{files.initrd.version}-x86_64")
    theirs = [{**target, "annotations": {REF_NAME: name, "com.example": "theirs"}} for name in names]
    index = json.loads(index_of(copied).read_text())
    ours = index["manifests"]
    index_of(copied).write_text(json.dumps({**index, "manifests": [*theirs, *ours] if first else [*ours, *theirs]}))

    assert_up_to_date(doit(*DEBIAN, f"data_dir={copied}"))
    added = system(copied).add_kernel(files.kernel.path, "my-1")
    for part in (files.kernel, files.initrd, added):
        shutil.rmtree(part.path.parent)
    assert system(copied).ensure() == files
    assert system(copied).ensure(kernel="my-1").kernel == added
    ok(doit(*DEBIAN, f"data_dir={copied}"))
    entries = json.loads(index_of(copied).read_text())["manifests"]
    assert [entry for entry in entries if entry in theirs] == theirs
    assert [entry for entry in ours if entry not in entries] == []
    assert system(copied).verify().problems == ()


@pytest.mark.parametrize("name", ["../../../escaped/busybox", "library/../../../../escaped", "/escaped/busybox"])
def test_a_reference_that_climbs_creates_nothing_outside_the_data_directory(
    name: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = (
        f'[initrd.x]\ninit = "v1.0.0"\nbusybox = "docker.io/{name}@sha256:{"0" * 64}"\n',
        profile_entry("x", "debian-cloud", "x"),
    )
    monkeypatch.setenv("SYSTEMFILES_CATALOG", str(overlay(tmp_path, "".join(entries))))
    before, data = set(tmp_path.iterdir()), tree(copied / "system")
    ran = completed([*without_network(), sys.executable, "-m", "doit", "profile=x", f"data_dir={copied}"])
    assert ran.returncode != 0
    assert "Traceback" not in ran.stdout + ran.stderr
    assert set(tmp_path.iterdir()) == before
    assert tree(copied / "system") == data
    assert not [path for path in tmp_path.parent.rglob("*escaped*") if path.parent != copied / "locks"]


# ── selections ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "selection",
    [
        ("all=yes",),
        ("all=yes", "kernel=debian-cloud"),
        ("all=yes", "kernel=debian-cloud", "initrd=v1.0.0-debian"),
        ("-n", "4", "all=yes", "arch=aarch64,x86_64"),
        ("profile=debian", "arch=amd64,x86_64"),
        ("profile=debian", "arch=arm64,amd64,x86_64,aarch64"),
    ],
    ids=" ".join,
)
def test_a_selection_that_names_something_twice_runs(
    selection: tuple[str, ...], copied: Path, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = (
        profile_entry("cloud-hypervisor", "debian-cloud", "v1.0.0-debian"),
        profile_entry("same", "debian-cloud", "v1.0.0-debian"),
        profile_entry("other", "my-1", "v1.0.0-debian"),
        pinned_kernel("my-1", system(copied).resolve().kernel.path),
        pinned_kernel("my-1", SystemFiles(copied, profile="debian", arch="aarch64").resolve().kernel.path, "aarch64"),
    )
    monkeypatch.setenv("SYSTEMFILES_CATALOG", str(overlay(tmp_path, "".join(entries))))
    ok(doit(*selection, f"data_dir={copied}"))
    ran = ok(doit(*selection, f"data_dir={copied}"))
    assert_up_to_date(ran)
    printed = [line for line in ran.stdout.splitlines() if line.startswith(("kernel  ", "initrd  "))]
    assert mirror.requests == []
    assert len(printed) == len(set(printed)) > 0


def test_one_kernel_asked_for_alone_is_all_that_is_provided(
    provisioned: Provisioned, mirror: Mirror, tmp_path: Path
) -> None:
    data_dir = with_lock_only(provisioned, tmp_path / "data")
    original = provisioned.boot_files("x86_64").kernel
    ran = ok(systemfiles("provision", "--kernel", original.version, "--arch", "x86_64", "--data-dir", data_dir))
    assert mirror.requests == ["kernel x86_64"]
    assert not (data_dir / "system" / "initrd").exists()
    kernel = system(data_dir).kernel(original.version)
    assert kernel.sha256 == original.sha256
    assert ran.stdout.endswith(f"\nkernel  {kernel.path}\n")
    assert [artifact.version for artifact in system(data_dir).artifacts()] == [original.version]
    shutil.rmtree(data_dir)


@pytest.mark.parametrize("lost", ["artifacts", "blob"])
def test_one_initrd_asked_for_alone_is_provided_with_its_own_kernel(lost: str, copied: Path) -> None:
    files = system(copied).resolve()
    if lost == "blob":
        blob_of_the_initrd(copied).unlink()
    else:
        shutil.rmtree(files.kernel.path.parent)
    shutil.rmtree(files.initrd.path.parent)
    words = ("provision", "--initrd", files.initrd.version, "--arch", "x86_64", "--data-dir", str(copied))
    ran = ok(completed([*without_network(), sys.executable, "-m", "systemfiles.cli", *words]))
    assert ran.stdout.endswith(f"\nkernel  {files.kernel.path}\ninitrd  {files.initrd.path}\n")
    assert system(copied).resolve(files.kernel.version, files.initrd.version) == files


# ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────────

# everything is imported first, because another user may not be able to read a virtual environment
_MEMBER = """
import importlib, json, os, pkgutil, sys
from pathlib import Path
import elftools.elf.elffile, libarchive, platformdirs, requests, tqdm
import systemfiles
from systemfiles import SystemFiles
for module in pkgutil.walk_packages(systemfiles.__path__, "systemfiles."):
    importlib.import_module(module.name)
from systemfiles.foundation.lock import locked
user, group, data_dir, added = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
if os.geteuid() == 0:
    os.setgroups([group])
    os.setgid(user)
    os.setuid(user)
os.umask(0o077)
system = SystemFiles(data_dir, profile="debian", arch="x86_64")
files = system.ensure(timeout=60)
system.add_kernel(files.kernel.path, added)
system.provisioner().write_manifest()
for lock in sorted((data_dir / "locks").iterdir()):
    with locked(lock, timeout=5):
        pass
print(json.dumps({"files": files.to_dict(), "problems": [str(found) for found in system.verify().problems]}))
"""


def test_the_members_of_a_group_share_a_data_directory(
    provisioned: Provisioned, staged: Path, mirror: Mirror, public: Path
) -> None:
    """As root two users do, under a strict umask; else whoever runs this is the only member."""
    data_dir = with_lock_only(provisioned, public / "shared")
    privileged = os.geteuid() == 0
    group, members = (54321, (54322, 54323)) if privileged else (os.getegid(), (os.geteuid(),) * 2)
    for path in (data_dir, data_dir / "system"):
        os.chown(path, -1, group)
        path.chmod(0o2775)
    answers = []
    for number, member in enumerate((*members, members[0])):
        words = [str(member), str(group), str(data_dir), f"my-{number}"]
        ran = ok(completed([sys.executable, "-c", _MEMBER, *words], cwd=Path("/"), env=environment(staged)))
        answers.append(json.loads(ran.stdout))
        files = BootFiles.from_dict(answers[-1]["files"])
        # the next one recovers what this one made
        shutil.rmtree((files.initrd, files.kernel)[number % 2].path.parent)
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["problems"] == []
    assert mirror.requests == ["busybox x86_64", "kernel x86_64"]
    for path in [data_dir, *(path for path in data_dir.rglob("*") if path.is_dir())]:
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o2775, group), path


def environment(package: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(package)}


# ── apt ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sources_of_the_kind_mirror_file_give_plain_urls(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrors = tmp_path / "mirrors.list"
    mirrors.write_text(f"# nearest first\n\n{mirror.url}apt/\tpriority:1\n")
    apt_archive(mirror, tmp_path, kernel="6.1.1-1", busybox="1:1.35.0-1")
    conf = apt_conf(tmp_path, f"deb [trusted=yes] mirror+file:{mirrors} ./\n")
    with conf.open("a") as settings:
        settings.write('APT::Sandbox::User "root";\n')  # what apt drops root for cannot read a test's directory
    monkeypatch.setenv("APT_CONFIG", str(conf))
    data_dir = tmp_path / "data"
    ok(doit(*DEBIAN, f"data_dir={data_dir}"))
    lock = versions_lock(data_dir)
    urls = [
        lock["kernel"]["debian-cloud-6.1.1-1"]["x86_64"]["url"],
        lock["busybox"]["busybox-static"]["x86_64"]["url"],
    ]
    assert [url.replace("/./", "/") for url in urls] == [
        f"{mirror.url}apt/linux-image-test.deb",
        f"{mirror.url}apt/busybox-static.deb",
    ]
    assert system(data_dir).resolve().kernel.version == "debian-cloud-6.1.1-1"
    shutil.rmtree(data_dir)


# ── a full file system ───────────────────────────────────────────────────────────────────────────────────────────────

# a small file system that only this process and its children see, first too small and then not
_IN_LITTLE_SPACE = """
set -eu
small=$1 mount=$2 lock=$3 out=$4
shift 4
mount -t tmpfs -o "size=$small" none "$mount"
mkdir -p "$mount/data/system"
cp "$lock" "$mount/data/system/"
"$@" >"$out/stdout" 2>"$out/stderr" && exit 3
ls -A "$mount/data/tmp" >"$out/tmp"
mount -o remount,size=1g "$mount"
exec "$@"
"""


@functools.cache
def private_mounts() -> tuple[str, ...]:
    """What to put before a command that may then mount; nothing where that cannot be."""
    for words in (("unshare", "--mount"), ("unshare", "--map-root-user", "--mount")):
        with tempfile.TemporaryDirectory() as target:
            if shutil.which(words[0]) and completed([*words, "mount", "-t", "tmpfs", "none", target]).returncode == 0:
                return words
    return ()


@pytest.mark.parametrize("size", ["20m", "120m", "169m"])
def test_a_full_file_system_is_told_leaves_nothing_and_is_no_more_once_there_is_space(
    size: str, provisioned: Provisioned, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not private_mounts():
        assert_full(provisioned, tmp_path, monkeypatch)
        return
    disk, lock = tmp_path / "disk", provisioned.data_dir / "system" / "versions.lock"
    disk.mkdir()
    command = [sys.executable, "-m", "doit", *DEBIAN, f"data_dir={disk / 'data'}"]
    ran = ok(
        completed(
            [*private_mounts(), "sh", "-c", _IN_LITTLE_SPACE, "sh", size, str(disk), str(lock), str(tmp_path), *command]
        )
    )
    told = (tmp_path / "stderr").read_text()
    assert "no space left" in told
    assert "Traceback" not in told + (tmp_path / "stdout").read_text()
    assert (tmp_path / "tmp").read_text() == ""
    assert {"kernel", "initrd"} <= {line.split()[0] for line in ran.stdout.splitlines() if line}


def test_a_device_without_space_is_told(
    provisioned: Provisioned, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_full(provisioned, tmp_path, monkeypatch)


def assert_full(provisioned: Provisioned, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new file that this process opens is on /dev/full for a while."""
    data_dir = with_lock_only(provisioned, directory / "data")
    make = files._open_private

    def full(path: str, flags: int) -> int:
        os.close(make(path, flags))
        return os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)

    kernel = provisioned.boot_files("x86_64").kernel
    with monkeypatch.context() as patch:
        patch.setattr(files, "_open_private", full)
        with pytest.raises(NoSpace):
            system(data_dir).add_kernel(kernel.path, "my-1")
    assert tree(data_dir / "system") == {"versions.lock"}
    assert not any((data_dir / "tmp").iterdir())
    assert system(data_dir).add_kernel(kernel.path, "my-1").sha256 == kernel.sha256
    shutil.rmtree(data_dir)
