"""Fixtures of the integration tests."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Provisioned
from tests.integration.support import Mirror, copy_data_dir, nobody, stage


@pytest.fixture
def copied(provisioned: Provisioned, tmp_path: Path) -> Iterator[Path]:
    """A data directory of one's own to change; 240 MB, so it goes when the test ends."""
    target = tmp_path / "copied"
    copy_data_dir(provisioned.data_dir, target)
    yield target
    shutil.rmtree(target)


@pytest.fixture(scope="session")
def archive(provisioned: Provisioned, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirror]:
    """A loopback mirror of the packages that everything here was made from."""
    scratch = tmp_path_factory.mktemp("archive")
    mirror = Mirror(provisioned.data_dir / "system" / "versions.lock", scratch)
    yield mirror
    mirror.close()
    shutil.rmtree(scratch)


@pytest.fixture
def mirror(archive: Mirror, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    """The mirror, asked first by every command of this test."""
    archive.forget()
    monkeypatch.setenv("SYSTEMFILES_MIRRORS", archive.variable)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return archive


@pytest.fixture(scope="session")
def staged() -> Iterator[Path]:
    """The package where every user can read it. Do not change it."""
    base = Path(tempfile.mkdtemp(prefix="systemfiles-staged-"))
    stage(base)
    subprocess.run(["chmod", "-R", "a+rX", str(base)], check=True)
    yield base
    shutil.rmtree(base)


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A directory that an unprivileged user owns and can reach, unlike pytest's own."""
    base = Path(tempfile.mkdtemp(prefix="systemfiles-public-"))
    base.chmod(0o755)
    user = nobody()
    shutil.chown(base, user.pw_uid, user.pw_gid)
    yield base
    subprocess.run(["chmod", "-R", "u+w", str(base)], check=True)
    shutil.rmtree(base)
