"""Whoever is killed while releasing or publishing leaves what was there before, or all of it; the next run goes on."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from systemfiles.foundation.errors import SourceUnavailable
from systemfiles.release.dist import read_dist
from tests.conftest import CHECKOUT
from tests.release.conftest import Press
from tests.release.test_releases import tree
from tests.retention.world import World

KILLS = 60 if os.environ.get("SYSTEMFILES_TEST_FULL") else 8
_RELEASE = """
import sys
from pathlib import Path
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import load_catalog
from systemfiles.release.building import Origin, release
catalog, dist = map(Path, sys.argv[1:])
targets, origin = [("k-1", "i-1", Arch.X86_64)], Origin("urn:a:builder", None, 1)
release(targets, load_catalog(catalog), dist.parent / "lock", dist, origin)
"""


def run(*words: str) -> float:
    """How many seconds a command takes when nobody kills it."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, *words], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - started


def killed(seconds: float, *words: str) -> None:
    with subprocess.Popen(
        [sys.executable, *words], cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()


def moments(whole: float) -> Iterator[float]:
    """When to kill, all over what it takes; a fixed seed makes the same fractions each time."""
    chance = random.Random(7)
    return (whole * (number + chance.random()) / KILLS for number in range(KILLS))


def test_a_version_has_its_tag_once_all_of_it_is_there(press: Press) -> None:
    key = press.key()
    whole = run("-m", "systemfiles.cli", "publish", f"{press.registry}-whole", "--dist", str(press.dist))
    for number, moment in enumerate(moments(whole)):
        place = f"{press.registry}-{number}"
        words = ("-m", "systemfiles.cli", "publish", place, "--dist", str(press.dist), "--key", str(key.path))
        killed(moment, *words)
        for kernel, initrd in (("k-1", "i-1"), ("k-2", "i-2")):
            host = press.host(trusted=(key,), registries=(place,))
            with contextlib.suppress(SourceUnavailable):
                host.ensure(kernel, initrd)
        run(*words)
        assert press.host(trusted=(key,), registries=(place,)).ensure("k-2", "i-2").kernel.version == "k-2"


def test_a_release_is_the_one_before_or_the_new_one(small_world: World, tmp_path: Path) -> None:
    dist = tmp_path / "dist"
    words = ("-c", _RELEASE, str(small_world.catalog), str(dist))
    whole = run(*words)
    made = tree(dist)
    for moment in moments(whole):
        killed(moment, *words)
        assert {artifact.version for artifact in read_dist(dist)} == {"k-1", "i-1"}
        _age(tmp_path)
    run(*words)
    assert tree(dist) == made
    assert [*tmp_path.iterdir()] == [dist]


@pytest.fixture(autouse=True)
def _built_in_this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))


def _age(directory: Path) -> None:
    """Makes what killed processes left old enough for the next to be sure of."""
    for path in directory.iterdir():
        os.utime(path, (0, 0))
