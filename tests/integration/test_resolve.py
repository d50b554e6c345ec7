"""Resolving: offline, read-only, exact; what is damaged, swapped or not there is never handed out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from systemfiles import (
    BootFiles,
    DigestMismatch,
    IncompatiblePair,
    IntegrityError,
    InvalidName,
    NotProvisioned,
    SizeMismatch,
    SystemFiles,
)
from tests.conftest import ARCHES, Provisioned
from tests.integration.support import (
    Mirror,
    as_nobody,
    completed,
    nobody,
    systemfiles,
    tree,
    without_network,
    writable_again,
)

pytestmark = pytest.mark.network

# Refuses, from inside the interpreter, all that resolving has no business with: sockets, other programs, and opening
# anything below the data directory for writing.
_NOTHING_BUT_READING = """
import json, os, sys
data_dir, kernel, initrd = sys.argv[1:]
from systemfiles import SystemFiles
def refuse(event, arguments):
    if event.startswith(("socket.", "subprocess.")) or event in ("os.exec", "os.fork", "os.posix_spawn"):
        raise RuntimeError(f"{event} {arguments}")
sys.addaudithook(refuse)
files = SystemFiles(data_dir, profile="debian", arch="x86_64").resolve(kernel or None, initrd or None)
print(json.dumps(files.to_dict()))
"""


@pytest.mark.parametrize("named", [True, False], ids=["by version", "by default"])
def test_a_copy_resolves_without_network_for_a_user_who_may_only_read(
    named: bool, provisioned: Provisioned, staged: Path, public: Path
) -> None:
    original = provisioned.boot_files("x86_64")
    versions = (original.kernel.version, original.initrd.version) if named else ("", "")
    data_dir = public / "data"
    subprocess.run(["cp", "-a", "--reflink=auto", str(provisioned.data_dir), str(data_dir)], check=True)
    subprocess.run(["chown", "-R", f"{nobody().pw_uid}:{nobody().pw_gid}", str(data_dir)], check=True)
    before = tree(data_dir)
    with writable_again(data_dir):
        ran = as_nobody(_NOTHING_BUT_READING, data_dir, *versions, package=staged)
    assert ran.returncode == 0, ran.stderr
    files = BootFiles.from_dict(json.loads(ran.stdout))
    assert files.kernel == original.kernel._replace(
        path=data_dir / original.kernel.path.relative_to(provisioned.data_dir)
    )
    assert files.initrd == original.initrd._replace(
        path=data_dir / original.initrd.path.relative_to(provisioned.data_dir)
    )
    assert tree(data_dir) == before


def test_the_path_command_needs_no_network(copied: Path) -> None:
    words = ["path", "--profile", "debian", "--arch", "x86_64", "--data-dir", str(copied)]
    ran = completed([*without_network(), sys.executable, "-m", "systemfiles.cli", *words])
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines()] == ["kernel", "initrd"]


def test_resolving_needs_no_catalog_lock_content_store_or_sums(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = SystemFiles(copied, profile="debian", arch="x86_64").resolve()
    for name in ("versions.lock", "SHA256SUMS"):
        (copied / "system" / name).unlink()
    for path in (copied / "system" / "oci-cache", copied / "tmp", copied / "locks"):
        shutil.rmtree(path)
    monkeypatch.setenv("SYSTEMFILES_CATALOG", "/nonexistent/versions.toml")
    assert SystemFiles(copied, arch="x86_64").resolve(files.kernel.version, files.initrd.version) == files


@pytest.mark.parametrize("arch", ARCHES)
def test_default_versions_are_the_concrete_ones(arch: str, provisioned: Provisioned) -> None:
    system = SystemFiles(provisioned.data_dir, profile="debian", arch=arch)
    versions, files = system.default_versions(), system.resolve()
    assert versions == (files.kernel.version, files.initrd.version)
    assert versions.kernel.startswith("debian-cloud-")
    assert versions.initrd == f"v1.0.0-{files.initrd.content_sha256[:12]}"


def test_a_rolling_name_is_not_resolved_but_explained(provisioned: Provisioned) -> None:
    system = SystemFiles(provisioned.data_dir, profile="debian", arch="x86_64")
    versions = system.default_versions()
    for name, find, concrete in (
        ("debian-cloud", system.kernel_path, versions.kernel),
        ("v1.0.0-debian", system.initrd_path, versions.initrd),
    ):
        with pytest.raises(NotProvisioned) as caught:
            find(name)
        assert concrete in str(caught.value)


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Pair:
    """A copied data directory's x86_64 files, and how to ask for them again."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.system = data_dir / "system"
        files = SystemFiles(data_dir, profile="debian", arch="x86_64").resolve()
        self.versions = files.kernel.version, files.initrd.version
        self.kernel = files.kernel.path
        self.initrd = files.initrd.path

    def other(self, kind: str) -> Path:
        """The directory of the other architecture's artifact of that kind."""
        (record,) = (self.system / kind).glob("*/aarch64/artifact.json")
        return record.parent

    def resolve(self) -> BootFiles:
        return SystemFiles(self.data_dir, arch="x86_64").resolve(*self.versions)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"\0")


def flip(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def replace(path: Path) -> None:
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(bytes(size))


def link_elsewhere(path: Path) -> None:
    aside = path.with_name("aside")
    path.rename(aside)
    path.symlink_to(aside)


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put(source: Path, target: Path) -> None:
    target.unlink()
    shutil.copy(source, target)


def put_directory(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


def lie_about_size(record: Path) -> None:
    facts = json.loads(record.read_text())
    for file in facts["files"].values():
        file["size"] += 1
    record.unlink()
    record.write_text(json.dumps(facts))


Damage = Callable[[Pair], object]
DAMAGES: dict[str, tuple[type[Exception], Damage]] = {
    "kernel truncated": (SizeMismatch, lambda p: truncate(p.kernel)),
    "initrd truncated": (SizeMismatch, lambda p: truncate(p.initrd)),
    "kernel grown": (SizeMismatch, lambda p: grow(p.kernel)),
    "kernel changed in one bit": (DigestMismatch, lambda p: flip(p.kernel)),
    "initrd changed in one bit": (DigestMismatch, lambda p: flip(p.initrd)),
    "kernel replaced by one of its size": (DigestMismatch, lambda p: replace(p.kernel)),
    "initrd replaced by one of its size": (DigestMismatch, lambda p: replace(p.initrd)),
    "kernel swapped for the other architecture's": (
        SizeMismatch,
        lambda p: put(p.other("kernel") / "Image", p.kernel),
    ),
    "initrd swapped for the other architecture's": (
        SizeMismatch,
        lambda p: put(p.other("initrd") / "initrd", p.initrd),
    ),
    "kernel swapped for the initrd": (SizeMismatch, lambda p: put(p.initrd, p.kernel)),
    "kernel directory swapped for the other architecture's": (
        IntegrityError,
        lambda p: put_directory(p.other("kernel"), p.kernel.parent),
    ),
    "initrd directory swapped for the kernel's": (
        IntegrityError,
        lambda p: put_directory(p.kernel.parent, p.initrd.parent),
    ),
    "kernel behind a symlink": (IntegrityError, lambda p: link_elsewhere(p.kernel)),
    "kernel turned into a directory": (IntegrityError, lambda p: make_directory(p.kernel)),
    "record cut off": (IntegrityError, lambda p: os.truncate(p.kernel.with_name("artifact.json"), 200)),
    "record emptied": (IntegrityError, lambda p: os.truncate(p.kernel.with_name("artifact.json"), 0)),
    "record of another artifact": (
        IntegrityError,
        lambda p: put(p.initrd.with_name("artifact.json"), p.kernel.with_name("artifact.json")),
    ),
    "record with other sizes": (SizeMismatch, lambda p: lie_about_size(p.kernel.with_name("artifact.json"))),
    "kernel deleted": (NotProvisioned, lambda p: p.kernel.unlink()),
    "record deleted": (NotProvisioned, lambda p: p.kernel.with_name("artifact.json").unlink()),
    "kernel's directory deleted": (NotProvisioned, lambda p: shutil.rmtree(p.kernel.parent)),
    "initrd's directory deleted": (NotProvisioned, lambda p: shutil.rmtree(p.initrd.parent)),
    "everything deleted": (NotProvisioned, lambda p: shutil.rmtree(p.system)),
}


@pytest.fixture
def pair(provisioned: Provisioned, tmp_path: Path) -> Pair:
    """A copy of what resolving reads: no blobs, no modules."""
    target = tmp_path / "data"
    for part in ("kernel", "initrd"):
        shutil.copytree(
            provisioned.data_dir / "system" / part,
            target / "system" / part,
            ignore=shutil.ignore_patterns("modules.tar", "stamp.json"),
        )
    files = provisioned.boot_files("x86_64")
    shutil.copy(provisioned.data_dir / "system" / "versions.lock", target / "system")
    shutil.copy(
        files.kernel.path.with_name("modules.tar"), target / files.kernel.path.parent.relative_to(provisioned.data_dir)
    )
    subprocess.run(["chmod", "-R", "u+w", str(target)], check=True)
    return Pair(target)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_not_handed_out(damage: tuple[type[Exception], Damage], pair: Pair) -> None:
    expected, do = damage
    do(pair)
    with pytest.raises(expected) as caught:
        pair.resolve()
    error = caught.value
    if isinstance(error, IntegrityError):
        assert error.expected != error.got
        assert "handed out" in error.consequence
        assert str(pair.system) in str(error.subject)
    if isinstance(error, NotProvisioned):
        assert str(pair.system) in str(error.looked_in)
        assert error.version in pair.versions
    ran = systemfiles(
        "path",
        "--kernel",
        pair.versions[0],
        "--initrd",
        pair.versions[1],
        "--arch",
        "x86_64",
        "--data-dir",
        pair.data_dir,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", f"error: {error}\n")


def test_damage_done_while_a_process_runs_is_seen_by_that_process(pair: Pair) -> None:
    system = SystemFiles(pair.data_dir, arch="x86_64")
    system.resolve(*pair.versions)
    flip(pair.kernel)
    with pytest.raises(DigestMismatch):
        system.resolve(*pair.versions)


def test_a_damaged_initrd_does_not_keep_the_kernel_from_resolving(pair: Pair) -> None:
    flip(pair.initrd)
    assert SystemFiles(pair.data_dir, arch="x86_64").kernel_path(pair.versions[0]) == pair.kernel


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────

TRAVERSALS = (
    "..",
    ".",
    "../../../etc",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\nb",
    "a\0b",
    "A",
    "-x",
    ".hidden",
    "é",
    "a" * 97,
    "a ",
)


@pytest.mark.parametrize("name", TRAVERSALS)
def test_a_name_that_is_no_version_is_refused_by_every_method(
    name: str, provisioned: Provisioned, tmp_path: Path
) -> None:
    system = SystemFiles(provisioned.data_dir, arch="x86_64")
    kernel, initrd = (part.version for part in provisioned.boot_files("x86_64"))
    for call in (
        lambda: system.resolve(name, initrd),
        lambda: system.resolve(kernel, name),
        lambda: system.kernel_path(name),
        lambda: system.initrd_path(name),
        lambda: system.ensure(name, initrd),
        lambda: system.ensure(kernel, name),
        lambda: system.add_kernel(tmp_path / "vmlinux", name),
    ):
        with pytest.raises(InvalidName) as caught:
            call()
        assert caught.value.name == name


@pytest.mark.parametrize("name", ["../../../etc", "/etc/passwd", "a\nb"])
def test_a_name_that_is_no_version_is_refused_on_the_command_line(name: str, provisioned: Provisioned) -> None:
    for command in (
        ["path", f"--kernel={name}"],
        ["path", f"--initrd={name}"],
        ["path", f"--kernel={name}", f"--initrd={name}", "--json"],
        ["provision", f"--kernel={name}"],
        ["add", "kernel", "/nonexistent", f"--version={name}"],
    ):
        ran = systemfiles(*command, "--data-dir", provisioned.data_dir)
        assert ran.returncode not in (0, 2), command
        assert f"{name!r} is not a valid" in ran.stderr, command
        assert "Traceback" not in ran.stderr, command


# ── pairs and versions the catalog does not know ─────────────────────────────────────────────────────────────────────


def test_an_initrd_does_not_go_with_a_kernel_whose_modules_it_does_not_carry(copied: Path) -> None:
    system = SystemFiles(copied, profile="debian", arch="x86_64")
    files = system.resolve()
    system.add_kernel(files.kernel.path, "my-6.1")
    for ask in (system.resolve, system.ensure):
        with pytest.raises(IncompatiblePair) as caught:
            ask("my-6.1", files.initrd.version)
        error = caught.value
        assert (error.kernel, error.initrd, error.requires) == ("my-6.1", files.initrd.version, files.kernel.version)


def test_a_kernel_without_modules_gets_an_initrd_that_goes_with_any_other_such(copied: Path) -> None:
    system = SystemFiles(copied, profile="debian", arch="x86_64")
    plain = system.resolve().kernel.path
    for version in ("my-6.1", "my-6.2"):
        system.add_kernel(plain, version)
    first, second = system.ensure("my-6.1"), system.ensure("my-6.2")
    assert first.initrd == second.initrd
    assert system.resolve("my-6.2", first.initrd.version) == second


def test_a_version_that_no_catalog_knows_resolves_and_verifies(copied: Path) -> None:
    system = SystemFiles(copied, profile="debian", arch="x86_64")
    added = system.add_kernel(system.resolve().kernel.path, "dropped-1")
    files = system.ensure("dropped-1")
    assert "dropped-1" not in system.catalog.kernel
    assert SystemFiles(copied, arch="x86_64").resolve("dropped-1", files.initrd.version).kernel == added
    assert system.verify().problems == ()


# ── ensure ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ensuring_again_gives_the_same_and_touches_nothing(copied: Path, mirror: Mirror) -> None:
    first = SystemFiles(copied, profile="debian", arch="x86_64").ensure()
    before = {path: path.lstat().st_ctime_ns for path in sorted(copied.rglob("*"))}
    again = SystemFiles(copied, profile="debian", arch="x86_64").ensure()
    assert again == first
    assert {path: path.lstat().st_ctime_ns for path in sorted(copied.rglob("*"))} == before
    assert mirror.requests == []


_FOUR_AT_ONCE = """
import json, sys, threading
from concurrent.futures import ThreadPoolExecutor
from systemfiles import SystemFiles
system = SystemFiles(sys.argv[1], profile="debian", arch="x86_64")
together = threading.Barrier(4)
def ensure(_):
    together.wait()
    return system.ensure(timeout=120).to_dict()
print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(4) as threads:
    print(json.dumps(list(threads.map(ensure, range(4)))))
"""


def test_eight_who_ask_at_once_share_one_download_and_one_build(
    provisioned: Provisioned, mirror: Mirror, tmp_path: Path
) -> None:
    original = provisioned.boot_files("x86_64")
    data_dir = tmp_path / "data"
    (data_dir / "system").mkdir(parents=True)
    shutil.copy(provisioned.data_dir / "system" / "versions.lock", data_dir / "system")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _FOUR_AT_ONCE, str(data_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [answer for process in processes for answer in json.loads(process.communicate(timeout=120)[0])]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(answers) == 8
    assert all(answer == answers[0] for answer in answers)
    assert BootFiles.from_dict(answers[0]).initrd.content_sha256 == original.initrd.content_sha256
    assert mirror.requests == ["busybox x86_64", "kernel x86_64"]
    assert not any((data_dir / "tmp").iterdir())
    assert SystemFiles(data_dir).verify().problems == ()
    shutil.rmtree(data_dir)
