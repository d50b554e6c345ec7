"""Debian's kernel and a real initrd: built on one machine, published, and booted on another that can build nothing."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from systemfiles.foundation.arch import Arch
from tests.conftest import Provisioned
from tests.integration.support import stage
from tests.registries import Registry, registry
from tests.release.conftest import Key, new_key
from tests.release.test_releases import difference, tree

pytestmark = [pytest.mark.network, pytest.mark.boot]

EPOCH = "1760000000"


@dataclass(frozen=True)
class Machine:
    """A checkout of its own, in which commands run."""

    directory: Path
    environ: dict[str, str]

    def run(self, *words: str) -> str:
        environ = {**os.environ, **self.environ, "PYTHONPATH": str(self.directory)}
        done = subprocess.run(
            [sys.executable, *words], cwd=self.directory, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def systemfiles(self, *words: str) -> str:
        return self.run("-m", "systemfiles.cli", *words)


def builder(directory: Path, provisioned: Provisioned) -> Machine:
    """A machine with versions.lock, as a release is made from one commit of it."""
    machine = Machine(stage(directory), {"SYSTEMFILES_DATA_DIR": str(directory / "data"), "SOURCE_DATE_EPOCH": EPOCH})
    (directory / "data" / "system").mkdir(parents=True)
    lock = Path("system") / "versions.lock"
    shutil.copy(provisioned.data_dir / lock, directory / "data" / lock)
    return machine


@pytest.fixture(scope="module")
def released(provisioned: Provisioned, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    directory = tmp_path_factory.mktemp("builder")
    machine = builder(directory / "a", provisioned)
    machine.run("-m", "doit", "release", "profile=debian")
    return machine


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return new_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registry(tmp_path_factory.mktemp("r") / "registry") as running:
        yield running


@pytest.fixture(scope="module")
def published(released: Machine, key: Key, running: Registry) -> str:
    place = f"{running.host}/systemfiles"
    told = released.systemfiles("publish", place, "--key", str(key.path), "--json")
    assert f"{place}/kernel:debian-cloud-" in told
    return place


@pytest.fixture(params=[arch.value for arch in Arch])
def fetched(
    published: str, released: Machine, key: Key, tmp_path: Path, request: pytest.FixtureRequest
) -> tuple[Machine, dict[str, Any]]:
    """A machine without apt and with no way out, and what it was given for one architecture."""
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(f"schema = 1\nbuild = false\n[trust]\nkeys = [{json.dumps(key.public)}]\n")
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    host = Machine(
        stage(tmp_path / "host"),
        {
            "PATH": str(bin_),
            "http_proxy": "http://127.0.0.1:1",
            "https_proxy": "http://127.0.0.1:1",
            "SYSTEMFILES_REGISTRY": published,
            "SYSTEMFILES_CATALOG": str(catalog),
            "SYSTEMFILES_DATA_DIR": str(tmp_path / "data"),
        },
    )
    (tmp_path / "data" / "system").mkdir(parents=True)
    shutil.copy(released.directory / "dist" / "versions.lock", tmp_path / "data" / "system" / "versions.lock")
    return host, json.loads(host.systemfiles("fetch", "--profile", "debian", "--arch", request.param, "--json"))


def test_two_releases_of_one_commit_are_the_same_bytes(
    released: Machine, provisioned: Provisioned, tmp_path: Path
) -> None:
    other = builder(tmp_path / "another builder", provisioned)
    other.run("-m", "doit", "release", "profile=debian")
    one, two = released.directory / "dist", other.directory / "dist"
    assert tree(one) == tree(two), difference(one, two)


def test_a_host_without_apt_has_the_same_bytes_and_they_boot(
    fetched: tuple[Machine, dict[str, Any]], released: Machine
) -> None:
    host, files = fetched
    for kind in ("kernel", "initrd"):
        told = files[kind]
        path = Path(told["path"])
        dist = released.directory / "dist" / kind / told["version"] / told["arch"]
        assert filecmp.cmp(path, dist / path.name, shallow=False)
    words = ["boot", "--profile", "debian", "--arch", files["kernel"]["arch"]]
    environ = {**host.environ, "PATH": os.environ["PATH"]}  # of this the emulator is
    assert "ok" in Machine(host.directory, environ).systemfiles(*words)


def test_nothing_more_is_asked_when_all_is_there(fetched: tuple[Machine, dict[str, Any]], running: Registry) -> None:
    host, files = fetched
    before = running.requests("GET", "")
    words = ["fetch", "--profile", "debian", "--arch", files["kernel"]["arch"], "--json"]
    assert json.loads(host.systemfiles(*words)) == files
    assert running.requests("GET", "") == before
