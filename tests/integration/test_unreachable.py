"""An origin that cannot be reached: a quick, honest error that says what was tried and what else there is."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from systemfiles import SourceUnavailable, SystemFiles
from systemfiles.foundation.catalog import read_catalog, shipped_catalog
from tests.conftest import doit
from tests.integration.support import CLOSED, Completed, completed, systemfiles, tree, without_network

SECONDS = 10
FAR = f"""
schema = 1
default_profile = "far"
[profile.far]
kernel = "far-1"
initrd = "v1.0.0"
[kernel.far-1.files.x86_64]
url = "{CLOSED}vmlinux"
sha256 = "{"0" * 64}"
"""


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalog whose default kernel is where nobody listens."""
    path = tmp_path / "far.toml"
    path.write_text(FAR)
    monkeypatch.setenv("SYSTEMFILES_CATALOG", str(path))
    return path


def left_behind(data_dir: Path) -> set[str]:
    """What is there but for locks, which hold nothing."""
    return {name for name in tree(data_dir) if not name.startswith("locks/")} if data_dir.exists() else set()


def assert_honest(ran: Completed, *tried: str) -> None:
    assert ran.returncode != 0
    assert "could not be fetched" in ran.stderr
    for url in tried:
        assert url in ran.stderr
    assert "[mirrors]" in ran.stderr
    assert "$SYSTEMFILES_MIRRORS" in ran.stderr
    assert "profile=debian" in ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr


def test_doit_says_what_it_tried_and_what_else_there_is_and_leaves_nothing(far: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    ran = doit("arch=x86_64", f"data_dir={tmp_path / 'data'}")
    assert time.monotonic() - begun < SECONDS
    assert_honest(ran, f"{CLOSED}vmlinux: Connection refused")
    assert left_behind(tmp_path / "data") == set()


def test_systemfiles_provision_says_the_same(far: Path, tmp_path: Path) -> None:
    ran = systemfiles("provision", "--arch", "x86_64", "--data-dir", tmp_path / "data")
    assert_honest(ran, f"{CLOSED}vmlinux: Connection refused")
    assert left_behind(tmp_path / "data") == set()


def test_ensure_raises_it_with_its_facts(far: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable) as caught:
        SystemFiles(tmp_path / "data", arch="x86_64").ensure()
    assert caught.value.subject == "kernel far-1 (x86_64)"
    assert caught.value.tried == ((f"{CLOSED}vmlinux", "Connection refused"),)
    assert left_behind(tmp_path / "data") == set()


def test_mirrors_are_among_what_was_tried(far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = CLOSED.replace(":9/", ":9/mirror/")
    monkeypatch.setenv("SYSTEMFILES_MIRRORS", f"{CLOSED}={mirror}")
    ran = doit("arch=x86_64", f"data_dir={tmp_path / 'data'}")
    assert_honest(ran, f"{mirror}vmlinux: Connection refused", f"{CLOSED}vmlinux: Connection refused")


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_the_shipped_default_without_a_network(arch: str, tmp_path: Path) -> None:
    catalog = read_catalog(shipped_catalog())
    profile = catalog.find_profile(None)
    (url,) = (file.url for there, file in catalog.kernel[profile.kernel].files.items() if there.value == arch)
    begun = time.monotonic()
    command = [sys.executable, "-m", "doit", f"arch={arch}", f"data_dir={tmp_path / 'data'}"]
    ran = completed([*without_network(), *command])
    assert time.monotonic() - begun < SECONDS
    assert_honest(ran, url)
    assert f"kernel {profile.kernel} ({arch}) could not be fetched" in ran.stderr
    assert left_behind(tmp_path / "data") == set()


def test_the_debian_profile_without_a_network_gives_apts_own_words(tmp_path: Path) -> None:
    begun = time.monotonic()
    command = [sys.executable, "-m", "doit", "profile=debian", "arch=x86_64", f"data_dir={tmp_path / 'data'}"]
    ran = completed([*without_network(), *command])
    assert time.monotonic() - begun < 3 * SECONDS
    assert ran.returncode != 0
    assert "could not be fetched" in ran.stderr
    assert "apt: E: " in ran.stderr or "apt: W: " in ran.stderr or "apt: Err:" in ran.stderr
    assert "apt-get update" in ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    assert left_behind(tmp_path / "data") == set()
