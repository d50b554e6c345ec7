"""The same inputs make the same bytes, whoever builds, wherever and whenever; and other programs can read them."""

from __future__ import annotations

import gzip
import hashlib
import json
import posixpath
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from systemfiles import BootFiles
from tests.conftest import ARCHES, Provisioned
from tests.integration.support import Mirror, as_nobody, completed, nobody, tree

pytestmark = pytest.mark.network

# argv: data directory, umask in octal, how many seconds the clock is wrong by
_BUILD = """
import json, os, time
data_dir, mask, offset = sys.argv[1:]
os.umask(int(mask, 8))
real = time.time
time.time = lambda: real() + float(offset)
import systemfiles.content.store as store
store.Store.__init__.__kwdefaults__["clock"] = time.time
files = systemfiles.SystemFiles(data_dir, profile="debian", arch="x86_64").ensure(timeout=60)
print(json.dumps(files.to_dict()))
"""
TEN_YEARS = 10 * 365 * 86400


def build(
    data_dir: Path, *, package: Path, like: Provisioned, mask: str = "022", offset: int = 0, **env: str
) -> BootFiles:
    """Provides x86_64 from nothing but a versions.lock, as an unprivileged user in the given surroundings."""
    (data_dir / "system").mkdir(parents=True)
    shutil.copy(like.data_dir / "system" / "versions.lock", data_dir / "system")
    subprocess.run(["chown", "-R", f"{nobody().pw_uid}:{nobody().pw_gid}", str(data_dir)], check=True)
    ran = as_nobody(_BUILD, data_dir, mask, str(offset), package=package, env=env)
    assert ran.returncode == 0, ran.stderr
    return BootFiles.from_dict(json.loads(ran.stdout))


def reversed_copy(staged: Path, target: Path) -> Path:
    """The same package, its directory entries created in the opposite order."""
    for source in sorted(staged.rglob("*"), reverse=True):
        if source.is_file():
            copy = target / source.relative_to(staged)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    return target


def test_builds_in_different_surroundings_are_byte_identical(
    provisioned: Provisioned, mirror: Mirror, staged: Path, public: Path
) -> None:
    package = reversed_copy(staged, public / "package")
    here = build(public / "one", package=staged, like=provisioned, TZ="UTC", LC_ALL="C", PYTHONHASHSEED="0")
    there = build(
        public / "two",
        package=package,
        like=provisioned,
        mask="077",
        offset=TEN_YEARS,
        TZ="Pacific/Kiritimati",
        LC_ALL="tr_TR.UTF-8",
        PYTHONHASHSEED="4711",
        HOME="/nonexistent",
    )
    as_root = provisioned.boot_files("x86_64")
    for one, other in ((here, as_root), (there, as_root)):
        assert [part.sha256 for part in one] == [part.sha256 for part in other]
        assert [part.version for part in one] == [part.version for part in other]
        assert (sha256(one.kernel.path), sha256(one.initrd.path)) == (other.kernel.sha256, other.initrd.sha256)
    # modules, records and manifests: the content store as a whole, and everything in artifact.json but the time
    assert tree(public / "one") == tree(public / "two")
    assert tree(public / "one" / "system") <= tree(provisioned.data_dir / "system")
    for part, same in ((here.kernel.path, there.kernel.path), (here.initrd.path, there.initrd.path)):
        first, second = record(part), record(same)
        assert abs(int(second.pop("created_at")[:4]) - int(first.pop("created_at")[:4])) in (9, 10)
        assert first == second


def test_files_are_readable_by_everyone_and_writable_by_no_one_whatever_the_umask(
    provisioned: Provisioned, mirror: Mirror, staged: Path, public: Path
) -> None:
    files = build(public / "data", package=staged, like=provisioned, mask="077")
    for part in files:
        for path in (part.path, part.path.with_name("artifact.json")):
            assert oct(path.stat().st_mode & 0o777) == "0o444", path
        for directory in (part.path.parent, *part.path.parent.parents):
            assert directory.stat().st_mode & 0o055 == 0o055, directory
            if directory == public:
                break


# ── independent readers ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arch", ARCHES)
def test_cpio_and_bsdtar_read_an_initrd_and_agree_on_its_names(arch: str, provisioned: Provisioned) -> None:
    names = cpio_names(provisioned, arch)
    assert len(names) == len(set(names)) > 200
    assert {"init", "bin/busybox", "bin/sh", "dev/console", "etc/modules"} <= set(names)
    assert names == sorted(names, key=lambda name: name.split("/")) or names == sorted(names)
    assert [name.removesuffix("/") for name in bsdtar(provisioned, arch, "-tf").splitlines()] == names


@pytest.mark.parametrize("arch", ARCHES)
def test_every_parent_comes_before_what_is_in_it(arch: str, provisioned: Provisioned) -> None:
    seen = {"", "."}
    for name in cpio_names(provisioned, arch):
        assert posixpath.dirname(name) in seen, name
        seen.add(name)


@pytest.mark.parametrize("arch", ARCHES)
def test_owners_and_times_are_nobodys(arch: str, provisioned: Provisioned) -> None:
    listed = subprocess.run(
        ["cpio", "-itv", "--numeric-uid-gid", "--quiet"],
        input=unpacked(provisioned, arch),
        capture_output=True,
        check=True,
    ).stdout.decode()
    owners = {tuple(line.split()[2:4]) for line in listed.splitlines()}
    assert owners == {("0", "0")}
    assert {line[:10] for line in listed.splitlines() if line.endswith((" dev/console", " dev/null"))} == {
        "crw-rw-rw-",
    }
    ages = bsdtar(provisioned, arch, "-tvf", env={"TZ": "UTC", "LC_ALL": "C"})
    assert all("Jan  1  1970" in line for line in ages.splitlines())


@pytest.mark.parametrize("arch", ARCHES)
def test_every_symlink_leads_to_something_inside(arch: str, provisioned: Provisioned) -> None:
    names = set(cpio_names(provisioned, arch))
    links = dict(
        line.split(" 1970 ", 1)[1].split(" -> ")
        for line in bsdtar(provisioned, arch, "-tvf", env={"TZ": "UTC", "LC_ALL": "C"}).splitlines()
        if line.startswith("l")
    )
    assert len(links) > 200
    assert "sbin/modprobe" in links
    for name, target in links.items():
        if name.startswith("etc/dev/"):  # which init copies to /dev, when there is a /proc
            assert target.startswith("/proc/self/fd")
            continue
        assert posixpath.normpath(posixpath.join(posixpath.dirname(name), target)) in names, (name, target)


@pytest.mark.parametrize("arch", ARCHES)
def test_modprobe_finds_every_module_that_init_loads_or_the_image_may_need(arch: str, provisioned: Provisioned) -> None:
    names = set(cpio_names(provisioned, arch))
    (dep,) = (name for name in names if name.endswith("/modules.dep"))
    root = posixpath.dirname(dep)
    lines = bsdtar(provisioned, arch, "-xOf", dep).splitlines()
    dependencies = {path: rest.split() for path, _, rest in (line.partition(":") for line in lines)}
    modules = {name.removeprefix(f"{root}/") for name in names if name.endswith(".ko")}
    assert set(dependencies) == modules
    assert {needed for needs in dependencies.values() for needed in needs} <= modules
    available = {posixpath.basename(path).removesuffix(".ko").replace("-", "_") for path in modules}
    assert {"virtio_blk", "overlay", "erofs", "squashfs"} <= available
    asked = bsdtar(provisioned, arch, "-xOf", "etc/modules").split()
    assert "virtio_blk" in asked
    assert {name.replace("-", "_") for name in asked} <= available


@pytest.mark.parametrize("arch", ARCHES)
def test_the_identity_of_an_initrd_is_the_digest_of_its_uncompressed_cpio(arch: str, provisioned: Provisioned) -> None:
    initrd = provisioned.boot_files(arch).initrd
    assert hashlib.sha256(unpacked(provisioned, arch)).hexdigest() == initrd.content_sha256
    # no name and no time in the gzip header (RFC 1952: FLG and MTIME)
    assert initrd.path.read_bytes()[3:8] == bytes(5)


def unpacked(provisioned: Provisioned, arch: str) -> bytes:
    return gzip.decompress(provisioned.boot_files(arch).initrd.path.read_bytes())


def cpio_names(provisioned: Provisioned, arch: str) -> list[str]:
    listed = subprocess.run(
        ["cpio", "-it", "--quiet"], input=unpacked(provisioned, arch), capture_output=True, check=True
    )
    assert listed.stderr == b""
    return listed.stdout.decode().splitlines()


def bsdtar(provisioned: Provisioned, arch: str, *words: str, env: dict[str, str] | None = None) -> str:
    option, *members = words
    ran = completed(["bsdtar", option, str(provisioned.boot_files(arch).initrd.path), *members], env=env)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.with_name("artifact.json").read_text())
    return found
