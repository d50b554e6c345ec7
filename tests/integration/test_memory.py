"""How much memory large transfers take: a bound that does not grow with them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.registries import registry
from tests.transfers import CHECKOUT, command, noise, push_image, web_server

SIZE = 200_000_000
MOST = 60_000_000
LAYERS = 5


@pytest.fixture(autouse=True)
def _directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A directory that goes when the test ends, because of its size."""
    (tmp_path / "work").mkdir()
    yield tmp_path / "work"
    shutil.rmtree(tmp_path / "work")


def above_idle(words: Sequence[str]) -> int:
    """Bytes of memory that this transfer takes at its peak."""
    ran = subprocess.run(words, cwd=CHECKOUT, check=False, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


def stored(data_dir: Path) -> int:
    return sum(path.stat().st_size for path in data_dir.rglob("*") if path.is_file())


def test_a_download_takes_no_more_memory_the_longer_it_is(work: Path) -> None:
    source, data_dir = work / "www", work / "data"
    source.mkdir()
    digest = noise(source / "file", SIZE)
    with web_server(source) as server:
        assert above_idle(command("fetch", f"{server}file", digest, str(SIZE), data_dir)) <= MOST
    assert stored(data_dir) == SIZE


def test_a_copy_of_a_local_file_takes_no_more_either(work: Path) -> None:
    source, data_dir = work / "file", work / "data"
    digest = noise(source, SIZE)
    assert above_idle(command("fetch", source.as_uri(), digest, str(SIZE), data_dir)) <= MOST
    assert stored(data_dir) == SIZE


def test_layers_that_come_at_the_same_time_take_no_more_together(work: Path) -> None:
    with registry(work / "registry") as running:
        reference = push_image(running.host, "app", layers=LAYERS, size=SIZE // LAYERS)
        assert above_idle(command("pull", reference, work / "data")) <= MOST
    assert stored(work / "data") > SIZE


def test_a_push_takes_no_more_memory_the_longer_it_is(work: Path) -> None:
    digest = noise(work / "file", SIZE)
    with registry(work / "registry") as running:
        assert above_idle(command("push", running.host, "app", work / "file", digest)) <= MOST
        assert len(running.requests("PUT", "/blobs/uploads/")) == 1
    assert stored(work / "registry") > SIZE
