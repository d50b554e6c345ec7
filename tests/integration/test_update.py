"""`doit update` moves rolling names to what apt has now, keeps what they stood for, and moves nothing by half."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from systemfiles import BootFiles, SystemFiles
from tests.conftest import Provisioned, doit
from tests.integration.support import CLOSED, Completed, Mirror, apt_archive, apt_conf, done_tasks, systemfiles, tree

pytestmark = pytest.mark.network

OLD_KERNEL = "debian-cloud-6.1.1-1"
OLD_BUSYBOX = "1:1.35.0-1"


@dataclass(frozen=True)
class Behind:
    """A data directory whose lock stands where the archive was long ago."""

    data_dir: Path
    old: BootFiles

    @property
    def lock(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.data_dir / "system" / "versions.lock").read_text())
        return found

    def system(self) -> SystemFiles:
        return SystemFiles(self.data_dir, profile="debian", arch="x86_64")

    def doit(self, *words: str) -> Completed:
        return doit("profile=debian", "arch=x86_64", f"data_dir={self.data_dir}", *words)


@pytest.fixture
def behind(provisioned: Provisioned, mirror: Mirror, tmp_path: Path) -> Iterator[Behind]:
    """The old kernel is a local build under the name an older package would have had, so it carries no modules."""
    data_dir = tmp_path / "behind"
    (data_dir / "system").mkdir(parents=True)
    lock = json.loads((provisioned.data_dir / "system" / "versions.lock").read_text())
    busybox = lock["busybox"]["busybox-static"]["x86_64"]
    old_lock = {
        "schema": 1,
        "rolling": {"debian-cloud": {"x86_64": OLD_KERNEL}},
        "busybox": {"busybox-static": {"x86_64": {**busybox, "version": OLD_BUSYBOX}}},
    }
    (data_dir / "system" / "versions.lock").write_text(json.dumps(old_lock))
    system = SystemFiles(data_dir, profile="debian", arch="x86_64")
    system.add_kernel(provisioned.boot_files("x86_64").kernel.path, OLD_KERNEL)
    ran = doit("profile=debian", "arch=x86_64", f"data_dir={data_dir}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    mirror.forget()
    yield Behind(data_dir, system.resolve())
    shutil.rmtree(data_dir)


@pytest.fixture
def archive_of_tomorrow(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt knows one archive only, which is on loopback and has a newer kernel and busybox."""
    directory = tmp_path / "apt"
    directory.mkdir()
    monkeypatch.setenv("APT_CONFIG", str(apt_archive(mirror, directory, kernel="6.1.999-1~x+y", busybox="1:1.99-1")))


def test_an_ordinary_run_moves_nothing(behind: Behind, archive_of_tomorrow: None) -> None:
    ran = behind.doit()
    assert (ran.returncode, done_tasks(ran.stdout)) == (0, set())
    assert behind.system().resolve() == behind.old


def test_an_update_moves_to_the_newest_says_so_and_keeps_the_old(
    behind: Behind, archive_of_tomorrow: None, mirror: Mirror, provisioned: Provisioned
) -> None:
    ran = behind.doit("update")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"debian-cloud: {OLD_KERNEL} → debian-cloud-6.1.999-1_tx_py" in ran.stdout
    assert f"busybox-static: {OLD_BUSYBOX} → 1:1.99-1" in ran.stdout
    assert [request for request in mirror.requests if "x86_64" in request] == ["busybox x86_64", "kernel x86_64"]

    now = behind.system().resolve()
    assert now.kernel.version == "debian-cloud-6.1.999-1_tx_py"
    assert [part.sha256 for part in now] == [part.sha256 for part in provisioned.boot_files("x86_64")]
    assert behind.lock["rolling"]["debian-cloud"] == {"x86_64": now.kernel.version}
    assert behind.lock["current"]["v1.0.0-debian"][now.kernel.version] == {"x86_64": now.initrd.version}
    assert behind.system().resolve(behind.old.kernel.version, behind.old.initrd.version) == behind.old
    assert behind.system().verify().problems == ()

    again = behind.doit("update")
    assert (again.returncode, again.stderr) == (0, "")
    assert "nothing moved" in again.stdout
    assert "→" not in again.stdout
    assert behind.system().resolve() == now
    ordinary = behind.doit()
    assert (ordinary.returncode, done_tasks(ordinary.stdout)) == (0, set()), ordinary.stdout


def test_an_update_by_the_hosts_own_apt(behind: Behind, provisioned: Provisioned) -> None:
    newest = provisioned.boot_files("x86_64")
    command = ("provision", "--update", "--profile", "debian", "--arch", "x86_64", "--data-dir", behind.data_dir)
    ran = systemfiles(*command)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"debian-cloud: {OLD_KERNEL} → {newest.kernel.version}" in ran.stdout
    assert [part.sha256 for part in behind.system().resolve()] == [part.sha256 for part in newest]
    assert [part.version for part in behind.system().resolve()] == [part.version for part in newest]
    assert str(behind.system().resolve().kernel.path) in ran.stdout


@pytest.mark.parametrize("sources", ["", f"deb [trusted=yes] {CLOSED} nowhere main\n"], ids=["none", "unreachable"])
def test_an_update_that_apt_cannot_answer_moves_nothing_and_gives_apts_own_words(
    sources: str, behind: Behind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APT_CONFIG", str(apt_conf(tmp_path, sources)))
    before = tree(behind.data_dir / "system"), behind.lock
    ran = behind.doit("update")
    assert ran.returncode != 0
    assert "could not be fetched" in ran.stderr
    assert "apt: " in ran.stderr
    assert CLOSED.removesuffix("/") in ran.stderr or not sources
    assert "apt-get update" in ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    assert (tree(behind.data_dir / "system"), behind.lock) == before
    assert behind.system().resolve() == behind.old


def test_an_update_moves_nothing_while_a_part_of_the_archive_cannot_be_read(
    behind: Behind, archive_of_tomorrow: None, tmp_path: Path
) -> None:
    # at another address: apt gives a host up after the first refused connection
    dead = CLOSED.replace("127.0.0.1", "127.0.0.2")
    with (tmp_path / "apt" / "sources.list").open("a") as sources:
        sources.write(f"deb [trusted=yes] {dead} nowhere main\n")
    ran = behind.doit("update")
    assert ran.returncode != 0
    assert "nothing was moved" in ran.stderr
    assert dead in ran.stderr
    assert behind.system().resolve() == behind.old


def test_an_update_whose_initrd_cannot_be_built_moves_nothing(
    behind: Behind, archive_of_tomorrow: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = tmp_path / "overlay.toml"
    entry = '[initrd.other]\ninit = "v1.0.0"\nbusybox = { apt = "busybox-static" }\nload = ["no_such_module"]\n'
    overlay.write_text(f"schema = 1\n{entry}")
    monkeypatch.setenv("SYSTEMFILES_CATALOG", str(overlay))
    ran = behind.doit("update", "initrd=other")
    assert ran.returncode != 0
    assert "no_such_module" in ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    monkeypatch.delenv("SYSTEMFILES_CATALOG")
    assert behind.lock["rolling"]["debian-cloud"] == {"x86_64": OLD_KERNEL}
    assert behind.lock["busybox"]["busybox-static"]["x86_64"]["version"] == OLD_BUSYBOX
    assert behind.system().resolve() == behind.old


def test_two_names_for_one_package_do_not_break_each_others_pairs(
    behind: Behind, archive_of_tomorrow: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert behind.doit("update").returncode == 0
    first = behind.system().resolve()
    overlay = tmp_path / "overlay.toml"
    overlay.write_text('schema = 1\n[kernel.alias]\napt = { x86_64 = "linux-image-cloud-amd64" }\n')
    monkeypatch.setenv("SYSTEMFILES_CATALOG", str(overlay))
    ran = behind.doit("kernel=alias")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    monkeypatch.delenv("SYSTEMFILES_CATALOG")
    assert behind.system().resolve(first.kernel.version, first.initrd.version) == first
    assert behind.system().resolve() == first
